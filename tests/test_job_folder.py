"""Job folders: which are taken, what goes when one is used again, who can read them; names of jobs and channels."""

import os
import shutil
import socket
import stat
import tempfile

import pytest
from typer.testing import CliRunner

from launched_jobs import job_of, write_script
from modelparallel.errors import LaunchError
from modelparallel.launch import PyTorch, estimator, run_job
from modelparallel.launch.attempts import Attempt, write_attempts
from modelparallel.launch.channels import channel_options, input_channels, local_path
from modelparallel.launch.command_line import app
from modelparallel.launch.folder import JobFolder, checked_job_name, new_job_name
from modelparallel.launch.folder_mark import MARK
from modelparallel.launch.rendezvous_port import reserved_port
from modelparallel.training.event_files import EventFile

# What a user may have under names that jobs use, too.
DATA = (
    "logs/run.log",
    "logs/rank_0.log",
    "status/a",
    "events/rank0.jsonl",
    "attempts/1/x",
    "input/b",
    "output/failure",
)


def fill(folder, names=DATA):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the user's {name}")


def contents(folder):
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def prepared(root, source, channels=None, checkpoints=None):
    folder = JobFolder(root)
    with folder.held():
        folder.prepare(source, channels or {}, checkpoints)
    return folder


def make_all(folder):
    """Every file that a job writes."""
    for rank in (0, 11):
        for path in (
            folder.rank_log(rank),
            folder.started_file(rank),
            folder.error_file(rank),
            folder.event_file(rank),
        ):
            path.write_text("{}")
            path.with_suffix(".partial").write_text("{}") if path.parent != folder.logs else None
        folder.finished_file(rank).write_text("{}")
        (folder.status / f"rank_{rank}.elastic.json").write_text("{}")
        event_file = EventFile.from_environment(rank, {"SMP_EVENT_DIR": str(folder.events)})
        event_file.path.write_text("{}")
        event_file.memory_path.write_text("{}")
    for path in (folder.launcher_log, folder.mpirun_log, folder.logs / "elastic.log", folder.description):
        path.write_text("{}")
    for name in ("hyperparameters", "resourceconfig", "inputdataconfig"):
        folder.write_input_config(name, {})


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = write_script(tmp_path, "open('ran', 'w')")
    fill(tmp_path)
    before = contents(tmp_path)
    for job_dir in (".", str(tmp_path), ""):
        result = CliRunner().invoke(app, ["run", "--nproc", "1", "--job-dir", job_dir, str(script)])
        assert result.exit_code == 2
        text = " ".join(result.stderr.split())
        assert "is no folder of a job and holds 'attempts', 'events', 'input', 'logs' and 3 more. It has no" in text
        assert "if it is of a job, then of a version that made no such file" in text and "Name a folder that" in text
    monkeypatch.setattr(estimator, "resolve_device", lambda asked: ("cuda", 8))
    with pytest.raises(LaunchError, match="nothing in it was touched"):
        PyTorch("train.py", source_dir=tmp_path, job_dir=tmp_path).fit()
    assert contents(tmp_path) == before and not (tmp_path / MARK).exists()
    # One file is enough, also a hidden one, and also the data lying beside a mark that says nothing.
    for name, text in ((".hidden", ""), (MARK, ""), (MARK, "[" * 100_000), (MARK, '{"kind": 1}'), (MARK, '"x"')):
        folder = tmp_path / f"one{len(text)}{name}"
        fill(folder, ["precious"] if name == MARK else [])
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        before = contents(folder)
        with pytest.raises(LaunchError, match="nothing in it was touched"):
            prepared(folder, tmp_path)
        assert contents(folder) == before
    (tmp_path / "file").write_text("")
    for path in ("file", "file/job"):
        with pytest.raises(LaunchError, match="cannot be made a job folder"):
            prepared(tmp_path / path, tmp_path)


def test_a_mark_counts_for_its_own_folder_only(tmp_path):
    folder = prepared(tmp_path / "job", tmp_path)
    make_all(folder)
    shutil.copytree(folder.root, tmp_path / "copied", symlinks=True)
    fill(tmp_path / "data")
    shutil.copy2(folder.root / MARK, tmp_path / "data")
    fill(tmp_path / "linked")
    (tmp_path / "linked" / MARK).symlink_to(folder.root / MARK)
    fill(tmp_path / "hard")
    os.link(folder.root / MARK, tmp_path / "hard" / MARK)
    for name in ("copied", "data", "linked", "hard"):
        before = contents(tmp_path / name)
        with pytest.raises(LaunchError, match=r"mark of another job folder|cannot be made a job folder"):
            prepared(tmp_path / name, tmp_path)
        assert contents(tmp_path / name) == before
    folder.root.rename(tmp_path / "renamed")
    prepared(tmp_path / "renamed", tmp_path)
    assert contents(tmp_path / "renamed").keys() == {MARK, ".modelparallel-links", "code"}


