"""Every program of the other engine tests under every schedule: the first step in discovery order, others planned."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine_gradients
import engine_libraries
import engine_random
import engine_values
from engine_models import WIDTH
from engine_runs import SCHEDULES, Outcome, compare, data, layout, outcomes, wrapped
from pool import run_ranks
from training import square_loss, step_of

OWN_CASES = {**engine_gradients.CASES, **engine_random.CASES, **engine_values.CASES}
CASES = {**OWN_CASES, **engine_libraries.CASES}
MIN_STEPS = 3
QUICK = list(OWN_CASES)
# Programs that stay in discovery order where a stage is visited several times, and why.
GOES_OTHER_WAYS = {"loops", "by_microbatch"}  # the microbatches of the discovery step differ
CARRIES_STATE = {
    "evaluates", "into_plain", "into_plain_views", "in_place_first", "in_place_first_read_again",
    "llama_checkpointed",  # transformers 5 puts a hook on the embedding, and what a hook keeps is not known
}  # fmt: skip


@functools.cache
def expected(names: tuple[str, ...], num_microbatches: int) -> dict[str, Outcome]:
    """In one process; the schedule does not matter there."""
    return run(list(names), 1, num_microbatches)[0]


def run(names: list[str], num_stages: int, num_microbatches: int, **more: Any) -> list[dict[str, Outcome]]:
    return outcomes(
        __name__, names, num_stages, num_microbatches=num_microbatches, min_steps=MIN_STEPS,
        times=max(1, num_microbatches // 2), **more,
    )  # fmt: skip


def check_matrix(names: list[str], num_stages: int, kind: str, num_microbatches: int, active: int) -> None:
    ranks = run(names, num_stages, num_microbatches, pipeline=kind, active_microbatches=active)
    wanted = expected(tuple(names), num_microbatches)
    for name in names:
        parts = [rank[name] for rank in ranks]
        compare(name, parts, wanted[name])
        later = max(CASES[name].num_steps, MIN_STEPS) - 1
        is_planned = name not in GOES_OTHER_WAYS | CARRIES_STATE
        for part in parts:
            ways = part.ways
            assert (ways.discovered, ways.left) == (1, 0), (name, ways)
            assert (ways.planned, ways.unplanned) == ((later, 0) if is_planned else (0, later)), (name, ways)
            if is_planned and kind != "simple":
                assert max(part.peaks[1:]) <= active, (name, part.peaks)


def test_every_second_program_with_zero_bubble() -> None:
    check_matrix(QUICK[::2], 2, "zero_bubble", 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "active"), [("interleaved", 2), ("zero_bubble", 3)])
def test_programs_under_two_schedules(kind: str, active: int) -> None:
    check_matrix(QUICK, 2, kind, 4, active)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_stages", "kind", "num_microbatches", "active"),
    [
        (2, "simple", 4, 2),
        (2, "interleaved", 2, 1),
        (2, "zero_bubble", 2, 2),
        (3, "simple", 2, 2),
        (3, "interleaved", 4, 3),
        (3, "interleaved", 2, 5),
        (3, "zero_bubble", 4, 5),
        (4, "simple", 4, 4),
        (4, "interleaved", 4, 4),
        (4, "zero_bubble", 4, 2),
    ],
)
def test_programs_under_every_schedule(num_stages: int, kind: str, num_microbatches: int, active: int) -> None:
    check_matrix(list(CASES), num_stages, kind, num_microbatches, active)


# Random numbers


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_dropout_gives_the_same_losses_on_any_number_of_stages(kind: str, num_stages: int) -> None:
    wanted = expected(("dropout_layers", "units", "python_noise"), 4)
    ranks = run(list(wanted), num_stages, 4, pipeline=kind, active_microbatches=num_stages)
    for name, outcome in wanted.items():
        compare(name, [rank[name] for rank in ranks], outcome)
        assert ranks[0][name].ways.planned >= 2


# Statement 32 of the semantics, seen from within the modules


class Log:
    """What nobody follows out of a module: a list would be part of its output, and carry state between microbatches."""

    __slots__ = ("seen",)
    seen: list[str]


LOG = Log()
LOG.seen = []


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        LOG.seen.append("F")
        return super().forward(input)


def note_backward(*_: Any) -> None:
    LOG.seen.append("B")


note_backward.keeps_local = True  # type: ignore[attr-defined]  # each process is to have its own


class Watched(nn.Module):
    """Four linear layers in a row; LOG gets "F" and "B" where those of this process run forward and backward."""

    def __init__(self, *, is_straight: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Noisy(WIDTH, WIDTH) for _ in range(4))
        self.order = (0, 1, 2, 3) if is_straight else (0, 2, 1, 3)
        for layer in self.layers:
            layer.register_full_backward_hook(note_backward)

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.tanh(self.layers[index](x))
        return x


def watched(is_straight: bool) -> tuple[list[str], list[int], Any]:
    """(what the modules of this stage have seen, a string per step; most microbatches under way; how steps ran)."""
    import modelparallel as smp
    from modelparallel.training import runtime

    torch.manual_seed(1)
    model = smp.DistributedModel(Watched(is_straight=is_straight).double())
    for index, layer in enumerate(model.module.layers):
        smp.set_partition(layer, index // 2)
    train = step_of(square_loss)
    texts, peaks = [], []
    for step in range(4):
        LOG.seen = []
        train(model, data(step, 12))
        texts.append("".join(LOG.seen))
        peaks.append(runtime.current().engine.last_peak_active)
    plans = runtime.current().engine.plans
    # The first microbatch of all reads the small output everywhere, to find the loss's structure; later ones do not.
    assert [plan.chain.is_straight for plan in plans._plans.values() if plan is not None] == [is_straight]
    return texts, peaks, plans.counts


def run_watched(kind: str, is_straight: bool, active: int) -> list[Any]:
    parameters = layout(2, microbatches=6, pipeline=kind, active_microbatches=active)
    ranks = run_ranks(watched, 2, is_straight, parameters=parameters)
    for texts, _, ways in ranks:
        assert (ways.planned, ways.left, ways.unplanned) == (3, 0, 0)
        assert all(sorted(text) == sorted("BF" * 12) for text in texts)
    return ranks


@pytest.mark.parametrize("is_straight", [True, False], ids=["straight", "back_and_forth"])
def test_c032_simple_runs_no_backward_before_the_last_forward_of_a_stage(is_straight: bool) -> None:
    for texts, _, _ in run_watched("simple", is_straight, 2):
        assert texts == ["F" * 12 + "B" * 12] * 4


@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("is_straight", [True, False], ids=["straight", "back_and_forth"])
@pytest.mark.parametrize("kind", ["interleaved", "zero_bubble"])
def test_c032_planned_steps_never_hold_more_than_active_microbatches(kind: str, is_straight: bool, active: int) -> None:
    for texts, peaks, _ in run_watched(kind, is_straight, active):
        assert max(peaks[1:]) <= active
        for text in texts[1:]:
            # Two layers a microbatch: at no time are more than 2 * active forwards without their backward.
            depths = [text[:end].count("F") - text[:end].count("B") for end in range(len(text) + 1)]
            assert max(depths) <= 2 * active
            assert "BF" in text, "a backward runs before the last forward"


def kept(*args: Any) -> tuple[Any, Any]:
    """The same three steps of a model whose stages are visited several times."""

    model = wrapped(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5)), nn.Tanh()))
    train = step_of(square_loss)
    losses = []
    for step in range(3):
        losses.append(float(train(model, data(step, 5)).reduce_mean()))
    return losses, {name: p.grad.clone() for name, p in model.local_named_parameters()}


def test_c032_all_schedules_give_equal_gradients() -> None:
    runs = [run_ranks(kept, 2, parameters=layout(2, microbatches=3, pipeline=kind)) for kind in SCHEDULES]
    for ranks in runs[1:]:
        for (losses, gradients), (other_losses, other_gradients) in zip(ranks, runs[0], strict=True):
            assert losses == pytest.approx(other_losses, rel=1e-12)
            assert list(gradients) == list(other_gradients)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-10, atol=1e-14)


class Uneven(nn.Module):
    """Three layers; the second one does eight times the work of the first, and the loss is glue on the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(256, 256)
        self.large = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256))
        self.last = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.large(self.small(x)))


