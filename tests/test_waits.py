"""Every wait for another rank ends after its limit, and says who waits where for whom, and where that one stands.

A case is two processes of which rank 1 comes late: it waits until rank 0 has its error. Many cases run in one set of
processes, each with groups of its own, since a wait that fails breaks its connections.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import modelparallel as smp
from modelparallel.comm import lookout
from modelparallel.job import session
from pool import run_ranks

#: Long enough for what all ranks do together on a busy machine.
SECONDS = 2.0
TENSOR = {"tensor_parallel_degree": 2}
SHARDED = {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0}
OWNERS = {"shard_optimizer_state": True}


class Turn:
    """Lets rank 1 (of more than two: the second half) come late, to the place where ``late`` is called while the case
    is on.
    """

    def __init__(self, flag: Path) -> None:
        self.flag = flag
        self.is_on = False

    def late(self) -> None:
        if self.is_on and smp.rank() >= smp.size() // 2:
            self.is_on = False
            deadline = time.monotonic() + 60
            while not self.flag.exists() and time.monotonic() < deadline:
                time.sleep(0.05)


class LateBackward(torch.autograd.Function):
    """Rank 1 is late in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Turn) -> Tensor:
        ctx.turn = turn
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.turn.late()
        return grads[0], None


class Net(nn.Module):
    """``part`` between two places where rank 1 may be late, forward and backward."""

    def __init__(self, part: nn.Module, turn: Turn, where: str) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.part = part
        self.turn, self.where = [turn], where

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        hidden = self.first(x) if x.is_floating_point() else x
        if self.where == "forward":
            self.turn[0].late()
        result: Any = self.part((hidden, *more) if more else hidden)
        result = result[0] if isinstance(result, tuple) else result
        return LateBackward.apply(result, self.turn[0]) if self.where == "backward" else result


def wrapped(part: nn.Module, turn: Turn, where: str, is_split: bool = False) -> Any:
    net = Net(part, turn, where)
    if is_split:
        smp.set_tensor_parallelism(net.part, True)
    model = smp.DistributedModel(net)
    model(torch.ones(2, 8)).sum().backward()  # all together
    turn.is_on = True
    return model


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().abs().long() % 16


def linear_forward(turn: Turn, folder: Path) -> None:
    wrapped(nn.Linear(8, 8), turn, "forward", is_split=True)(torch.ones(2, 8))


def embedding(turn: Turn, folder: Path) -> None:
    wrapped(nn.Sequential(Rounding(), nn.Embedding(16, 8)), turn, "forward", is_split=True)(torch.ones(2, 8))


def linear_backward(turn: Turn, folder: Path) -> None:
    wrapped(nn.Linear(8, 8), turn, "backward", is_split=True)(torch.ones(2, 8)).sum().backward()


def batch_norm(turn: Turn, folder: Path) -> None:
    wrapped(nn.SyncBatchNorm(8), turn, "forward")(torch.ones(2, 8))


def reducer(turn: Turn, folder: Path) -> None:
    wrapped(nn.Linear(8, 8), turn, "backward")(torch.ones(2, 8)).sum().backward()


def hooked_reducer(turn: Turn, folder: Path) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def late_hook(state: Any, bucket: Any) -> Any:
        turn.late()
        return allreduce_hook(state, bucket)

    model = wrapped(nn.Linear(8, 8), turn, "never")
    model.register_comm_hook(None, late_hook)
    model(torch.ones(2, 8)).sum().backward()


def owners_gather(turn: Turn, folder: Path) -> None:
    model = wrapped(nn.Linear(8, 8), turn, "never")
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters()))
    model(torch.ones(2, 8)).sum().backward()
    turn.late()
    optimizer.step()


def sharded_gather(turn: Turn, folder: Path) -> None:
    model = wrapped(nn.Linear(8, 8), turn, "never")
    turn.late()
    model(torch.ones(2, 8))


class LateInside(nn.Linear):
    turn: Turn

    def forward(self, x: Tensor) -> Tensor:
        return LateBackward.apply(super().forward(x), self.turn)


def sharded_reduce(turn: Turn, folder: Path) -> None:
    part = LateInside(8, 8)
    part.turn = turn
    wrapped(part, turn, "never")(torch.ones(2, 8)).sum().backward()


