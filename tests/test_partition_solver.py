"""The solver against trying everything: splits, memory limit, several pieces a stage, tied modules. Pure."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelparallel.errors import PartitionError
from modelparallel.partitioning import make_plan, microbatches_in_flight, solve
from modelparallel.partitioning.costs import OPERATIONS_PER_SENT_BYTE
from modelparallel.pipeline.schedule.making import step_predictor
from partition_models import chain, layers

SCHEDULES = ["simple", "interleaved", "zero_bubble"]
SMALL = st.integers(0, 3)  # few different values make equal splits
LARGE = st.integers(0, 1000)


@st.composite
def problems(draw, max_units=9, max_stages=4, virtual_degree=1):
    number = draw(st.sampled_from([SMALL, LARGE]))
    num_units = draw(st.integers(3, max_units))
    num_stages = draw(st.integers(1, max(1, min(max_stages, num_units // virtual_degree))))
    costs = [(draw(number) + 1, draw(number), draw(number) + (index == 0), draw(SMALL)) for index in range(num_units)]
    return costs, num_stages, draw(st.sampled_from([0.0, 0.2, 0.8, 1.0])), draw(st.sampled_from(SCHEDULES))


class Everything:
    """All splits of a chain, rated by formulas written a second time, in the plainest way."""

    def __init__(self, costs, num_stages, weight, in_flight):
        self.costs, self.num_stages, self.weight, self.in_flight = costs, num_stages, weight, in_flight
        mean = sum(in_flight) / len(in_flight)
        self.mean_memory = sum(state + activation * mean for state, activation, _, _ in costs) / num_stages
        self.mean_compute = sum(flops for _, _, flops, _ in costs) / num_stages
        self.mean_in_flight = mean

    def splits(self):
        inner = range(1, len(self.costs))
        for cuts in itertools.combinations(inner, len(self.in_flight) - 1):
            yield list(itertools.pairwise((0, *cuts, len(self.costs))))

    def memory(self, split):
        held = [0] * self.num_stages
        for piece, (start, end) in enumerate(split):
            for state, activation, _, _ in self.costs[start:end]:
                held[piece % self.num_stages] += state + activation * self.in_flight[piece]
        return held

    def rate(self, split):
        per_stage = []
        for stage in range(self.num_stages):
            pieces = [self.costs[start:end] for start, end in split[stage :: self.num_stages]]
            memory = sum(
                state + activation * self.mean_in_flight for piece in pieces for state, activation, _, _ in piece
            )
            compute = max(sum(flops for _, _, flops, _ in piece) for piece in pieces) * len(pieces)
            per_stage.append(self.weight * memory / self.mean_memory + (1 - self.weight) * compute / self.mean_compute)
        crossing = sum(self.costs[end - 1][3] for _, end in split[:-1])
        messages = crossing * OPERATIONS_PER_SENT_BYTE / self.mean_compute
        return max(per_stage), sum(cost * cost for cost in per_stage) + messages


def split_of(plan, num_pieces):
    """The runs of a plan of a chain, which must be contiguous and in order."""
    stages = [stage for _, stage in plan.modules]
    edges = [0, *(index for index in range(1, len(stages)) if stages[index] != stages[index - 1]), len(stages)]
    split = list(itertools.pairwise(edges))
    assert [stages[start] for start, _ in split] == [piece % plan.num_stages for piece in range(num_pieces)]
    assert [name for name, _ in plan.modules] == [f"u{index}" for index in range(len(stages))]
    return split


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_chain_is_split_as_the_best_of_all_splits(problem):
    costs, num_stages, weight, schedule = problem
    in_flight = microbatches_in_flight(num_stages, 4, 3, schedule)
    everything = Everything(costs, num_stages, weight, in_flight)
    plan = solve(chain(costs), num_stages, weight, 4, 3, schedule=schedule)
    found = everything.rate(split_of(plan, num_stages))
    ratings = [everything.rate(split) for split in everything.splits()]
    best = min(maximum for maximum, _ in ratings)
    assert math.isclose(found[0], best, rel_tol=1e-9)
    equal = [second for maximum, second in ratings if math.isclose(maximum, best, rel_tol=1e-9)]
    assert math.isclose(found[1], min(equal), rel_tol=1e-9)


@settings(max_examples=150, deadline=None)
@given(problems(), st.floats(0.5, 1.5))
def test_the_memory_limit_is_kept_by_the_best_split_or_refused_by_the_least(problem, looseness):
    costs, num_stages, weight, schedule = problem
    in_flight = microbatches_in_flight(num_stages, 4, 3, schedule)
    everything = Everything(costs, num_stages, weight, in_flight)
    limit = max(1, int(looseness * sum(everything.memory(next(everything.splits()))) / num_stages))
    least = min(max(everything.memory(split)) for split in everything.splits())
    allowed = [everything.rate(split)[0] for split in everything.splits() if max(everything.memory(split)) <= limit]
    if not allowed:
        with pytest.raises(PartitionError, match=f"memory_limit={limit}: no split .* needs {least:,} bytes"):
            solve(chain(costs), num_stages, weight, 4, 3, schedule=schedule, memory_limit=limit)
        return
    plan = solve(chain(costs), num_stages, weight, 4, 3, schedule=schedule, memory_limit=limit)
    split = split_of(plan, num_stages)
    assert [figures.memory_bytes for figures in plan.figures] == everything.memory(split)
    assert max(everything.memory(split)) <= limit
    assert math.isclose(everything.rate(split)[0], min(allowed), rel_tol=1e-9)


# Several pieces a stage


@settings(max_examples=100, deadline=None)
@given(problems(virtual_degree=2), st.one_of(st.none(), st.floats(0.8, 1.5)))
def test_several_pieces_a_stage_are_the_best_of_all_splits(problem, looseness):
    costs, num_stages, weight, schedule = problem
    if len(costs) < 2 * num_stages:
        num_stages = 1
    in_flight = microbatches_in_flight(num_stages, 8, 6, schedule, 2)
    everything = Everything(costs, num_stages, weight, in_flight)
    memories = [max(everything.memory(split)) for split in everything.splits()]
    limit = None if looseness is None else max(1, int(looseness * sum(memories) / len(memories)))
    allowed = [
        everything.rate(split)
        for split, memory in zip(everything.splits(), memories, strict=True)
        if limit is None or memory <= limit
    ]
    if not allowed:
        with pytest.raises(PartitionError, match=f"memory_limit={limit}: no split "):
            solve(chain(costs), num_stages, weight, 8, 6, schedule=schedule, virtual_degree=2, memory_limit=limit)
        return
    plan = solve(chain(costs), num_stages, weight, 8, 6, schedule=schedule, virtual_degree=2, memory_limit=limit)
    if num_stages == 1:
        return
    split = split_of(plan, 2 * num_stages)
    assert math.isclose(everything.rate(split)[0], min(allowed)[0], rel_tol=1e-9)
    assert [figures.memory_bytes for figures in plan.figures] == everything.memory(split)


def test_pieces_are_dealt_out_in_turn_and_too_few_are_refused():
    plan = make_plan(layers(8), 2, virtual_degree=2)
    assert [stage for _, stage in plan.modules] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert plan.virtual_degree == 2
    assert "0..1 | 4..5" in plan.table()
    with pytest.raises(PartitionError, match=r"with virtual_pipeline_degree=2 needs 4.*virtual_pipeline_degree <= 1"):
        make_plan(layers(3), 2, virtual_degree=2)
    with pytest.raises(PartitionError, match="pipeline_parallel_degree is 4: use pipeline_parallel_degree <= 3"):
        make_plan(layers(3), 4, virtual_degree=2)


def test_microbatches_in_flight():
    assert microbatches_in_flight(3, 8, 5, "simple") == (5, 5, 5)
    assert microbatches_in_flight(3, 2, 5, "_only_forward") == (2, 2, 2)
    assert microbatches_in_flight(4, 8, 6, "interleaved") == (4, 3, 2, 1)
    assert microbatches_in_flight(4, 8, 2, "zero_bubble") == (2, 2, 2, 1)
    assert microbatches_in_flight(2, 8, 3, "interleaved", 2) == (3, 3, 2, 1)
    assert microbatches_in_flight(2, 8, 3, "simple", 2) == (3, 3, 3, 3)


# Memory limit


def test_a_refusal_says_by_how_much_and_only_names_remedies_that_work():
    trace = chain([(1000, 100, 10, 1)] * 6)
    ask = {"num_microbatches": 4, "active_microbatches": 3, "schedule": "simple"}
    with pytest.raises(PartitionError) as caught:
        solve(trace, 2, 0.8, memory_limit=3500, **ask)
    text = str(caught.value)
    assert "memory_limit=3500: no split over 2 stages keeps every stage within 3.4 KiB" in text
    assert "The leanest split needs 3,900 bytes on its fullest stage" in text
    assert text.count("400 B (400 bytes) over the limit") == 2
    assert "2.9 KiB parameters, gradients and optimizer state, 900 B activations in flight" in text
    remedies = text.partition("What would help: ")[2].split("; ")
    assert remedies == [
        "memory_limit >= 3900",
        "pipeline_parallel_degree=3",
        "active_microbatches=1",
        "smaller microbatches: microbatches=8",
        "activation checkpointing, which keeps fewer activations",
    ]
    assert solve(trace, 2, 0.8, memory_limit=3900, **ask)
    assert solve(trace, 3, 0.8, memory_limit=3500, **ask)
    assert solve(trace, 2, 0.8, memory_limit=3500, **{**ask, "active_microbatches": 1})
    with pytest.raises(PartitionError, match="2 stages"):
        solve(trace, 2, 0.8, memory_limit=3500, **{**ask, "active_microbatches": 2})
    # The first stage of "interleaved" holds two microbatches: 3600 bytes of three layers, but two and four fit.
    with pytest.raises(PartitionError, match=r'pipeline="interleaved"'):
        solve(trace, 2, 0.8, memory_limit=3600, **ask)
    assert solve(trace, 2, 0.8, memory_limit=3600, **{**ask, "schedule": "interleaved"})


def test_a_module_that_is_too_big_by_itself_is_named():
    with pytest.raises(PartitionError, match=r"'u1' needs 4.9 KiB by itself, whatever the split: make it smaller"):
        solve(chain([(10, 0, 1, 1), (5000, 0, 1, 1), (10, 0, 1, 1)]), 2, 0.8, memory_limit=4000)
    with pytest.raises(PartitionError, match="virtual_pipeline_degree=1"):
        solve(chain([(90, 0, 1, 1), (10, 0, 1, 1)] * 2), 2, 0.8, virtual_degree=2, memory_limit=120)


def test_the_limit_counts_what_the_schedule_keeps_in_flight():
    trace = chain([(100, 100, 10, 1)] * 8)
    even = solve(trace, 2, 0.0, 4)
    assert [len(even.modules_on(stage)) for stage in (0, 1)] == [4, 4]
    assert [figures.in_flight for figures in even.figures] == [(2,), (1,)]
    assert [figures.memory_bytes for figures in even.figures] == [1200, 800]
    tight = solve(trace, 2, 0.0, 4, memory_limit=1000)
    assert [len(tight.modules_on(stage)) for stage in (0, 1)] == [3, 5]
    with pytest.raises(PartitionError, match="stage 0"):
        solve(trace, 2, 0.0, 4, schedule="simple", memory_limit=1000)


# Tied modules


@st.composite
def tied_problems(draw):
    costs, num_stages, weight, schedule = draw(problems(max_units=8, max_stages=3))
    if len(costs) < num_stages + 1:
        costs = costs + costs
    count = draw(st.integers(2, min(3, len(costs) - num_stages + 1)))
    tied = sorted(draw(st.permutations(range(len(costs))))[:count])
    return costs, num_stages, weight, schedule, tied


def tied_splits(costs, num_stages, tied, places):
    """Homes of all units, for every split of the others with the tied ones at one of these places in the order."""
    for place in places:
        order = [index for index in range(len(costs)) if index not in tied or index == place]
        for cuts in itertools.combinations(range(1, len(order)), num_stages - 1):
            homes = {}
            for stage, (start, end) in enumerate(itertools.pairwise((0, *cuts, len(order)))):
                homes.update(dict.fromkeys(order[start:end], stage))
            yield {**homes, **dict.fromkeys(tied, homes[place])}


def dearest(costs, homes, num_stages, weight, mean):
    """The dearest stage of an arbitrary placement."""
    memory, compute = [0.0] * num_stages, [0.0] * num_stages
    for index, (state, activation, flops, _) in enumerate(costs):
        memory[homes[index]] += state + activation * mean
        compute[homes[index]] += flops
    return max(
        weight * a * num_stages / sum(memory) + (1 - weight) * b * num_stages / sum(compute)
        for a, b in zip(memory, compute, strict=True)
    )


@settings(max_examples=150, deadline=None)
@given(tied_problems())
def test_tied_modules_get_the_best_of_the_places_of_their_members(problem):
    costs, num_stages, weight, schedule, tied = problem
    ties = (tuple(f"u{index}" for index in tied),)
    plan = solve(chain(costs, ties), num_stages, weight, 4, 3, schedule=schedule)
    in_flight = microbatches_in_flight(num_stages, 4, 3, schedule)
    mean = sum(in_flight) / num_stages
    homes = {int(name[1:]): stage for name, stage in plan.modules}
    assert len({homes[index] for index in tied}) == 1
    best = min(dearest(costs, homes, num_stages, weight, mean) for homes in tied_splits(costs, num_stages, tied, tied))
    assert math.isclose(dearest(costs, homes, num_stages, weight, mean), best, rel_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(max_units=10))
def test_a_prediction_shortens_the_step(problem):
    """Never longer than without it, and for speed alone hardly longer than the best of all splits."""
    costs, num_stages, _, schedule = problem
    predict = step_predictor(schedule, 6, num_stages + 2)
    if predict is None:
        assert schedule == "zero_bubble"
        return

    def time_of(split):
        return predict([(sum(flops for _, _, flops, _ in costs[start:end]), 0.0, 0.0) for start, end in split])

    in_flight = microbatches_in_flight(num_stages, 6, num_stages + 2, schedule)
    best = min(map(time_of, Everything(costs, num_stages, 0.0, in_flight).splits()))
    plain, predicted = (
        time_of(split_of(solve(chain(costs), num_stages, 0.0, 6, schedule=schedule, step_time=given), num_stages))
        for given in (None, predict)
    )
    assert best <= predicted * (1 + 1e-9) and predicted <= plain * (1 + 1e-9)
    assert predicted <= 1.1 * best


def test_of_two_equally_dear_stages_the_first_one_is_the_better_place():
    """The last stage would wait for the first one's forward, and the first for its backward."""
    trace = chain([(4, 0, 2, 0), (4, 0, 2, 0), (4, 0, 1, 0), (4, 0, 2, 0), (4, 0, 2, 0)])
    trace = replace(trace, units=tuple(replace(unit, needs_input_gradient=True) for unit in trace.units))
    plan = solve(trace, 2, 0.0, 4, step_time=step_predictor("interleaved", 4, 4))
    assert [stage for _, stage in plan.modules] == [0, 0, 0, 1, 1]
