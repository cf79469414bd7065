"""Pipeline schedules: golden files, published formulas, and properties over random chains of visits."""

import itertools
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from modelparallel.errors import ScheduleError
from modelparallel.launch.command_line import app
from modelparallel.launch.schedule_pictures import grid_svg, grid_text
from modelparallel.pipeline.schedule import making as scheduling
from modelparallel.pipeline.schedule.checks import check_schedule
from modelparallel.pipeline.schedule.making import make_schedule
from modelparallel.pipeline.schedule.timeline import simulate
from modelparallel.plan.schedule import SCHEDULE_KINDS, Action, ActionKind, Chain, Schedule, Visit
from schedule_rules import all_actions, has_to_wait, is_valid, known_interleaved_order

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = sorted((ROOT / "tests" / "schedules").glob("*.txt"))
F, B, I, W = ActionKind  # noqa: E741 - the letters of the papers
PROPERTIES = settings(deadline=None, max_examples=200, derandomize=True, database=None)


# ---------------------------------------------------------------- golden files


def golden_text(name):
    """What the file of this name must hold: the schedule, and its grid."""
    kind, numbers = re.fullmatch(r"(\w+?)-(.*)", name).groups()
    values = {key: int(value) for key, value in re.findall(r"([a-z])(\d+)", numbers)}
    chain = CHAINS[numbers.split("-")[0]] if "p" not in values else Chain.looped(values["p"], values.get("v", 1))
    schedule = make_schedule(chain, values["m"], kind, values.get("a"))
    check_schedule(schedule, chain, values.get("a"))
    return schedule.to_text() + "\n" + grid_text(schedule, simulate(schedule, chain))


CHAINS = {
    # The first stage has the embedding and, with the same weight, the last layer: every microbatch comes back to it.
    "tied": Chain(3, (Visit(0), Visit(1, waits_for=(0,)), Visit(2, waits_for=(1,)), Visit(0, waits_for=(2,)))),
    # A skip connection from stage 0 to stage 2, and a value that stage 0 reads from the end (a loss that is printed).
    "skip": Chain(
        3,
        (
            Visit(0),
            Visit(1, 1, 2, 1, waits_for=(0,)),
            Visit(2, 2, 1, 1, waits_for=(0, 1)),
            Visit(0, 0, 0, 0, waits_for=(2,), has_backward=False),
        ),
    ),
}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    assert golden_text(path.stem) == path.read_text()


def test_golden_files_cover_the_kinds():
    assert {path.stem.split("-")[0] for path in GOLDEN} == set(SCHEDULE_KINDS)


# ---------------------------------------------------------------- what the papers say


def one_forward_one_backward(num_stages, num_microbatches, active_microbatches):
    """1F1B (Narayanan et al. 2021): a warm-up of forwards, then one backward and one forward in turn."""
    stages = []
    for stage in range(num_stages):
        warm_up = min(num_stages - stage, active_microbatches, num_microbatches)
        actions = [Action(F, number) for number in range(warm_up)]
        for number in range(num_microbatches):
            actions.append(Action(B, number))
            if warm_up + number < num_microbatches:
                actions.append(Action(F, warm_up + number))
        stages.append(tuple(actions))
    return tuple(stages)


@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 2, 0), (3, 0.5, 0.25)])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
def test_interleaved_on_a_straight_chain_is_1f1b(num_stages, costs):
    chain = Chain.straight(num_stages, *costs)
    for num_microbatches in (1, 2, 3, 5, 8, 13):
        for active in (num_stages, num_stages + 2, 20, None):
            made = make_schedule(chain, num_microbatches, "interleaved", active)
            assert made.actions == one_forward_one_backward(num_stages, num_microbatches, active or num_microbatches)


@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 2, 0), (3, 0.5, 0.25)])
@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_interleaved_with_less_memory_than_1f1b(num_stages, costs):
    """It warms up with as many forwards as are allowed, and is not slower than 1F1B's fixed turns with that warm-up."""
    chain = Chain.straight(num_stages, *costs)
    for num_microbatches in (2, 3, 8, 13):
        for active in range(1, num_stages):
            made = make_schedule(chain, num_microbatches, "interleaved", active)
            turns = one_forward_one_backward(num_stages, num_microbatches, active)
            for stage, actions in enumerate(made.actions):
                kinds = "".join(action.kind.value for action in actions)
                assert kinds.index("B") == min(num_stages - stage, active, num_microbatches)
            in_turns = Schedule("interleaved", num_microbatches, turns)
            assert simulate(made, chain).makespan <= simulate(in_turns, chain).makespan + 1e-9


