"""From a recorded program to visits, and the comparison of later programs with the plan."""

from __future__ import annotations

from modelparallel.pipeline.schedule.chains import Follower, StepPlan, WayRecorder, build_chain, with_local_waits
from modelparallel.pipeline.schedule.checks import check_schedule
from modelparallel.pipeline.schedule.making import make_schedule


def planned(recorded, num_stages, num_microbatches=3, kind="interleaved"):
    chain, starts, entries = build_chain(recorded, num_stages, {})
    return StepPlan(entries, starts, chain, make_schedule(chain, num_microbatches, kind, None))


STRAIGHT = [("C", 0, "a"), ("M", 0, 1), ("C", 1, "b"), ("C", 1, ""), ("R", 1, -1)]
TIED = [("C", 0, "wte"), ("M", 0, 1), ("C", 1, "block"), ("M", 1, 0), ("C", 0, "head"), ("R", 0, -1)]


def visits(plan):
    return [(visit.stage, visit.waits_for, visit.has_backward) for visit in plan.chain.visits]


def test_straight_program_visits_each_stage_once():
    plan = planned(STRAIGHT, 2)
    assert visits(plan) == [(0, (), True), (1, (0,), True)]
    assert plan.is_sequential and plan.starts == ({}, {})


def test_stage_that_is_come_back_to_is_visited_twice():
    plan = planned(TIED, 2)
    assert visits(plan) == [(0, (), True), (1, (0,), True), (0, (1,), True)]
    assert not plan.is_sequential
    assert plan.starts == ({1: 1}, {})  # on stage 0 the second move begins visit 1


def test_waits_without_work_between_them_are_one_visit():
    recorded = [
        ("C", 0, "encoder"), ("C", 1, "mask"), ("M", 0, 2), ("M", 1, 2), ("C", 2, "decoder"), ("R", 2, -1),
    ]  # fmt: skip
    plan = planned(recorded, 3)
    assert visits(plan) == [(0, (), True), (1, (), True), (2, (0, 1), True)]


def test_a_send_is_work_and_a_value_that_is_read_makes_a_visit_without_backward():
    recorded = [*STRAIGHT, ("V", 1, -1)]
    plan = planned(recorded, 2)
    assert visits(plan) == [(0, (), True), (1, (0,), True), (0, (1,), False)]
    through = [("C", 0, "a"), ("M", 0, 1), ("M", 1, 2), ("M", 2, 1), ("C", 1, "b"), ("R", 1, -1)]
    assert [stage for stage, _, _ in visits(planned(through, 3))] == [0, 1, 2, 1]


def test_a_stage_without_work_has_one_visit():
    plan = planned(STRAIGHT, 3)
    assert visits(plan)[-1] == (2, (), False)
    for kind in ("simple", "interleaved", "zero_bubble", "forward_only"):
        check_schedule(make_schedule(plan.chain, 4, kind, 2), plan.chain)


def test_costs_are_shares_of_the_known_ones():
    chain, _, _ = build_chain(TIED, 2, {"wte": (0.0,) * 3, "block": (0.6, 0.6, 0.3), "head": (0.2, 0.1, 0.2)})
    found = [(visit.forward, visit.backward, visit.weight) for visit in chain.visits]
    assert [tuple(round(cost, 3) for cost in costs) for costs in found] == [
        (0.0, 0.0, 0.0), (0.75, 0.75, 0.375), (0.25, 0.125, 0.25),
    ]  # fmt: skip
    equal, _, _ = build_chain(TIED, 2, {})
    assert len({visit.forward for visit in equal.visits}) == 1


def follow(plan, stage, entries):
    follower = Follower(plan, stage)
    seen = []
    for kind, first, second in entries:
        if kind == "M":
            is_planned = follower.note_move(first, second)
        elif kind == "V":
            is_planned = follower.note_announcement(first, is_always=True)
        elif kind == "A":
            is_planned = follower.note_announcement(first, is_always=False)
        elif kind == "L":
            is_planned = follower.note_local_wait(first, second)
        else:
            follower.note_root(first)
            continue
        seen.append((is_planned, follower.visit, follower.begins_visit))
    follower.finish()
    return seen, follower.has_left


def test_a_program_that_does_the_same_follows():
    plan = planned(TIED, 2)
    points = [entry for entry in TIED if entry[0] != "C"]
    assert follow(plan, 0, points) == ([(True, 0, False), (True, 1, True)], False)
    assert follow(plan, 1, points) == ([(True, 0, False), (True, 0, False)], False)


def test_new_shapes_are_waited_for_and_no_other_way():
    plan = planned(TIED, 2)
    points = [("A", 0, -1), ("M", 0, 1), ("A", 1, -1), ("M", 1, 0), ("R", 0, -1)]
    seen, has_left = follow(plan, 0, points)
    assert [is_planned for is_planned, _, _ in seen] == [False, True, False, True] and not has_left


def test_another_way_a_shorter_and_a_longer_one_leave_the_plan():
    plan = planned(TIED, 2)
    assert follow(plan, 0, [("M", 0, 1), ("M", 0, 1)])[1]
    assert follow(plan, 0, [("M", 0, 1)])[1]
    points = [entry for entry in TIED if entry[0] != "C"]
    assert follow(plan, 0, [*points, ("V", 1, -1)])[1]
    assert follow(plan, 0, [("M", 0, 1), ("M", 1, 0), ("R", 1, -1)])[1]


def test_reads_of_pushed_values_are_told_and_belong_to_one_stage():
    recorder = WayRecorder()
    recorder.note_work(0, "a")
    recorder.note_move(0, 1)
    recorder.note_local_wait(0, 1)
    recorder.note_root(1)
    assert recorder.local_waits() == ((2, 1),)
    assert [entry[0] for entry in recorder.common()] == ["C", "M", "R"]
    merged = with_local_waits(STRAIGHT, {0: [(4, 1)], 1: []})
    assert merged == (*STRAIGHT[:4], ("L", 0, 1), STRAIGHT[4])
    plan = planned(merged, 2)
    assert visits(plan) == [(0, (), True), (1, (0,), True), (0, (1,), False)]
    assert [entry[0] for entry in plan.entries_of(1)] == ["M", "R"]
    assert follow(plan, 0, [("M", 0, 1), ("L", 0, 1), ("R", 1, -1)]) == ([(True, 0, False), (True, 1, True)], False)
    # One that is not read this time, and one that was never read, are no other way.
    assert not follow(plan, 0, [("M", 0, 1), ("R", 1, -1)])[1]
    seen, has_left = follow(planned(STRAIGHT, 2), 0, [("M", 0, 1), ("L", 0, 1), ("R", 1, -1)])
    assert not has_left and seen[1] == (False, 0, False)