def counted_costs(is_compiled: bool, is_frozen: bool) -> list[tuple[int, float, float, float]]:
    """(stage, forward, backward, weight) of the visits of a model that is partitioned by hand."""
    import modelparallel as smp
    from modelparallel.training import runtime

    torch.manual_seed(1)
    net = Uneven()
    net.small.requires_grad_(not is_frozen)
    model = smp.DistributedModel(net, compile={"backend": "eager"} if is_compiled else False)
    for name, pp_rank in (("small", 0), ("large", 1), ("last", 0)):
        smp.set_partition(model.module.get_submodule(name), pp_rank)
    train = step_of(square_loss)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        train(model, torch.randn(512, 256, generator=generator))
    plans = runtime.current().engine.plans
    assert (plans.counts.planned, plans.last is None) == (1, False)
    visits = plans.last.chain.visits
    # What every stage reads of the loss costs nothing and comes last.
    return [(visit.stage, visit.forward, visit.backward, visit.weight) for visit in visits if visit.forward > 0]


def test_costs_are_counted_where_the_partition_was_made_by_hand() -> None:
    parameters = layout(2, microbatches=4, auto_partition=False, default_partition=0)
    ranks = run_ranks(counted_costs, 2, False, False, parameters=parameters)
    assert ranks[0] == ranks[1]
    (_, *small), (_, *large), (_, *last) = ranks[0]
    assert [stage for stage, *_ in ranks[0]] == [0, 1, 0]
    # By the operations alone 8; small ones have a price of their own, and gradients of weights are added up.
    assert 5 < large[0] / small[0] < 8 and 5 < large[1] / last[1] < 8 and 5 < large[2] / small[2] < 9
    assert small[1] == 0  # nobody needs the gradient of the input
    assert last[0] > small[0]  # the loss


def test_frozen_modules_have_no_weight_gradients_to_wait_for() -> None:
    parameters = layout(2, microbatches=4, auto_partition=False, default_partition=0)
    ranks = run_ranks(counted_costs, 2, False, True, parameters=parameters)
    (_, *small), (_, *large), _ = ranks[0]
    assert small[1:] == [0, 0]
    assert large[1] == pytest.approx(large[0] / 2, rel=0.05)  # only its second layer
    assert large[2] > large[0] * 0.9


def test_compiled_units_are_taken_as_equal() -> None:
    parameters = layout(2, microbatches=4, auto_partition=False, default_partition=0)
    ranks = run_ranks(counted_costs, 2, True, False, parameters=parameters)
    assert ranks[0] == ranks[1]
    assert [cost for _, cost, _, _ in ranks[0]] == pytest.approx([1 / 4, 1 / 2, 1 / 4], rel=0.01)