def test_values_that_every_stage_reads_cost_nothing():
    """A loss that every stage reads gives each a second visit; the schedules are as good as without."""
    for p, m in ((2, 4), (4, 8), (8, 32)):
        plain = Chain.straight(p)
        reads = tuple(Visit(stage, 0, 0, 0, (p - 1,), has_backward=False) for stage in range(p - 1))
        reading = Chain(p, plain.visits + reads)
        for kind in SCHEDULE_KINDS:
            expected = simulate(make_schedule(plain, m, kind), plain)
            found = simulate(make_schedule(reading, m, kind), reading)
            assert found.makespan == expected.makespan
            if kind != "forward_only":  # there a microbatch now stays until its loss is read
                assert found.peak_microbatches == expected.peak_microbatches


def test_uneven_costs_do_not_change_1f1b():
    chain = Chain(3, (Visit(0, 5, 1, 1), Visit(1, 0.1, 4, 0, (0,)), Visit(2, 1, 0.2, 3, (1,))))
    assert make_schedule(chain, 7, "interleaved").actions == one_forward_one_backward(3, 7, 7)


@pytest.mark.parametrize("kind", ["simple", "interleaved", "forward_only"])
def test_bubble_of_gpipe_and_1f1b(kind):
    for p in (1, 2, 3, 4, 8):
        for m in (1, 2, 4, 7, 8, 32):
            for costs in ((1, 1, 1), (2, 3, 1)):
                if kind == "interleaved" and m < p and costs != (1, 1, 1):
                    continue  # the formula is for a full pipeline
                chain = Chain.straight(p, *costs)
                timeline = simulate(make_schedule(chain, m, kind), chain)
                assert timeline.bubble_share == pytest.approx(float(Fraction(p - 1, m + p - 1)))


def test_peaks_on_a_straight_chain():
    chain = Chain.straight(4)
    peaks = {kind: simulate(make_schedule(chain, 8, kind), chain).peak_microbatches for kind in SCHEDULE_KINDS}
    assert peaks["simple"] == (8, 8, 8, 8)
    assert peaks["interleaved"] == (4, 3, 2, 1)
    assert peaks["zero_bubble"] == (4, 4, 4, 4)
    assert peaks["forward_only"] == (1, 1, 1, 1)


@pytest.mark.parametrize(("p", "v"), [(2, 2), (2, 3), (3, 2), (4, 2), (4, 3), (8, 2), (8, 4)])
def test_virtual_stages_are_as_good_as_the_known_order(p, v):
    for costs in ((1, 1, 1), (1, 1.5, 0.5), (2, 1, 0)):
        chain = Chain.looped(p, v, *costs)
        for m in (p, 2 * p, 4 * p):
            known = Schedule("interleaved", m, known_interleaved_order(p, m, v))
            check_schedule(known, chain)
            ours = simulate(make_schedule(chain, m, "interleaved"), chain)
            theirs = simulate(known, chain)
            assert ours.makespan <= theirs.makespan + 1e-9
            assert sum(ours.peak_visits) <= sum(theirs.peak_visits)


@pytest.mark.parametrize(("p", "v"), [(2, 2), (3, 2), (4, 2), (4, 4), (8, 2)])
def test_bubble_of_virtual_stages(p, v):
    """Bubble over work is (p - 1) / (v * m), also where the microbatches do not come out in groups of p."""
    for m in (p, p + 1, 2 * p, 2 * p + 1, 4 * p):
        chain = Chain.looped(p, v)
        timeline = simulate(make_schedule(chain, m, "interleaved"), chain)
        work = timeline.busy[0]
        assert (timeline.makespan - work) / work == pytest.approx((p - 1) / (v * m))


ZERO_BUBBLE_COSTS = [(1, 1, 1), (1, 1.2, 0.8), (1, 1, 0.5), (2, 1, 1), (1, 2, 1), (1, 2, 0.5)]


