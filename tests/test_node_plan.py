"""What node 0 decides for all hosts: who takes part, and which failure was first over all of them."""

import json
import signal
from pathlib import Path

import pytest

from modelparallel.config.reading import validate_parameters
from modelparallel.errors import LaunchError
from modelparallel.launch.attempts import Attempt
from modelparallel.launch.failures import Candidate, RankFailure
from modelparallel.launch.node_plan import (
    MAX_DETAIL_BYTES,
    AttemptVerdict,
    End,
    Loss,
    Member,
    Offer,
    Outcome,
    Plan,
    check_agreement,
    choose_members,
    outcome_of,
    shortened,
    unique_names,
)

DDP_2 = {"pipeline_parallel_degree": 2, "ddp": True}


def config_of(parameters):
    return validate_parameters(parameters, num_processes=None)


def offers_of(*sizes):
    return [Offer(node, f"host-{node}", size) for node, size in enumerate(sizes)]


def sizes(*offered, parameters=None, least=None, may_shrink=False):
    config = None if parameters is None else config_of(parameters)
    least = len(offered) if least is None else least
    members = choose_members(offers_of(*offered), least, len(offered), config, may_shrink=may_shrink)
    return [(member.node, member.num_processes) for member in members]


def test_hosts_take_part_with_all_that_they_bring():
    assert sizes(1, 2, parameters={"pipeline_parallel_degree": 3}) == [(0, 1), (1, 2)]
    assert sizes(8, 8, parameters=DDP_2) == [(0, 8), (1, 8)]
    assert sizes(3, 5) == [(0, 3), (1, 5)]  # the script's own parameters decide


def test_a_sum_that_does_not_fit_is_an_error_that_names_hosts_and_degrees():
    with pytest.raises(LaunchError, match=r"3 processes on 2 nodes \(1 on host-0, 2 on host-1\) do not fit.*pipeline"):
        sizes(1, 2, parameters={"pipeline_parallel_degree": 2, "ddp": True})
    with pytest.raises(LaunchError, match=r"2 of at least 3 nodes are there"):
        sizes(1, 1, least=3, may_shrink=True)


def test_of_a_range_the_most_processes_that_fit_take_part():
    one_model = {"pipeline_parallel_degree": 2}
    assert sizes(1, 1, 1, parameters=one_model, least=2, may_shrink=True) == [(0, 1), (1, 1)]
    assert sizes(8, 7, parameters={"tensor_parallel_degree": 4, "ddp": True}, least=1, may_shrink=True) == [
        (0, 8),
        (1, 4),
    ]
    assert sizes(2, parameters=one_model, least=1, may_shrink=True) == [(0, 2)]
    with pytest.raises(LaunchError, match=r"1 processes or fewer on 1 nodes"):
        sizes(1, parameters=one_model, least=1, may_shrink=True)


def test_hosts_must_have_been_told_the_same():
    first = Offer(0, "a", 1, parameters=DDP_2, versions={"torch": "2.13.0"})
    assert check_agreement([first, Offer(1, "b", 2, parameters=dict(DDP_2), versions={"torch": "2.13.0"})]) == []
    with pytest.raises(
        LaunchError, match=r"a \(node 0\) and b \(node 1\) .*different --parameters \(pipeline.*2 and 4"
    ):
        check_agreement([first, Offer(1, "b", 1, parameters={**DDP_2, "pipeline_parallel_degree": 4})])
    with pytest.raises(LaunchError, match="different --parameters"):
        check_agreement([first, Offer(1, "b", 1)])
    warnings = check_agreement([first, Offer(1, "b", 1, parameters=DDP_2, versions={"torch": "2.12.0"})])
    assert warnings == ["warning: b has torch 2.12.0, a has 2.13.0"]


def test_equal_names_of_hosts_are_told_apart():
    assert unique_names(["a", "b"]) == ("a", "b")
    assert unique_names(["pod", "x", "pod"]) == ("pod-1", "x", "pod-2")


