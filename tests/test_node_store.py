"""How launchers of several hosts come together: here threads of one process, by the loopback."""

import contextlib
import socket
import threading
import time
from dataclasses import replace

import pytest

from launched_jobs import job_of, write_script
from modelparallel.errors import LaunchError
from modelparallel.launch import node_lead, node_store
from modelparallel.launch.node_place import NodePlace
from modelparallel.launch.node_run import run_node
from modelparallel.launch.node_store import joined_store

WAIT = 60.0


@pytest.fixture
def place():
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    return NodePlace("options", 2, 2, 0, "127.0.0.1", port, "job")


def until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def on_each(places, action):
    """Run the action for each place at a time; what each returned or raised."""
    results = [None] * len(places)

    def run(number):
        try:
            results[number] = action(places[number])
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    return results


def test_what_one_says_is_read_by_the_others(place):
    with joined_store(place, WAIT, print) as first, joined_store(replace(place, node_rank=1), WAIT, print) as second:
        assert (first.joined.node, second.joined.node) == (0, 1)
        assert (second.joined.own_address, second.joined.first_address) == ("127.0.0.1", "127.0.0.1")
        first.put("plan/1", {"members": [1, 2]})
        until(lambda: second.value("plan/1") is not None)
        assert second.value("plan/1") == {"members": [1, 2]}
        assert first.value("end/1/1") is None
        second.put("end/1/1", "über")
        until(lambda: first.value("end/1/1") == "über")
        assert abs(second.joined.clock_ahead) < 5 and abs(second.now() - first.now()) < 5


def test_a_clock_that_is_ahead_is_noticed(place, monkeypatch):
    with joined_store(place, WAIT, print) as first:
        true_time = time.time
        own = threading.current_thread()

        def shifted():
            return true_time() + (1000.0 if threading.current_thread() is own else 0.0)

        monkeypatch.setattr(time, "time", shifted)
        with joined_store(replace(place, node_rank=1), WAIT, print) as second:
            assert second.joined.clock_ahead == pytest.approx(1000, abs=5)
            assert second.now() == pytest.approx(true_time(), abs=5)
            assert first.joined.clock_ahead == 0.0


def test_a_node_that_is_silent_and_a_node_0_that_has_gone_are_lost(place, monkeypatch):
    monkeypatch.setattr(node_store, "LOST_SECONDS", 2.0)
    monkeypatch.setattr(node_store, "BEAT_SECONDS", 0.1)
    with contextlib.ExitStack() as first_host, contextlib.ExitStack() as others:
        first = first_host.enter_context(joined_store(place, WAIT, print))
        first.follow(1)
        with joined_store(replace(place, node_rank=1), WAIT, print) as second:
            time.sleep(3.0)
            assert not first.is_lost(1) and not second.is_lost(0)
        until(lambda: first.is_lost(1))
        assert first.how_lost(1).startswith("no sign of life for")
        third = others.enter_context(joined_store(replace(place, node_rank=None), WAIT, print))
        assert third.joined.node == 2  # the third that has come
        first_host.close()
        until(lambda: third.is_lost(0))
        assert third.how_lost(0).startswith("its launcher has ended, or the connection was closed")


def test_another_job_is_not_disturbed(place):
    with joined_store(place, WAIT, print):
        with pytest.raises(LaunchError, match=r"is job 'job', and this node is of job 'mine'"):
            joined_store(replace(place, node_rank=1, job_id="mine"), WAIT, print).__enter__()
        with pytest.raises(LaunchError, match=r"node 0 was started for 2:2 nodes, and this node for 3:3"):
            joined_store(replace(place, node_rank=1, least=3, most=3), WAIT, print).__enter__()
        with pytest.raises(
            LaunchError, match=rf"node 0 cannot listen at port {place.port} \(Address already in use\).*--job-id"
        ):
            joined_store(place, WAIT, print).__enter__()
        said: list[str] = []
        with joined_store(replace(place, node_rank=1), WAIT, print):
            with pytest.raises(LaunchError, match=r"^node 1 of job 'job' has come already"):
                joined_store(replace(place, node_rank=1), 1.0, said.append).__enter__()
        assert said == ["node 1 of job 'job' is there already: waiting for the others to lose it"]