@pytest.mark.parametrize("restarts", [0, 2])
def test_what_no_job_wrote_stays_when_a_folder_is_used_again(tmp_path, restarts):
    source, train, one_file = tmp_path / "source", tmp_path / "train", tmp_path / "one.csv"
    for directory in (source, train):
        fill(directory, ["precious"])
    one_file.write_text("precious")
    channels = {"train": train, "test": one_file, "other": train}
    folder = prepared(tmp_path / "job", source, channels)
    make_all(folder)
    for number in range(1, restarts + 1):
        folder.put_aside(number)
        write_attempts(folder, [Attempt(number, 2, 1.0, 1.0, 1)])
        assert folder.attempt(number).event_file(11).exists() and folder.attempt(number).description.exists()
        assert folder.launcher_log.exists() and not folder.rank_log(0).exists()
        make_all(folder)
    folder.failure_file.write_text("why")
    mine = (
        "notes", "logs/notes", "logs/tensorboard/rank_0.log", "logs/rank_0.log.bak", "status/job.json.bak",
        "events/x/y",         "attempts/notes", "attempts/1/notes", "attempts/1/logs/notes", "attempts/7/x",
        "attempts/x/logs/rank_0.log",
        "input/notes", "input/config/mine.json", "input/data/mine", "input/data/test/extra", "model/weights",
        "output/data/x", "output/notes", "checkpoints/step1",
    )  # fmt: skip
    fill(folder.root, mine)
    mine_too = folder.root / "input" / "data" / "my-link"
    mine_too.symlink_to(train)
    (folder.root / "input" / "data" / "other").unlink()  # the user's own link under the name of an earlier one
    (folder.root / "input" / "data" / "other").symlink_to(one_file)
    prepared(folder.root, source)
    after = contents(folder.root)
    assert after.pop("input/data/my-link") == str(train) and after.pop("input/data/other") == str(one_file)
    assert after.pop("code") == str(source)
    assert after.pop(MARK) and after.pop(".modelparallel-links")
    assert after == {name: f"the user's {name}" for name in mine}
    assert (train / "precious").exists() and one_file.read_text() == "precious"
    # The next job of it works, restarts included, and one that needs the name of what the user put there says so.
    folder = prepared(folder.root, source, {"train": train})
    make_all(folder)
    folder.put_aside(1)
    assert folder.attempt(1).rank_log(0).exists()
    with pytest.raises(LaunchError, match="my-link exists and is not a link of an earlier job"):
        prepared(folder.root, source, {"my-link": train})


def test_checkpoints_of_an_earlier_job_stay_where_they_are(tmp_path):
    for name in ("first", "second"):
        fill(tmp_path / name, ["step1"])
    folder = prepared(tmp_path / "job", tmp_path, checkpoints=tmp_path / "first")
    prepared(folder.root, tmp_path)
    assert os.readlink(folder.checkpoints) == str(tmp_path / "first")
    prepared(folder.root, tmp_path, checkpoints=tmp_path / "second")
    assert os.readlink(folder.checkpoints) == str(tmp_path / "second")
    folder.checkpoints.unlink()
    folder.checkpoints.symlink_to(tmp_path / "first")  # by the user
    with pytest.raises(LaunchError, match="checkpoints exists and is not a link of an earlier job"):
        prepared(folder.root, tmp_path, checkpoints=tmp_path / "second")
    assert (tmp_path / "first" / "step1").exists() and (tmp_path / "second" / "step1").exists()


@pytest.mark.parametrize(
    "name", ["logs", "status", "events", "attempts", "input", "input/config", "input/data", "output"]
)
def test_links_in_a_job_folder_are_not_followed(tmp_path, name):
    fill(
        tmp_path / "data", [*DATA, "rank_0.log", "job.json", "rank0.jsonl", "1/logs/rank_0.log", "failure", "config/x"]
    )
    before = contents(tmp_path / "data")
    folder = prepared(tmp_path / "job", tmp_path)
    shutil.rmtree(folder.root / name, ignore_errors=True)
    (folder.root / name).symlink_to(tmp_path / "data")
    with pytest.raises(LaunchError, match=f"{name} is a link: remove it"):
        prepared(folder.root, tmp_path)
    (folder.root / name).unlink()
    prepared(folder.root, tmp_path)
    folder.rank_log(3).symlink_to(tmp_path / "data" / "failure")
    with pytest.raises(LaunchError, match=r"rank_3\.log is no file of a job"):
        prepared(folder.root, tmp_path)
    assert contents(tmp_path / "data") == before