def end_of(node, rank, time, summary, *, follows=False, exit_code=1):
    failure = RankFailure(rank, exit_code, summary, "Traceback ...", Path(f"/logs/rank_{rank}.log"), f"host-{node}")
    return End(node, 1, candidate=Candidate(follows, time, failure))


def test_the_first_failure_over_all_hosts_is_the_earliest_that_does_not_follow_from_another():
    complaint = end_of(0, 0, 9.9, "CommunicationError: the connection is gone", follows=True)
    cause = end_of(1, 3, 10.0, "ValueError: deliberate")
    later = end_of(2, 4, 10.5, "RuntimeError: later", exit_code=5)
    outcome = outcome_of([complaint, later, cause], [])
    assert (outcome.exit_code, outcome.failure.global_rank) == (1, 3)
    assert outcome.reason == "rank 3 on host-1: ValueError: deliberate"
    assert outcome_of([complaint, later], []).exit_code == 5
    # if all complain, the first of them is shown
    assert outcome_of([complaint, end_of(1, 3, 9.5, "closed by peer", follows=True)], []).failure.global_rank == 3


def test_a_killed_process_has_the_exit_code_of_a_shell():
    killed = end_of(1, 2, 3.0, "it was killed by SIGKILL", exit_code=-signal.SIGKILL)
    assert outcome_of([End(0, 0), killed], []).exit_code == 137


def test_a_host_that_was_lost_comes_before_what_its_peers_report_later():
    loss = Loss(Member(1, "host-1", 2), 100.0, "no sign of life for 61 s")
    timeout = end_of(0, 0, 130.0, "WaitTimeoutError: no answer")
    outcome = outcome_of([timeout], [loss])
    assert outcome.reason == "host host-1 (node 1) was lost: no sign of life for 61 s"
    assert (outcome.exit_code, outcome.failure) == (75, None)
    earlier = end_of(0, 0, 90.0, "ValueError: deliberate")
    assert outcome_of([earlier], [loss]).failure.global_rank == 0


def test_a_stop_counts_unless_something_failed_before():
    stop = End(1, 143, 50.0, stop="job x was stopped on host-1 by SIGTERM after 3.0 s")
    assert outcome_of([End(0, 1), stop], []) == Outcome(143, stop.stop, is_stopped=True)
    assert not outcome_of([end_of(0, 0, 49.0, "ValueError: deliberate"), stop], []).is_stopped
    assert outcome_of([End(0, 0), End(1, 0)], []) == Outcome(0)
    assert outcome_of([End(0, 0), End(1, 4, message="see the log")], []) == Outcome(4, "see the log")


def test_what_hosts_say_survives_the_store():
    end = end_of(1, 3, 10.0, "ValueError: déjà vu")
    assert End.from_json(json.loads(json.dumps(end.to_json()))) == end
    assert End.from_json(json.loads(json.dumps(End(0, 0).to_json()))) == End(0, 0)
    plan = Plan((Member(0, "a", 2), Member(3, "b", 1)), "10.0.0.1")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert (plan.sizes, plan.place_of(3), plan.place_of(1)) == ((2, 1), 1, None)
    outcome = outcome_of([end], [])
    verdict = AttemptVerdict(outcome, Attempt(1, 3, 1.0, 2.0, 1, 3, outcome.reason), "text", has_restart=True)
    assert AttemptVerdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    good = AttemptVerdict(Outcome(0), Attempt(1, 3, 1.0, 2.0, 0), "")
    assert AttemptVerdict.from_json(json.loads(json.dumps(good.to_json()))) == good


def test_of_a_long_traceback_the_end_is_passed_on():
    detail = "line\n" * 10_000 + "ValueError: ends here ü"
    short = shortened(detail)
    assert len(short.encode()) < MAX_DETAIL_BYTES + 100 and short.endswith("ValueError: ends here ü")
    assert short.startswith("(the beginning is in the log)")
    assert shortened("short") == "short"
    record = End(0, 1, candidate=Candidate(False, 1.0, RankFailure(0, 1, "s", detail, Path("/l")))).to_json()
    assert record["candidate"]["failure"]["detail"] == short
