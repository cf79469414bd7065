"""Channels between pairs of stages, with gloo in the place of NCCL and CPU tensors in that of a GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_runs import layout
from modelparallel.comm.stages.channels import PairChannels
from modelparallel.comm.stages.gloo import GlooTransport
from modelparallel.errors import CommunicationError
from pool import run_ranks

WIDTH = 16


class Skips(nn.Module):
    """Blocks in a row; the last layer also reads what the first has made. Large inputs take an early exit."""

    def __init__(self, *, may_exit: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.head = nn.Linear(2 * WIDTH, 4)
        self.may_exit = may_exit

    def forward(self, x: Tensor) -> Tensor:
        is_large = self.may_exit and bool(x.abs().max() > 50)
        first = x = torch.tanh(self.blocks[0](x))
        for index, block in enumerate(self.blocks[1:]):
            x = x + torch.tanh(block(x)).t().t()
            if is_large and index == 2:
                break
        return self.head(torch.cat([x, first], dim=1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6 + 3 * (step % 2), WIDTH, generator=generator).double()
    return x * 100 if step == 3 else x, torch.tensor([step % 4])


def train(has_channels: bool, may_exit: bool) -> tuple[list[Tensor], dict[str, Tensor], list[int], Any]:
    """(losses, gradients, how many messages have gone by channels after each step, how the steps ran)."""
    import modelparallel as smp
    from modelparallel.training import runtime

    engine = runtime.current().engine
    transport = engine.transport
    sent: list[int] = []
    if has_channels:
        groups = runtime.current().session.groups
        channels = PairChannels(engine.stage, groups.pp.ranks, "gloo", torch.device("cpu"), 20.0)
        transport.channels = channels
        post = channels.send

        def count(peer: int, payload: Tensor) -> Any:
            sent.append(payload.numel())
            return post(peer, payload)

        channels.send = count
    torch.manual_seed(1)
    net = Skips(may_exit=may_exit).double()
    model = smp.DistributedModel(net)
    for index, block in enumerate(net.blocks):
        smp.set_partition(block, index * engine.num_stages // len(net.blocks))
    smp.set_partition(net.head, engine.num_stages - 1)

    @smp.step
    def step_function(model: Any, x: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), target.expand(len(x)))
        model.backward(loss)
        return loss

    losses, numbers = [], []
    for step in range(5):
        x, target = batch(step)
        losses.append(step_function(model, x, target.expand(len(x))).reduce_mean())
        numbers.append(len(sent))
    gradients = {name: parameter.grad.clone() for name, parameter in model.local_named_parameters()}
    return losses, gradients, numbers, engine.plans.counts


@pytest.mark.parametrize(("kind", "may_exit"), [("simple", False), ("interleaved", True), ("zero_bubble", False)])
def test_steps_are_the_same_by_channels(kind: str, may_exit: bool) -> None:
    parameters = layout(3, microbatches=3, pipeline=kind, auto_partition=False, default_partition=0)
    plain = run_ranks(train, 3, False, may_exit, parameters=parameters)
    by_channels = run_ranks(train, 3, True, may_exit, parameters=parameters)
    for one, other in zip(plain, by_channels, strict=True):
        assert all(torch.equal(first, second) for first, second in zip(one[0], other[0], strict=True))
        assert one[1].keys() == other[1].keys()
        assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())
        assert one[3] == other[3]
    for stage, (_, _, numbers, counts) in enumerate(by_channels):
        assert numbers[0] < numbers[1] < numbers[2], f"stage {stage} has not used its channels"
        assert (counts.discovered, counts.planned, counts.left) == ((1, 3, 1) if may_exit else (1, 4, 0))


def pairs_made() -> list[tuple[int, int]]:
    from modelparallel.training import runtime

    engine = runtime.current().engine
    channels = PairChannels(engine.stage, runtime.current().session.groups.pp.ranks, "gloo", torch.device("cpu"), 20.0)
    channels.open([(2, 1), (0, 1), (1, 2)])
    channels.open([(0, 1), (1, 0)])
    return list(channels._groups)


def test_a_stage_makes_the_channels_that_it_is_an_end_of_once_and_in_one_order() -> None:
    made = run_ranks(pairs_made, 3, parameters=layout(3, microbatches=3))
    assert made == [[(0, 1), (1, 0)], [(0, 1), (1, 2), (2, 1), (1, 0)], [(1, 2), (2, 1)]]


def test_a_payload_that_does_not_come_is_an_error_with_a_name() -> None:
    def lost() -> None:
        raise RuntimeError("Connection closed by peer\nand more")

    transport = GlooTransport.__new__(GlooTransport)
    transport.stage = 2
    with pytest.raises(CommunicationError, match=r"pp_rank 2: a message of pp_rank 1 .* \(Connection closed by peer\)"):
        transport._make_ready(1, lost)
