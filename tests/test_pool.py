"""The pool itself: values, failures, deaths and hangs."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import pool
from pool import RankError, RankFailure, RankTimeout, run_ranks
from rank_tests import RankTests


def sum_over_ranks(values, *, factor):
    tensor = values * factor * (dist.get_rank() + 1)
    dist.all_reduce(tensor)
    return {"sum": tensor, "rank": int(os.environ["RANK"]), "half": tensor.to(torch.bfloat16).requires_grad_()}


def test_results_come_back_in_rank_order_and_tensors_by_value():
    results = run_ranks(sum_over_ranks, 3, torch.arange(4.0), factor=2)
    assert [result["rank"] for result in results] == [0, 1, 2]
    for result in results:
        torch.testing.assert_close(result["sum"], torch.arange(4.0) * 12)
        assert result["half"].dtype == torch.bfloat16 and result["half"].requires_grad


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("the reason")
    dist.barrier()


def test_the_first_failing_rank_is_reported_and_the_others_do_not_hang():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2 failed: ValueError: the reason") as caught:
        run_ranks(fail_on, 2, 1, grace=0.5)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "in fail_on" in str(caught.value) and caught.value.global_rank == 1
    assert time.monotonic() - started < 20


def die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def test_a_killed_rank_is_reported_with_its_exit_code():
    with pytest.raises(RankError, match="rank 0 of 2 failed: process ended without a result, exit code -9"):
        run_ranks(die_on, 2, 0)
    results = run_ranks(die_on, 2, 0, return_failures=True)
    assert isinstance(results[0], RankFailure) and results[1] == "alive"


def wait_for_nobody():
    if dist.get_rank() == 1:
        time.sleep(60)


def test_a_hang_is_reported_with_the_stack_of_the_waiting_rank():
    with pytest.raises(RankTimeout, match=r"rank\(s\) 1 of 2 did not end within 2 s") as caught:
        run_ranks(wait_for_nobody, 2, timeout=2)
    assert "in wait_for_nobody" in str(caught.value)


def environment():
    return os.environ["WORLD_SIZE"], os.environ["EXTRA"], os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def test_environment_of_a_rank():
    assert run_ranks(environment, 1, environ={"EXTRA": "x"}) == [("1", "x", os.environ["OMP_NUM_THREADS"], 1)]


def talk():
    print("a line from the rank")


def test_what_ranks_print_reaches_the_test_output(capsys):
    run_ranks(talk, 2)
    out = capsys.readouterr().out
    assert "[rank 0] a line from the rank" in out and "[rank 1] a line from the rank" in out


def test_torchvision_and_transformers_can_be_imported():
    pytest.importorskip("torchvision")
    transformers = pytest.importorskip("transformers")
    assert transformers.GPT2LMHeadModel is not None
    pool.declare_torchvision_operators()  # a second time is harmless


def test_a_body_that_did_not_run_is_a_failure():
    ranks = RankTests(2, {})
    ranks._reports = [{"ran": ""}, {"ran": ""}]
    ranks.verify("ran")
    with pytest.raises(pytest.fail.Exception, match="--- rank 1 ---\nmissing did not run here"):
        ranks.verify("missing")