def test_others_cannot_read_what_a_job_wrote(tmp_path):
    """With a restart, so that what is put aside is looked at, too; the second job clears all that the first left."""
    script = write_script(tmp_path, "import os, sys; print('secret'); sys.exit('--fail' in sys.argv)")
    (tmp_path / "job").mkdir(mode=0o755)
    mask = os.umask(0)
    try:
        arguments = {"hyperparameters": {"password": "x"}, "max_restarts": 1}
        result = run_job(job_of(tmp_path, script, arguments=("--fail",), **arguments))
        assert len(result.attempts) == 2
        folder = result.folder
        private = [folder.root, folder.input_config, folder.logs, folder.status, folder.events, folder.attempts]
        assert not [path for path in private if stat.S_IMODE(path.stat().st_mode) != 0o700]
        private = [*folder.logs.iterdir(), *folder.attempt(1).logs.iterdir(), *folder.input_config.iterdir()]
        private += [folder.description, folder.failure_file, folder.attempts_file, folder.root / MARK]
        assert {path.name for path in private} >= {"rank_1.log", "launcher.log", "elastic.log", "hyperparameters.json"}
        assert not [path for path in private if stat.S_IMODE(path.stat().st_mode) != 0o600]
        assert run_job(job_of(tmp_path, script)).exit_code == 0
    finally:
        os.umask(mask)
    assert not folder.attempts.exists() and not folder.failure_file.exists()
    assert {path.name for path in folder.status.iterdir() if path.suffix == ".json"} == {
        "job.json", *(f"rank_{rank}.{what}.json" for rank in (0, 1) for what in ("started", "finished")),
    }  # fmt: skip


def test_names_of_jobs_and_channels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    wrong = ["..", ".", "", "a/b", "../x", "/etc", "a b", "a\n", "a\0", "\x1b[2J", "é", "x" * 300, 3, None]
    for name in wrong:
        with pytest.raises(LaunchError, match="job name"):
            checked_job_name(name)
        if name is not None:
            with pytest.raises(LaunchError, match="job name"):
                PyTorch("train.py", source_dir=tmp_path).fit(job_name=name)
        with pytest.raises(LaunchError, match="channel name"):
            input_channels({name: tmp_path})
        with pytest.raises(LaunchError, match="channel name"):
            prepared(tmp_path / "job", tmp_path, {name: tmp_path})
    assert sorted(os.listdir(tmp_path)) == ["job", "train.py"]
    with pytest.raises(LaunchError, match="SM_CHANNEL_TRAIN"):
        input_channels({"train": tmp_path, "Train": tmp_path})
    with pytest.raises(LaunchError, match="'a' is given twice"):
        channel_options(["a=b", "a=c"])
    for location in ("", "a\0b", "http://[x"):
        with pytest.raises(LaunchError, match="no path"):
            local_path(location, "channel 'x'")
    assert checked_job_name("a.b-c_1") == "a.b-c_1"
    assert input_channels({"a..b": tmp_path}) == {"a..b": tmp_path}
    assert checked_job_name(new_job_name("../" * 200 + "x" * 400))


def test_the_lock_of_a_port_is_not_opened_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with reserved_port(0):
        (lock,) = tmp_path.iterdir()
    assert not list(tmp_path.iterdir())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock.symlink_to(victim)
    with reserved_port(0) as port:
        assert port > 0
    assert victim.read_text() == "precious"
    lock.unlink()
    lock.symlink_to(tmp_path / "new")
    with reserved_port(0):
        assert not (tmp_path / "new").exists()
    lock.unlink()
    os.mkfifo(lock)
    with reserved_port(0) as port:
        assert port > 0


def test_the_lock_of_a_port_goes_with_its_job_and_takes_no_other_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        wanted = probe.getsockname()[1]
    with reserved_port(wanted) as port:
        assert port == wanted
        with reserved_port(wanted) as other:  # of another job, whose end leaves the lock of the first
            assert other != wanted
        (lock,) = tmp_path.iterdir()
        lock.unlink()  # by a cleaner of temporary files; then there is another
        with reserved_port(wanted) as third:
            assert third == wanted
            lock.unlink()
            lock.touch(mode=0o600)
        assert lock.exists()  # it was not the one that the third job had
    assert lock.exists()