@pytest.mark.parametrize("costs", ZERO_BUBBLE_COSTS)
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_zero_bubble_with_the_memory_of_1f1b_is_zb_h1(p, costs):
    """Qi et al. 2023, table 2: every stage waits (p - 1)(T_F + T_B - T_W) at most; 1F1B: (p - 1)(T_F + T_B + T_W)."""
    chain = Chain.straight(p, *costs)
    forward, backward, weight = costs
    for m in (2 * p, 4 * p):
        for active in (p, None):
            timeline = simulate(make_schedule(chain, m, "zero_bubble", active), chain)
            assert timeline.makespan == pytest.approx(m * sum(costs) + (p - 1) * (forward + backward - weight))
            assert max(timeline.waiting) <= (p - 1) * (forward + backward - weight) + 1e-9
            assert max(timeline.peak_microbatches) <= p


@pytest.mark.parametrize("costs", ZERO_BUBBLE_COSTS)
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_zero_bubble_with_twice_the_memory_is_zb_h2(p, costs):
    """Qi et al. 2023, table 2: a stage waits (p - 1)(T_F + T_B - 2 T_W), with equal costs not at all.

    The whole step has the way to the last stage on top of a stage's work, (p - 1) T_F, at least.
    """
    chain = Chain.straight(p, *costs)
    forward, backward, weight = costs
    for m in (3 * p, 4 * p):
        timeline = simulate(make_schedule(chain, m, "zero_bubble", 2 * p - 1), chain)
        beyond = (p - 1) * max(forward, forward + backward - 2 * weight)
        assert timeline.makespan == pytest.approx(m * sum(costs) + beyond)
        assert max(timeline.peak_microbatches) <= 2 * p - 1
        if costs == (1, 1, 1):
            assert timeline.waiting == (0,) * p


def test_few_active_microbatches_make_a_long_step():
    """What docs/schedules.md says about a limit of 2 on 4 stages."""
    chain = Chain.straight(4)
    short, full = (simulate(make_schedule(chain, 8, "interleaved", active), chain) for active in (2, 4))
    assert 1.5 < short.makespan / full.makespan < 1.6


# ---------------------------------------------------------------- statement 32 of the semantics


LOOPED = Chain.looped(3, 3, 1, 0.7, 1.4)


@pytest.mark.parametrize("chain", [Chain.straight(4), LOOPED, *CHAINS.values()], ids=["straight", "looped", *CHAINS])
@pytest.mark.parametrize("kind", ["interleaved", "zero_bubble"])
def test_c032_interleaved_never_holds_more_than_active_microbatches(chain, kind):
    for active in (1, 2, 3, 6):
        schedule = make_schedule(chain, 9, kind, active)
        for actions in schedule.actions:
            for position in range(len(actions)):
                begun = {action.microbatch for action in actions[: position + 1]}
                going_on = {action.microbatch for action in actions[position:]}
                assert len(begun & going_on) <= active
        assert max(simulate(schedule, chain).peak_microbatches) <= active
        if active <= 3:  # the limit is what holds them back: without it there would be more
            assert max(simulate(schedule, chain).peak_microbatches) == active


@pytest.mark.parametrize("chain", [Chain.straight(4), LOOPED, *CHAINS.values()], ids=["straight", "looped", *CHAINS])
def test_c032_simple_runs_no_backward_before_the_last_forward(chain):
    schedule = make_schedule(chain, 6, "simple", active_microbatches=2)
    for actions in schedule.actions:
        kinds = "".join(action.kind.value for action in actions)
        assert re.fullmatch("F+B+", kinds)


# ---------------------------------------------------------------- properties over random chains

COSTS = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.0, 1.3, 2.0])


@st.composite
def chains(draw):
    """Any chain: branches, skips, stages without visits or with many, visits that nothing waits for, zero costs."""
    num_stages = draw(st.integers(1, 4))
    visits = []
    for index in range(draw(st.integers(0, 8))):
        stage = draw(st.integers(0, num_stages - 1))
        others = [other for other in range(index) if visits[other].stage != stage]
        waits_for = draw(st.lists(st.sampled_from(others), unique=True, max_size=3)) if others else []
        has_backward = draw(st.integers(0, 4)) > 0
        visits.append(Visit(stage, draw(COSTS), draw(COSTS), draw(COSTS), tuple(waits_for), has_backward))
    return Chain(num_stages, tuple(visits))


KINDS = st.sampled_from(SCHEDULE_KINDS)
CAPS = st.sampled_from([None, 1, 2, 3, 5])


