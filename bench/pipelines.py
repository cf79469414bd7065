"""The GPT in a pipeline of two processes: ours and torch.distributed.pipelining's, with one split for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining

import modelparallel as smp
from bench.models import GPT, GPTSize, language_loss, pieces_of_gpt

NUM_STAGES = 2
NUM_MICROBATCHES = 8
BATCH = 16
SIZE = GPTSize()


@dataclass(frozen=True)
class Setting:
    """What is compared.

    Attributes:
        pipeline: our schedule, the configuration's ``pipeline``.
        peer: the name of the peer's schedule class.
        layout: the process of every piece of the model, in order.
        active_microbatches: our limit, the smallest with which the step is as short as it can be.
    """

    pipeline: str
    peer: str
    layout: tuple[int, ...] = (0, 1)
    active_microbatches: int = 2

    def parameters(self) -> dict[str, Any]:
        """Our configuration; the split is made by hand, to be that of the peer."""
        return {
            "pipeline_parallel_degree": NUM_STAGES,
            "microbatches": NUM_MICROBATCHES,
            "pipeline": self.pipeline,
            "active_microbatches": self.active_microbatches,
            "auto_partition": False,
            "default_partition": 0,
        }


@smp.step
def train_step(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One microbatch, as a user writes it."""
    loss = language_loss(model(ids), targets)
    model.backward(loss)
    return loss


def make_gpt(size: GPTSize) -> GPT:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return GPT(size)


def our_model(setting: Setting) -> Any:
    """The wrapped GPT, its pieces where the setting says."""
    model = smp.DistributedModel(make_gpt(SIZE))
    gpt: Any = model.module
    for modules, pp_rank in zip(pieces_of_gpt(gpt, len(setting.layout)), setting.layout, strict=True):
        for module in modules:
            smp.set_partition(module, pp_rank)
    return model


class PeerPipeline:
    """The peer's schedule over the same pieces."""

    def __init__(self, setting: Setting) -> None:
        self.pp_rank = dist.get_rank()
        self.is_first = self.pp_rank == setting.layout[0]
        self.is_last = self.pp_rank == setting.layout[-1]
        gpt = make_gpt(SIZE)
        pieces = pieces_of_gpt(gpt, len(setting.layout))
        stages = []
        self.module = nn.ModuleDict()  # what this process holds
        for index, (modules, pp_rank) in enumerate(zip(pieces, setting.layout, strict=True)):
            if pp_rank == self.pp_rank:
                self.module[str(index)] = piece = nn.Sequential(*modules)
                stages.append(pipelining.PipelineStage(piece, index, len(pieces), torch.device("cpu")))
        names = {id(parameter): name for name, parameter in gpt.named_parameters()}
        #: What this process holds, by the name in the whole model.
        self.parameters = {names[id(parameter)]: parameter for parameter in self.module.parameters()}
        schedule_class: Any = getattr(pipelining, setting.peer)
        is_multi = issubclass(schedule_class, pipelining.schedules.PipelineScheduleMulti)
        self.schedule = schedule_class(stages if is_multi else stages[0], NUM_MICROBATCHES, loss_fn=language_loss)

    def step(self, ids: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        """Forward and backward of a batch; the losses of the microbatches on the last stage."""
        losses: list[torch.Tensor] = []
        arguments = (ids,) if self.is_first else ()
        if self.is_last:
            self.schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        else:
            self.schedule.step(*arguments, return_outputs=False)
        return losses


def check_equal(model: Any, our_loss: torch.Tensor, peer: PeerPipeline, their_losses: Sequence[torch.Tensor]) -> None:
    """After one step of each from the same weights: one loss, and one gradient for every parameter of this process."""
    if peer.is_last:
        torch.testing.assert_close(our_loss, torch.stack(list(their_losses)).mean().detach(), rtol=1e-5, atol=1e-5)
    ours = {name.removeprefix("module."): parameter for name, parameter in model.local_named_parameters()}
    if set(ours) != set(peer.parameters):
        raise RuntimeError(f"only one of the two holds {sorted(set(ours) ^ set(peer.parameters))}")
    for name, parameter in peer.parameters.items():
        gradient = ours[name].grad
        if gradient is None or not torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-6):
            raise RuntimeError(f"the two make different gradients of {name}")
