"""Modules with weights that are called inside modules of other stages: copies that train like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed_run import distributed_run
from engine_models import WIDTH, vectors
from engine_runs import Case, compare, outcomes
from parity import assert_parity, reference_run
from pool import run_ranks


class Block(nn.Module):
    """Calls ``guest`` of its arguments, or what it keeps without owning it, as ``way`` says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, guest: Any = None) -> Tensor:
        h = torch.tanh(self.before(x))
        if self.way == "argument":
            h = h + guest(h)
        elif self.way == "kept":
            h = h + self.kept["guest"](x)
        elif self.way == "part":
            h = h * guest.inner.scale(x) + guest.inner.shift
        elif self.way == "closure":
            h = h + self.function(x)
        elif self.way == "weights":
            h = h + F.linear(x, self.kept["guest"].weight.tanh())
        return x + self.after(h)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid())
        self.shift = nn.Parameter(torch.rand(WIDTH))


class Adapter(nn.Module):
    """A guest that calls another one, which it is not the owner of."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, WIDTH)
        object.__setattr__(self, "other", other)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.other(x), 0.2, self.training))


class Net(nn.Module):
    def __init__(self, way: str, kind: str = "linear") -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inner, self.scaler = Inner(), nn.Linear(WIDTH, WIDTH)
        self.guest: nn.Module = nn.Linear(WIDTH, WIDTH)
        if kind == "nested":
            self.guest = Adapter(self.scaler)
        elif kind == "frozen":
            self.guest.requires_grad_(False)
        elif kind == "norm":
            self.guest = nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList(Block(way) for _ in range(4))
        guest = self.guest
        for block in self.blocks:
            object.__setattr__(block, "kept", {"guest": guest})
            object.__setattr__(block, "function", lambda x: torch.sin(guest(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "also outside":
            x = x + self.guest(x)
        for block in self.blocks:
            given = self if block.way == "part" else self.guest
            if self.kind == "recomputed":
                x = checkpoint(block, x, given, use_reentrant=False)
            else:
                x = block(x, given)
        return x


def squares(model: Any, x: Tensor) -> Tensor:
    return model(x).pow(2).mean()


def case(way: str, kind: str = "linear") -> Case:
    return Case(lambda: Net(way, kind), vectors, squares)


CASES = {
    "given as an argument": case("argument"),
    "kept in a dict": case("kept"),
    "a part of the model that is given whole": case("part"),
    "in a closure": case("closure"),
    "its weights are read": case("weights"),
    "called outside, too": case("argument", "also outside"),
    "calls another one": case("closure", "nested"),
    "frozen": case("argument", "frozen"),
    "recomputed": case("closure", "recomputed"),
    "norm": case("argument", "norm"),
}
COPIED = [name for name in CASES if name != "norm"]


def test_guests_train_like_one_process() -> None:
    expected = outcomes(__name__, COPIED, 1)[0]
    ranks = outcomes(__name__, COPIED, 2)
    for name in COPIED:
        compare(name, [rank[name] for rank in ranks], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("is_scattered", [False, True])
def test_guests_train_like_one_process_under_a_schedule(num_stages: int, is_scattered: bool) -> None:
    names = COPIED if is_scattered or num_stages == 3 else list(CASES)
    expected = outcomes(__name__, names, 1, num_microbatches=3, times=2)[0]
    ranks = outcomes(
        __name__, names, num_stages, num_microbatches=3, is_scattered=is_scattered, times=2, pipeline="zero_bubble"
    )
    for name in names:
        compare(name, [rank[name] for rank in ranks], expected[name])


def test_a_guest_that_keeps_state_is_refused_by_name_where_its_hosts_are_apart() -> None:
    (first, _) = outcomes(__name__, ["norm"], 2)
    assert first["norm"].error.startswith("PartitionError: module 'guest' keeps state in its buffers")
    assert "is called inside modules of other stages ('blocks." in first["norm"].error


def test_a_guest_that_the_partition_did_not_see_is_refused_by_name() -> None:
    ranks = outcomes(__name__, ["given as an argument"], 2, is_scattered=False, skip_tracing=True)
    errors = [rank["given as an argument"].error for rank in ranks]
    assert any("module 'guest' is on pp_rank" in error and "skip_tracing" in error for error in errors), errors


# With copies of the data, sharded parameters and optimizers, and one parameter in checkpoints


def train() -> Any:
    import modelparallel as smp
    from modelparallel.training import runtime

    result = distributed_run(make_net, batches(), squares, make_optimizer=adam)
    wrapped: Any = runtime.current().models[0]
    result.weights.update(own_names(smp.allgather(list(wrapped.local_state_dict()), smp.PP_GROUP)))
    return result, {row.name: row.holders for row in wrapped.table.rows() if row.tied_copies}


def own_names(parts: list[list[str]]) -> dict[str, Tensor]:
    """How many stages hold each name, where it is more than one."""
    names = [name for part in parts for name in part if not name.startswith("_")]
    return {f"holders of {name}": torch.tensor(float(names.count(name))) for name in names if names.count(name) > 1}


def make_net() -> nn.Module:
    torch.manual_seed(3)
    return Net("closure", "recomputed").double().train()


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=0.01)


def batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, WIDTH, generator=generator, dtype=torch.float64),) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"shard_optimizer_state": True}, {"sharded_data_parallel_degree": 2, "sdp_gradient_clipping": 1000.0}]
)
def test_guests_train_with_copies_of_the_data(more: dict[str, Any]) -> None:
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True, **more}
    expected = reference_run(make_net, batches(), squares, num_microbatches=2, num_copies=2, make_optimizer=adam)
    expected.weights.update({f"holders of guest.{name}": torch.tensor(2.0) for name in ("weight", "bias")})
    for result, holders in run_ranks(train, 4, parameters=parameters):
        assert {name: set(stages) for name, stages in holders.items()} == {
            "guest.weight": {0, 1}, "guest.bias": {0, 1},
        }  # fmt: skip
        if "shard_optimizer_state" not in more:
            assert_parity(result.gradients, expected.gradients, dtype=torch.float64)
        assert_parity(result.weights, expected.weights, dtype=torch.float64)