def sharded_state(turn: Turn, folder: Path) -> None:
    model = wrapped(nn.Linear(8, 8), turn, "never")
    turn.late()
    model.local_state_dict(gather_if_shard=True)


def vocabulary_loss(turn: Turn, folder: Path) -> None:
    with smp.tensor_parallelism():
        head = smp.nn.DistributedTransformerLMHead(
            num_layers=1, num_attention_heads=2, attention_head_size=8, hidden_size=16, intermediate_size=16,
            vocab_size=16, num_positions=8, add_lm_head=True, causal_mask_size=8,
        )  # fmt: skip
    model = smp.DistributedModel(head)
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4)
    batch = (ids, mask, None, None, ids)
    model(batch)
    *_, last = (module for name, module in model.module.named_modules() if name.endswith("layernorm"))
    turn.is_on = True
    last.register_forward_hook(lambda *_: turn.late())
    model(batch)


def messages(turn: Turn, folder: Path) -> None:
    turn.is_on = True
    turn.late()
    smp.barrier()


def checkpoint_group(turn: Turn, folder: Path) -> None:
    model = wrapped(nn.Linear(8, 8), turn, "never")
    if smp.rank() == 1:
        from modelparallel.checkpoints.partial import writing

        made = writing.checkpoint_group

        def make_late(runtime: Any) -> Any:
            turn.late()
            return made(runtime)

        writing.checkpoint_group = make_late
    smp.save_checkpoint(str(folder), "late", model=model)


def export(turn: Turn, folder: Path) -> None:
    from modelparallel.checkpoints.partial.whole_tensors import WholeTensors

    model = wrapped(nn.Linear(8, 8), turn, "never", is_split=True)
    if smp.rank() == 1:
        put_together = WholeTensors.put_together

        def put_together_late(self: Any, wanted: Any) -> Any:
            turn.late()
            return put_together(self, wanted)

        WholeTensors.put_together = put_together_late
    smp.export_hf(str(folder / "weights"), model)


@dataclass(frozen=True)
class Case:
    body: Callable[[Turn, Path], None]
    parameters: dict[str, Any]
    purpose: str
    awaited: str = "global rank 1, of the"
    limit: str = "timeout_seconds"


ALL = "the others of the"
FAST = [
    Case(linear_forward, TENSOR, "DistributedLinear 'part'"),
    Case(reducer, {}, "the reduction of gradient bucket 0 ('part.bias' to 'first.weight')", ALL),
]
SLOW = [
    Case(embedding, TENSOR, "DistributedEmbedding 'part.1'"),
    Case(linear_backward, TENSOR, "DistributedLinear 'part'"),
    Case(batch_norm, {}, "SyncBatchNorm 'part'"),
    Case(batch_norm, TENSOR, "SyncBatchNorm 'part'"),
    Case(vocabulary_loss, TENSOR, "VocabularyHead 'lm_head'"),
    Case(
        hooked_reducer,
        {},
        "the reduction of gradient bucket 0 ('part.bias' to 'first.weight') by hooked_reducer.<locals>.late_hook",
        ALL,
    ),
    Case(reducer, OWNERS, "the reduction of gradient bucket 0 ('part.bias' to 'first.weight') to the owners"),
    Case(owners_gather, OWNERS, "the updated parameters of gradient bucket 0"),
    Case(sharded_gather, SHARDED, "the gathering of the parameters of first", ALL),
    Case(sharded_reduce, SHARDED, "the reduction of the gradients of part", ALL),
    Case(sharded_state, SHARDED, "the gathering of the parameter 'first.weight'"),
    Case(messages, {"message_timeout_seconds": SECONDS}, "smp.barrier", ALL, "message_timeout_seconds"),
    Case(checkpoint_group, {}, "making the process group of checkpoints", ALL),
    Case(export, TENSOR, "putting tensors of a checkpoint together"),
]