@PROPERTIES
@given(chains(), st.integers(1, 6), KINDS, CAPS)
def test_every_schedule_is_valid_and_can_be_written_down(chain, num_microbatches, kind, active):
    schedule = make_schedule(chain, num_microbatches, kind, active)
    check_schedule(schedule, chain, active)
    assert is_valid(schedule, chain, active)
    assert Schedule.from_text(schedule.to_text()) == schedule
    assert make_schedule(chain, num_microbatches, kind, active) == schedule


@PROPERTIES
@given(chains(), st.integers(1, 4), KINDS, CAPS, st.sampled_from([0.0, 0.5]))
def test_the_timeline_keeps_the_rules(chain, num_microbatches, kind, active, delay):
    """No action starts early, and none later than it must: at 0, at the end before it, or when a value comes."""
    schedule = make_schedule(chain, num_microbatches, kind, active)
    timeline = simulate(schedule, chain, delay)
    start = dict(zip(all_actions(schedule), itertools.chain(*timeline.start), strict=True))
    end = dict(zip(all_actions(schedule), itertools.chain(*timeline.end), strict=True))
    for stage, actions in enumerate(schedule.actions):
        for position, action in enumerate(actions):
            pair = (stage, action)
            moments = [0.0]
            if position:
                moments.append(end[stage, actions[position - 1]])
            for other in start:
                if has_to_wait(chain, pair, other):
                    moments.append(end[other] + (delay if other[0] != stage else 0.0))
            assert start[pair] == max(moments)
    assert timeline.makespan == max(end.values(), default=0.0)
    assert sum(timeline.busy) == pytest.approx(sum(end[pair] - start[pair] for pair in start))


@PROPERTIES
@given(chains(), st.integers(1, 6), CAPS)
def test_zero_bubble_is_never_slower_than_interleaved(chain, num_microbatches, active):
    interleaved = simulate(make_schedule(chain, num_microbatches, "interleaved", active), chain)
    split = simulate(make_schedule(chain, num_microbatches, "zero_bubble", active), chain)
    assert split.makespan <= interleaved.makespan * (1 + 1e-9)
    if active is None:
        assert max(split.peak_microbatches) <= max(1, *interleaved.peak_microbatches)


def test_zero_bubble_falls_back_on_the_interleaved_order(monkeypatch):
    """Where no policy of its own is any good, what is left is the interleaved order with its backwards split."""
    monkeypatch.setattr(scheduling, "_zero_bubble", lambda *_: iter(()))
    chain = Chain.straight(3)
    interleaved = make_schedule(chain, 4, "interleaved")
    split = make_schedule(chain, 4, "zero_bubble")
    texts = [[" ".join(schedule.spelled(stage)) for stage in range(3)] for schedule in (interleaved, split)]
    assert texts[1] == [texts[0][0], *(re.sub(r"B(\d)", r"I\1 W\1", text) for text in texts[0][1:])]
    check_schedule(split, chain, 3)
    assert simulate(split, chain).makespan < simulate(interleaved, chain).makespan


