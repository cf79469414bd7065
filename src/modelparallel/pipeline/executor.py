"""The reference executor: microbatch after microbatch, all forwards, then all backwards, blocking at each receive.

It is right for every deterministic program; planned schedules are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelparallel import trees
from modelparallel.comm.transport import MessageKind, MessageName
from modelparallel.pipeline.engine import PipelineEngine
from modelparallel.pipeline.program import Program
from modelparallel.pipeline.pushes import PushedValues
from modelparallel.pipeline.randomness import RandomFrames
from modelparallel.pipeline.stage_tensor import StageTensor, TensorSpec


@dataclass(frozen=True)
class MicrobatchRun:
    """What one microbatch needs: the user's function with its arguments, and its random frames."""

    call: Callable[[], Any]
    frames: RandomFrames


def run_locally(engine: PipelineEngine, runs: Sequence[MicrobatchRun], kind: Hashable) -> list[Any]:
    """Run each microbatch, in order, without a pipeline; ``kind`` says what is run (which function, in which mode).

    [Note: watching] Seeding random operations in glue needs a look at every operation between the modules, about a
    microsecond each. So only the first step of a kind is watched; if no random operation was seen there, later ones are
    not. Where such an operation first appears later (behind a branch on data), it draws from the generator as the last
    unit has left it: random and reproducible, but then not equal to the same run under a pipeline.
    """
    is_watched = kind not in engine.kinds_without_random_glue
    outputs = []
    for run in runs:
        run.frames.enter_microbatch(seeds_numpy=False)
        outputs.append(engine.run_locally(run.frames, run.call, is_watched=is_watched))
    if is_watched and all(run.frames.num_glue_operations == 0 for run in runs):
        engine.kinds_without_random_glue.add(kind)
    return outputs


def run_discovery_order(
    engine: PipelineEngine,
    runs: Sequence[MicrobatchRun],
    *,
    before_last_backward: Callable[[], None],
    detach_outputs: bool,
) -> list[Any]:
    """Run each microbatch, then their backwards; returns the outputs, equal on all stages. Collective over PP_GROUP."""
    if torch.is_inference_mode_enabled():
        # Inference tensors do not say when they are written to, which the stages must know.
        with torch.inference_mode(False), torch.no_grad():
            return run_discovery_order(
                engine, runs, before_last_backward=before_last_backward, detach_outputs=detach_outputs
            )
    pushes = PushedValues(engine.transport, engine.device)
    programs = [Program(engine, index, run.frames, pushes) for index, run in enumerate(runs)]
    try:
        outputs = []
        for program, run in zip(programs, runs, strict=True):
            run.frames.enter_microbatch(seeds_numpy=True)
            with engine.running(program):
                output = run.call()
            outputs.append(trees.map_leaves(program.returned, output))
            del output  # a tensor that only it refers to does not outlive the microbatch
            engine.settle_buffers()
            program.written.settle(program)
        for program in programs:
            if program is programs[-1]:
                before_last_backward()
            if program.has_root:
                program.backward()
        results = _share_outputs(engine, outputs, programs[0], detach_outputs=detach_outputs)
        pushes.receive_all()
        engine.transport.drain()
    except BaseException as error:
        engine.transport.abandon(error)
        raise
    finally:
        for program in programs:
            program.close()
    return results


def _share_outputs(engine: PipelineEngine, outputs: list[Any], program: Program, *, detach_outputs: bool) -> list[Any]:
    """The outputs with every StageTensor replaced by its value: one message per home and receiver."""
    by_home: dict[int, list[StageTensor]] = {}
    for leaf in trees.leaves(outputs):
        if isinstance(leaf, StageTensor):
            group = by_home.setdefault(leaf.home, [])
            if not any(leaf is other for other in group):
                group.append(leaf)
    values: dict[int, torch.Tensor] = {}
    for home in sorted(by_home):
        tensors = by_home[home]
        name = MessageName(MessageKind.OUTPUTS, program.microbatch, program.next_event(f"outputs of pp_rank {home}"))
        if home == engine.stage:
            found = [tensor.program.local(tensor) for tensor in tensors]
            packed = _pack([tensor.detach() for tensor in found])
            for peer in engine.transport.peers():
                engine.transport.send_tensors(peer, name, [packed], "the step's outputs", is_stable=[True])
        else:
            packed = torch.empty(sum(tensor.spec.num_bytes for tensor in tensors), dtype=torch.uint8)
            engine.transport.receive_tensors(home, name, [packed], "the step's outputs")
            found = _unpack(packed, [tensor.spec for tensor in tensors], engine.device)
            for value, tensor in zip(found, tensors, strict=True):
                if tensor.spec.requires_grad and not detach_outputs:
                    value.requires_grad_()
        for tensor, value in zip(tensors, found, strict=True):
            values[id(tensor)] = value.detach() if detach_outputs else value
    return trees.map_leaves(lambda leaf: values[id(leaf)] if isinstance(leaf, StageTensor) else leaf, outputs)


def _pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _unpack(packed: torch.Tensor, specs: Sequence[TensorSpec], device: torch.device) -> list[torch.Tensor]:
    result = []
    start = 0
    for spec in specs:
        # A copy, since a view of another dtype needs an aligned start.
        value = packed[start : start + spec.num_bytes].clone().view(spec.dtype).view(spec.shape)
        result.append(value.to(device) if spec.device_type != "cpu" else value)
        start += spec.num_bytes
    return result
