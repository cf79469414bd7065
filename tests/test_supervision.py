"""The supervision of a job goes on whatever happens to the launcher; when that is killed, nothing is left."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launched_jobs import COMMAND, LEAVES_CHILDREN, job_of, processes_with, write_script
from modelparallel.launch import run_job
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.output import Console
from modelparallel.launch.supervision import RankMonitor


class FullDisk(io.StringIO):
    """Takes nothing until it has room."""

    has_room = False

    def write(self, text):
        if not self.has_room:
            raise OSError(28, "No space left on device")
        return super().write(text)


def console_on(tmp_path, stream):
    folder = JobFolder(tmp_path / "job")
    with folder.held():
        folder.prepare(tmp_path, {})
    return Console(stream, folder), folder


def test_lines_that_an_encoding_cannot_show_are_escaped_and_later_ones_come(tmp_path):
    shown = io.BytesIO()
    console, folder = console_on(tmp_path, io.TextIOWrapper(shown, encoding="ascii"))
    console.write_lines("rank 0", ["naïve ✓"])
    console.say("café")
    console.write_lines("rank 1", ["plain"])
    console.flush()
    assert shown.getvalue().decode() == "[rank 0] na\\xefve \\u2713\n[launcher] caf\\xe9\n[rank 1] plain\n"
    assert folder.launcher_log.read_text(encoding="utf-8") == "café\n"
    console.close()


def test_a_disk_that_was_full_shows_later_lines_and_says_how_many_are_missing(tmp_path):
    disk = FullDisk()
    console, folder = console_on(tmp_path, disk)
    console.write_lines("rank 0", ["one", "two"])
    console.say("three")
    disk.has_room = True
    console.write_lines("rank 0", ["four"])
    assert disk.getvalue() == "[launcher] 3 lines could not be shown; the logs have them\n[rank 0] four\n"
    assert folder.launcher_log.read_text() == "three\n"
    console.close()


WAITING = """
    import time
    print("started", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("output", ["/dev/full", "a closed pipe", "no descriptor"])
def test_timeout_and_exit_code_hold_without_standard_output(tmp_path, output):
    script = write_script(tmp_path, WAITING)
    arguments = ["run", "--nproc", "2", "--device", "cpu", "--timeout", "20", "--job-dir", tmp_path / "job", script]
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = {**os.environ, "MODELPARALLEL_DEVICE": "cpu"}
    if output == "/dev/full":
        with open("/dev/full", "w") as full:
            code = subprocess.run(command, stdout=full, stderr=full, env=environment, timeout=300).returncode
    elif output == "a closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
        code = subprocess.run(command, stdout=writing, stderr=writing, env=environment, timeout=300).returncode
        os.close(writing)
    else:
        code = subprocess.run(
            ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], env=environment, timeout=300
        ).returncode
    assert code == 124
    folder = JobFolder(tmp_path / "job")
    assert all("started" in folder.rank_log(rank).read_text() for rank in range(2))
    assert "longer than its timeout" in folder.failure_file.read_text()
    assert processes_with(str(folder.description)) == []


@pytest.mark.slow
def test_timeout_holds_with_too_many_open_files(tmp_path):
    script = write_script(tmp_path, WAITING)
    taken = []

    class Greedy(io.StringIO):
        def write(self, text):
            if "started" in text and not taken:
                limits = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 512), limits[1]))
                taken.append(limits)
                try:
                    while True:
                        taken.append(os.open(os.devnull, os.O_RDONLY))
                except OSError:
                    pass
            return super().write(text)

    try:
        result = run_job(job_of(tmp_path, script, timeout=2.0), Greedy())
    finally:
        for descriptor in taken[1:]:
            os.close(descriptor)
        if taken:
            resource.setrlimit(resource.RLIMIT_NOFILE, taken[0])
    assert len(taken) > 10
    assert result.exit_code == 124
    assert result.folder.failure_file.exists()
    assert processes_with(str(result.folder.description)) == []