def test_a_node_that_is_made_again_joins_those_that_are_made_with_it(place):
    """As pods are: the new node 1 comes while the launchers of the last attempt are still there."""
    again = replace(place, node_rank=1)
    joined, said = [], []

    def join():
        with joined_store(again, WAIT, said.append) as third:
            joined.append(third.joined.node)
            until(lambda: third.value("seen") is not None)

    with joined_store(place, WAIT, print), joined_store(again, WAIT, print):
        thread = threading.Thread(target=join)
        thread.start()
        until(lambda: said)
        assert not joined
    with joined_store(place, WAIT, print) as first_host:
        until(lambda: joined)
        first_host.put("seen", "yes")
        thread.join(WAIT)
    assert joined == [1] and not thread.is_alive()


def test_a_node_0_that_does_not_come_is_named(place):
    with pytest.raises(LaunchError, match=rf"has not reached node 0 at 127.0.0.1:{place.port} within 1 s"):
        joined_store(replace(place, node_rank=1), 1.0, print).__enter__()
    with pytest.raises(LaunchError, match=r"no-such-host.invalid:\d+ within 1 s .*Can the name be resolved"):
        joined_store(replace(place, node_rank=1, host="no-such-host.invalid"), 1.0, print).__enter__()


def test_hosts_that_do_not_come_are_named(place, tmp_path):
    job = job_of(tmp_path, write_script(tmp_path, "raise SystemExit(3)"))
    with pytest.raises(LaunchError, match=r"1 of 2 nodes have come to 127.0.0.1:\d+ within 1 s: .* missing: node 1"):
        run_node(job, place, join_seconds=1.0)
    assert not job.folder.root.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 2}, r"3 processes on 2 nodes \(1 on \S+, 2 on \S+\) do not fit the parameters: .*pipeline"),
        (
            {"parameters": {"pipeline_parallel_degree": 4}},
            r"different --parameters \(pipeline_parallel_degree: 2 and 4\)",
        ),
        ({"parameters": None}, r"were given different --parameters"),
    ],
)
def test_what_does_not_fit_is_one_error_on_all_hosts(place, tmp_path, changes, message):
    script = write_script(tmp_path, "raise SystemExit(3)")
    first = job_of(tmp_path, script, num_processes=1, parameters={"pipeline_parallel_degree": 2}, device="cpu")
    jobs = {0: first, 1: replace(first, **changes)}
    errors = on_each([place, replace(place, node_rank=1)], lambda own: run_node(jobs[own.node_rank], own))
    assert all(isinstance(error, LaunchError) for error in errors), errors
    assert str(errors[0]) == str(errors[1])
    with pytest.raises(LaunchError, match=message):
        raise errors[1]
    assert not first.folder.root.exists()


def test_a_folder_that_cannot_be_made_on_one_host_is_an_error_on_all(place, tmp_path, monkeypatch):
    script = write_script(tmp_path, "raise SystemExit(3)")
    first = job_of(tmp_path, script, num_processes=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    second = replace(first, folder=type(first.folder)(tmp_path / "taken"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    errors = on_each([place, replace(place, node_rank=1)], lambda own: run_node((first, second)[own.node_rank], own))
    assert all("is no folder of a job and holds 'thesis.txt'" in str(error) for error in errors), errors


def test_a_range_of_hosts_takes_the_last_call(place, tmp_path, monkeypatch):
    """The least number is there, and no more come."""
    monkeypatch.setattr(node_lead, "LAST_CALL_SECONDS", 0.5)
    parameters = {"pipeline_parallel_degree": 2}
    job = job_of(tmp_path, write_script(tmp_path, "pass"), num_processes=1, parameters=parameters, device="cpu")
    with pytest.raises(LaunchError, match=r"1 processes or fewer on 1 nodes .* do not fit"):
        run_node(job, replace(place, least=1, most=3), join_seconds=2.0)


def test_one_node_is_a_job_of_this_machine(place, tmp_path, capsys):
    script = write_script(tmp_path, "import os; print(os.environ['MODELPARALLEL_RESTART_COUNT'])")
    job = job_of(tmp_path, script, num_processes=1)
    result = run_node(job, replace(place, least=1, most=1, restart_count=4))
    assert result.exit_code == 0 and "[rank 0] 4" in capsys.readouterr().out


def test_what_needs_other_words_is_said_before_anything_is_started(place, tmp_path):
    job = job_of(tmp_path, write_script(tmp_path, "pass"), backend="mpi")
    with pytest.raises(LaunchError, match=r"--backend mpi --hosts HOST:N"):
        run_node(job, place)
    with pytest.raises(LaunchError, match=r"--nnodes 1:2: a range needs --parameters"):
        run_node(replace(job, backend="elastic"), replace(place, least=1))