def corrupt(schedule, draw):
    """The schedule with one thing changed; the kind of change, and the schedule."""
    stages = [list(actions) for actions in schedule.actions]
    stage = draw(st.sampled_from([stage for stage, actions in enumerate(stages) if actions]))
    actions = stages[stage]
    change = draw(st.sampled_from(["swap", "drop", "repeat", "move", "change", "cross"]))
    position, other = (draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    if change == "swap":
        actions[position], actions[other] = actions[other], actions[position]
    elif change == "drop":
        del actions[position]
    elif change == "repeat":
        actions.insert(other, actions[position])
    elif change == "move":
        actions.insert(other, actions.pop(position))
    elif change == "change":
        actions[position] = replace(actions[position], kind=draw(st.sampled_from(list(ActionKind))))
    else:  # one stage runs the microbatches in another order than the rest
        top = schedule.num_microbatches - 1
        stages[stage] = [replace(action, microbatch=top - action.microbatch) for action in actions]
    return change, replace(schedule, actions=tuple(map(tuple, stages)))


@settings(PROPERTIES, max_examples=600)
@given(chains(), st.integers(1, 4), KINDS, CAPS, st.data())
def test_the_checker_finds_exactly_the_broken_ones(chain, num_microbatches, kind, active, data):
    schedule = make_schedule(chain, num_microbatches, kind, active)
    if not any(schedule.actions):
        return
    change, broken = corrupt(schedule, data.draw)
    if is_valid(broken, chain, active):
        assert change not in ("drop", "repeat")
        check_schedule(broken, chain, active)
    else:
        with pytest.raises(ScheduleError, match="stage"):
            check_schedule(broken, chain, active)


# ---------------------------------------------------------------- what the checker says


def schedule_of(kind, *stages, num_microbatches=2):
    actions = tuple(tuple(map(Action.parse, stage.split())) for stage in stages)
    return Schedule(kind, num_microbatches, actions)


GOOD = ("F0 F1 B0 B1", "F0 B0 F1 B1")


@pytest.mark.parametrize(
    ("kind", "stages", "message"),
    [
        ("interleaved", ("F0 F1 B0", GOOD[1]), "B1 is missing on stage 0: every visit has its backward"),
        ("interleaved", ("F0 B0 B1", GOOD[1]), "F1 is missing on stage 0"),
        ("interleaved", ("F0 F1 B0 I1", GOOD[1]), "W1 is missing on stage 0"),
        ("interleaved", ("F0 F1 B0 W1", GOOD[1]), "I1 is missing on stage 0"),
        ("interleaved", (GOOD[0], "F0 B0 F1 B1 F1"), "F1 on stage 1 is there 2 times"),
        ("interleaved", (GOOD[0], "F0 B0 F1 B1 W1"), "B1 and W1 are both there on stage 1: B is I and W in one"),
        ("interleaved", (GOOD[0], "F0 B0 F1 B1 F2"), "F2 on stage 1 is no part of the step: it has 2 microbatches"),
        ("interleaved", (GOOD[0], "F0 B0 F1 B1 F1.1"), r"F1.1 on stage 1 is no part of the chain.* comes .* 1 times"),
        ("interleaved", (GOOD[0], "B0 F0 F1 B1"), "B0 comes before F0 on stage 1: a backward comes after all forwards"),
        ("zero_bubble", (GOOD[0], "F0 W0 I0 F1 B1"), "W0 comes before I0 on stage 1: a W part comes after its I part"),
        ("simple", GOOD, "B0 comes before F1 on stage 1: a simple schedule runs no backward before the last forward"),
        ("forward_only", GOOD, "B0 on stage 0 is a backward: a forward_only schedule has none"),
        (
            "interleaved",
            ("F0 B0 F1 B1", "F0 F1 B0 B1"),
            "the stages wait for each other: stage 0 is at B0 and waits for B0 of stage 1; stage 1 is at F1 and waits "
            "for F1 of stage 0",
        ),
        ("interleaved", (GOOD[0],), "the schedule has 1 stages, its chain 2"),
    ],
)
def test_messages(kind, stages, message):
    with pytest.raises(ScheduleError, match=message):
        check_schedule(schedule_of(kind, *stages), Chain.straight(2))


def test_message_about_memory():
    schedule = schedule_of("interleaved", *GOOD)
    check_schedule(schedule, Chain.straight(2), active_microbatches=2)
    with pytest.raises(ScheduleError, match=r"at F1 on stage 0 there are 2 live microbatches: .* allows 1"):
        check_schedule(schedule, Chain.straight(2), active_microbatches=1)


def test_messages_about_visits():
    chain = Chain(1, (Visit(0), Visit(0), Visit(0, has_backward=False)))
    check_schedule(schedule_of("interleaved", "F0.0 F0.1 F0.2 B0.1 B0.0", num_microbatches=1), chain)
    for text, message in {
        "F0.1 F0.0 F0.2 B0.1 B0.0": r"F0.1 comes before F0.0 on stage 0: the forwards .* in the order of their visits",
        "F0.0 F0.1 F0.2 B0.0 B0.1": r"B0.0 comes before B0.1 on stage 0: the backwards .* in the opposite order",
        "F0.0 F0.1 B0.1 F0.2 B0.0": r"B0.1 comes before F0.2 on stage 0: a backward comes after all forwards",
        "F0.0 F0.1 F0.2 B0.2 B0.1 B0.0": r"B0.2 on stage 0 is a backward of a visit that has none",
    }.items():
        with pytest.raises(ScheduleError, match=message):
            check_schedule(schedule_of("interleaved", text, num_microbatches=1), chain)


def test_simulate_refuses_what_cannot_run():
    with pytest.raises(ScheduleError, match="stage 0 never gets what B0 waits for"):
        simulate(schedule_of("interleaved", "F0 B0 F1 B1", "F0 F1 B0 B1"), Chain.straight(2))
    with pytest.raises(ScheduleError, match=r"stage 0 runs F0.1, but a microbatch comes to it 1 times"):
        simulate(schedule_of("interleaved", "F0.1", ""), Chain.straight(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain(0, ()), "a chain has 0 stages"),
        (lambda: Chain(2, (Visit(2),)), "on stage 2, is outside the stages 0 to 1"),
        (lambda: Chain(1, (Visit(0, forward=-1),)), "has the forward cost -1: give a finite number, 0 or more"),
        (lambda: Chain(1, (Visit(0, weight=float("nan")),)), "has the weight cost nan"),
        (lambda: Chain(2, (Visit(0, waits_for=(1,)), Visit(1))), "visit 0 .* waits for visit 1: .* earlier ones only"),
        (lambda: Chain(1, (Visit(0), Visit(0, waits_for=(0,)))), "waits for visit 0 on its own stage"),
        (lambda: Chain(2, (Visit(0), Visit(1, waits_for=(0, 0)))), "waits twice for the same visit"),
        (lambda: Action.parse("F"), "'F' is not an action"),
        (lambda: Action.parse("X1"), "'X1' is not an action"),
        (lambda: Schedule.from_text(""), "'' is not the first line of a schedule"),
        (lambda: Schedule.from_text("schedule fast, 1 microbatches, 1 stages\nstage 0: F0"), "no schedule is called"),
        (lambda: Schedule.from_text("schedule simple, 1 microbatches, 2 stages\nstage 0: F0"), "2 stages and has 1"),
        (lambda: Schedule.from_text("schedule simple, 1 microbatches, 1 stages\nstage 1: F0"), "begin with 'stage 0:'"),
        (lambda: make_schedule(Chain.straight(2), 0, "simple"), "num_microbatches is 0"),
        (lambda: make_schedule(Chain.straight(2), 2, "1f1b"), "no schedule is called '1f1b': use one of simple, "),
        (lambda: make_schedule(Chain.straight(2), 2, "interleaved", 0), "active_microbatches is 0: allow 1 or more"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ScheduleError, match=message):
        make()


# ---------------------------------------------------------------- spelling, determinism, speed


def test_spelling():
    assert str(Action(F, 3)) == "F3" and Action.parse("F3") == Action(F, 3, 0)
    assert Action(B, 12, 1).spelled() == "B12.1" and Action.parse("B12.1") == Action(B, 12, 1)
    assert Action(W, 0, 0).spelled() == "W0.0" and Action.parse("W0.0") == Action.parse("W0")
    schedule = schedule_of("zero_bubble", "F0 I0 W0", "", num_microbatches=1)
    assert schedule.to_text() == "schedule zero_bubble, 1 microbatches, 2 stages\nstage 0: F0 I0 W0\nstage 1:\n"
    assert Schedule.from_text(schedule.to_text()) == schedule


def test_splitting_is_left_out_where_it_gains_nothing():
    """The first stage sends no gradients on: an I part with its W part right behind is one B. Nor without weights."""
    chain = Chain(2, (Visit(0), Visit(1, weight=0, waits_for=(0,))))
    first, last = make_schedule(chain, 4, "zero_bubble").actions
    assert Action(B, 3) in first
    assert {action.kind for action in last} == {F, B}


def test_equal_in_every_process():
    code = (
        "from test_schedules import *\n"
        "for kind in SCHEDULE_KINDS:\n"
        "    for chain in (LOOPED, *CHAINS.values()):\n"
        "        print(make_schedule(chain, 7, kind, 4).to_text())\n"
    )
    texts = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
        environ = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        texts.add(done.stdout)
    assert len(texts) == 1 and "zero_bubble" in texts.pop()


def test_floats_do_not_decide_who_comes_first():
    """Three times 0.1 is not 0.3 in floats; costs in tenths must give the order that costs in whole numbers give."""
    tenths, whole = (Chain.looped(4, 2, *(cost * unit for cost in (1, 2, 3))) for unit in (0.1, 1))
    for kind in SCHEDULE_KINDS:
        assert make_schedule(tenths, 12, kind) == make_schedule(whole, 12, kind)


@pytest.mark.parametrize("kind", SCHEDULE_KINDS)
def test_making_a_large_schedule_takes_about_a_second(kind):
    begin = time.process_time()
    make_schedule(Chain.looped(8, 4, 1, 1.1, 0.8), 64, kind, 10)
    assert time.process_time() - begin < 6


# ---------------------------------------------------------------- pictures and the command


def test_grid_draws_every_action_where_it_runs():
    chain = Chain(2, (Visit(0, 1, 2, 1), Visit(1, 2, 1, 1, (0,)), Visit(0, 0, 0, 0, (1,), has_backward=False)))
    schedule = make_schedule(chain, 2, "interleaved")
    assert grid_text(schedule, simulate(schedule, chain)).splitlines() == [
        "time     0                        5                        10",
        "stage 0  F0.0 F1.0 .    .    .    B0.0---------- .    B1.0----------",
        "stage 1  .    F0------- B0------- F1------- B1------- .    .    .",
        "",
        "(2 actions are too short for a column)",
    ]


def test_grid_of_nothing():
    chain = Chain(2, ())
    schedule = make_schedule(chain, 2, "simple")
    assert "stage 1" in grid_text(schedule, simulate(schedule, chain))
    ElementTree.fromstring(grid_svg(schedule, simulate(schedule, chain)))


def test_wide_grid_continues_below():
    chain = Chain.straight(2)
    schedule = make_schedule(chain, 8, "interleaved")
    text = grid_text(schedule, simulate(schedule, chain), width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert text.count("stage 1") == 3


def command(*arguments):
    return CliRunner().invoke(app, ["schedule", *arguments], env={"COLUMNS": "120"})


def test_command_prints_grid_and_figures(tmp_path):
    drawing = tmp_path / "grid.svg"
    result = command("--stages", "4", "--microbatches", "8", "--kind", "zero_bubble", "--text", "--svg", str(drawing))
    assert result.exit_code == 0
    expected = make_schedule(Chain.straight(4), 8, "zero_bubble")
    assert expected.to_text() in result.stdout
    assert result.stdout.splitlines()[1].startswith("stage 0  F0 F1 F2 F3 .")
    assert result.stdout.splitlines()[-1] == "bubble 11.1%, makespan 27, peak live microbatches per stage 4 4 4 4"
    root = ElementTree.parse(drawing).getroot()
    boxes = [group.find("{*}title").text for group in root.iter("{http://www.w3.org/2000/svg}g")]
    assert len(boxes) == sum(map(len, expected.actions))
    assert boxes[0] == "F0: 0 to 1"


def test_command_with_costs_and_virtual_stages():
    result = command(
        *"--stages 2 --microbatches 4 --virtual-stages 2 --active-microbatches 3 --forward-cost 0.5".split(),
        *"--backward-cost 0.75 --weight-cost 0.25 --message-delay 0.125".split(),
    )
    chain = Chain.looped(2, 2, 0.5, 0.75, 0.25)
    timeline = simulate(make_schedule(chain, 4, "interleaved", 3), chain, 0.125)
    assert result.exit_code == 0
    assert f"makespan {timeline.makespan:g}, " in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stages 0 --microbatches 8", "a chain has 0 stages: it needs 1 or more"),
        ("--stages 2 --microbatches 0", "num_microbatches is 0: a step has 1 or more"),
        ("--stages 2 --microbatches 2 --kind fast", "no schedule is called 'fast': use one of simple, interleaved"),
        ("--stages 2 --microbatches 2 --virtual-stages 0", "--virtual-stages is 0"),
        ("--stages 2 --microbatches 2 --active-microbatches 0", "active_microbatches is 0: allow 1 or more"),
        ("--stages 2 --microbatches 2 --weight-cost -1", "has the weight cost -1.0: give a finite number, 0 or more"),
        ("--stages 2 --microbatches 2 --message-delay nan", "--message-delay is nan"),
        ("--stages 2 --microbatches 2 --svg /nowhere/at/all.svg", "cannot write the drawing '/nowhere/at/all.svg'"),
    ],
)
def test_command_refuses(arguments, message):
    result = command(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr


DOCUMENT = ROOT / "docs" / "schedules.md"


def test_the_document_shows_what_the_command_prints():
    examples = re.findall(r"^```\n\$ modelparallel schedule ([^\n]*)\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    assert len(examples) >= 4
    for arguments, expected in examples:
        result = command(*arguments.split())
        assert result.stdout == expected, arguments


def test_the_code_of_the_document_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    exec(code, {})
    assert capsys.readouterr().out.startswith("schedule interleaved, 4 microbatches, 3 stages\n")