ABORTS_WHEN_DONE = """
    import atexit, os, pathlib, signal, sys, time
    rank = int(os.environ["RANK"])
    status = pathlib.Path(os.environ["MODELPARALLEL_JOB"]).parent

    def end():
        while len(list(status.glob("rank_*.finished.json"))) < 2:
            time.sleep(0.02)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGABRT)
        time.sleep(1.0)

    atexit.register(end)
"""


def test_rank_that_ends_badly_when_all_have_finished_counts_as_finished(tmp_path):
    output = io.StringIO()
    result = run_job(job_of(tmp_path, write_script(tmp_path, ABORTS_WHEN_DONE)), output)
    assert result.exit_code == 0, result.message
    assert "warning: rank 1 was ended by SIGABRT after its script had finished" in output.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["elastic", "mpi"])
def test_nothing_is_left_when_the_launcher_is_killed_at_any_moment(tmp_path, backend):
    script = write_script(tmp_path, LEAVES_CHILDREN)
    draw = random.Random(5)
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import launched_jobs
        from modelparallel.launch import elastic_backend, run_job  # what takes time to be imported
        print("go", flush=True)
        script = Path(sys.argv[2])
        run_job(launched_jobs.job_of(Path(sys.argv[3]), script, backend=sys.argv[4], num_processes=4))
    """
    for number in range(10):
        place = tmp_path / str(number)
        place.mkdir()
        arguments = [str(Path(__file__).parent), str(script), str(place), backend]
        launcher = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, text=True
        )
        try:
            assert launcher.stdout.readline() == "go\n"
            time.sleep(draw.uniform(0.0, 1.5))
            launcher.send_signal(signal.SIGKILL)
            launcher.wait()
            deadline = time.monotonic() + 60
            quiet = 0
            while quiet < 20 and time.monotonic() < deadline:
                quiet = 0 if processes_with(str(place / "job" / "status")) else quiet + 1
                time.sleep(0.1)
            assert quiet == 20, f"start {number}"
        finally:
            for pid in processes_with(str(place / "job")):
                os.kill(pid, signal.SIGKILL)
            launcher.kill()
            launcher.wait()
            launcher.stdout.close()


def test_of_many_ranks_on_several_hosts_some_are_shown(tmp_path):
    """With the host in front; the end of another one when it is asked for. What fails elsewhere ends these, too."""
    output, folder = io.StringIO(), JobFolder(tmp_path / "job", 1)
    with folder.held():
        folder.prepare(tmp_path, {})
        monitor = RankMonitor()
        monitor.attach(folder, output, None)
        looks = []
        monitor.start(range(8, 10), host="node-b", shown=(8,), look=lambda: bool(looks.append(1)))
        folder.rank_log(8).write_text("shown\n")
        folder.rank_log(9).write_text("".join(f"line {number}\n" for number in range(20)))
        while not looks:
            time.sleep(0.01)
        monitor.finish()
        monitor.show_end(9, 2)
        monitor.detach()
    assert output.getvalue() == "[node-b rank 8] shown\n[node-b rank 9] line 18\n[node-b rank 9] line 19\n"
    assert folder.rank_log(9) == tmp_path / "job" / "logs" / "node_1" / "rank_9.log"


def test_processes_are_ended_when_the_attempt_has_failed_elsewhere(tmp_path):
    folder, failed = JobFolder(tmp_path / "job", 1), []
    with folder.held():
        folder.prepare(tmp_path, {})
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        folder.started_file(4).write_text(json.dumps({"pid": process.pid}))
        # A process of another host is not this one, whatever has its number here.
        folder.started_file(5).write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere"}))
        monitor = RankMonitor()
        monitor.attach(folder, io.StringIO(), None)
        monitor.start(range(4, 6), look=lambda: bool(failed))
        while not monitor.has_processes:
            time.sleep(0.01)
        assert process.poll() is None and set(monitor._alive) == {4}
        failed.append(1)
        assert process.wait(60) == -signal.SIGTERM
        monitor.finish()
        monitor.detach()
    assert 5 not in monitor.deaths