def errors_of(cases: list[Case], folder: str) -> list[str]:
    """On a rank: the error of each case."""
    global_rank, num_ranks = dist.get_rank(), dist.get_world_size()
    result = []
    for number, case in enumerate(cases):
        session.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
        place = Path(folder) / str(number)
        place.mkdir(exist_ok=True)
        store = dist.FileStore(str(place / "store"), num_ranks)
        dist.init_process_group("gloo", store=store, rank=global_rank, world_size=num_ranks)
        smp.init({"ddp": True, "timeout_seconds": SECONDS, **case.parameters})
        flag = place / "done"
        torch.manual_seed(1)
        try:
            case.body(Turn(flag), place)
            result.append("no error")
        except Exception as error:
            result.append(f"{type(error).__name__}: {error}")
        if global_rank == 0:
            flag.touch()
    return result


def check(cases: list[Case], folder: Path, num_ranks: int = 2) -> None:
    found = run_ranks(errors_of, num_ranks, cases, str(folder), timeout=300, grace=60)
    wrong = []
    for case, text in zip(cases, found[0], strict=True):
        starts = (
            text.startswith(f"WaitTimeoutError: {case.purpose}") and "global rank 0 waited at test_waits.py:" in text
        )
        says = case.awaited in text and f"nothing came within {case.limit}={SECONDS:g}" in text
        if not (starts and says and f"\nglobal rank {num_ranks // 2} is alive, at test_waits.py:" in text):
            wrong.append(f"{case}\n{text}")
    assert not wrong, "\n\n".join(wrong)


def test_wait_says_who_waits_where_for_whom_and_what_that_one_does(tmp_path: Path) -> None:
    check(FAST, tmp_path)


@pytest.mark.slow
def test_every_kind_of_wait_does(tmp_path: Path) -> None:
    check(SLOW, tmp_path)


@pytest.mark.slow
def test_reduction_over_copies_of_shards_does(tmp_path: Path) -> None:
    purpose = "the reduction of the gradients of part over the copies"
    check([Case(sharded_reduce, SHARDED, purpose, "the others of the rdp group [0, 2]")], tmp_path, num_ranks=4)


def missing_at_init() -> tuple[str, float]:
    if dist.get_rank() == 1:
        return "", 0.0
    start = time.monotonic()
    try:
        smp.init({"ddp": True, "timeout_seconds": 1})
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0.0


def test_process_that_does_not_come_to_init_is_named() -> None:
    text, seconds = run_ranks(missing_at_init, 3, timeout=180)[0]
    assert text.startswith("WaitTimeoutError: smp.init: global rank 0 waited at test_waits.py:"), text
    assert "for the processes of the global ranks [1], of 3: they did not come within 1 s" in text, text
    assert seconds < 30


def stopped_peer() -> str:
    pids = smp.allgather(os.getpid(), smp.WORLD)
    if smp.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        smp.barrier()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.kill(pids[1], signal.SIGKILL)
    return "no error"


def test_stopped_process_is_named_as_silent() -> None:
    parameters = {"ddp": True, "timeout_seconds": 2, "message_timeout_seconds": 1}
    text = run_ranks(stopped_peer, 2, parameters=parameters, return_failures=True, grace=30, timeout=180)[0]
    assert text.startswith("WaitTimeoutError: smp.barrier") and "\nglobal rank 1 has not said anything" in text, text


def waits_long(folder: str) -> list[str]:
    """Rank 1 comes when rank 0 has said what it is waiting for and what rank 1 does."""
    lines: list[str] = []
    flag = Path(folder) / "said"
    lookout.SAY_AFTER_SECONDS = 1.0

    def note(text: str, *args: Any) -> None:
        lines.append(text % args)
        if "is alive" in lines[-1]:
            flag.touch()

    lookout.logger.warning = note
    smp.init({"ddp": True, "timeout_seconds": 30})
    turn = Turn(flag)
    turn.is_on = True
    turn.late()
    smp.barrier()
    return lines


def test_wait_that_takes_long_is_said_with_what_the_other_does(tmp_path: Path) -> None:
    lines = run_ranks(waits_long, 2, str(tmp_path), timeout=180)[0]
    assert lines and lines[0].startswith("smp.barrier: global rank 0 waits at test_waits.py:"), lines
    assert "for the others of the world group [0, 1] (for " in lines[0]
    assert "\nglobal rank 1 is alive, at test_waits.py:" in lines[-1], lines
