"""`modelparallel node`: what a node does with the description of a submitted job, on whatever engine."""

import io
import json
import os
import re
import signal
import socket
import textwrap
import threading
import zipfile

import fsspec
import pytest
from typer.testing import CliRunner

from modelparallel.errors import LaunchError
from modelparallel.launch import node_command, node_preparation, node_requirements
from modelparallel.launch.clusters.description import (
    ClusterJob,
    DataChannel,
    node_description,
    read_node_description,
)
from modelparallel.launch.clusters.job_end import JobEnd, read_job_end, write_job_end
from modelparallel.launch.clusters.packing import copy_code, pack_code
from modelparallel.launch.clusters.secrets import write_secrets
from modelparallel.launch.clusters.transfers import fetch
from modelparallel.launch.command_line import app
from modelparallel.launch.node_command import _SubmittedNode, run_description
from modelparallel.launch.node_outputs import CheckpointKeeper
from modelparallel.launch.node_place import NodePlace
from modelparallel.launch.node_scratch import held_scratch

PRINT = """
    import json, os, sys
    from pathlib import Path
    seen = {name: value for name, value in os.environ.items()}
    model = Path(os.environ["SM_MODEL_DIR"])
    seen = {"env": seen, "args": sys.argv[1:], "cwd": os.getcwd()}
    (model / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(seen))
    print("trained")
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """The processes of these jobs do not import torch; what the node command sets in this process goes again."""
    environ = dict(os.environ)
    for name in environ:
        if name.startswith(("SLURM_", "PET_", "SM_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODELPARALLEL_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(node_preparation, "resolve_device", lambda asked: ("cuda", 0))
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()
    for name in set(os.environ) - set(environ):
        del os.environ[name]


@pytest.fixture
def submitted(tmp_path):
    """Makes what a cluster with a shared folder makes of a job, and gives the path of the description."""

    def submit(script=PRINT, *, code="copy", folder="", **settings):
        source = tmp_path / "source"
        source.mkdir(exist_ok=True)
        entry = source / settings.get("entry_point", "train.py")
        entry.parent.mkdir(exist_ok=True)
        entry.write_text(textwrap.dedent(script))
        values = {"name": "j", "entry_point": "train.py", "num_nodes": 1, "processes_per_node": 1, **settings}
        job = ClusterJob(source_dir=source, **values)
        root = tmp_path / "jobs" / "j"
        root.mkdir(parents=True, exist_ok=True)
        where = ""
        if code == "copy":
            copy_code(job, root / "code")
        elif code == "archive":
            pack_code(job, root / "sourcedir.tar.gz")
        else:
            where = code
            with fsspec.open(code, "wb") as file:
                file.write(pack_code(job, tmp_path / "packed.tar.gz").path.read_bytes())
        (root / "job.json").write_text(node_description(job, folder=folder, code=where))
        return root / "job.json"

    return submit


def run(path, **others):
    return run_description(read_node_description(path), io.StringIO(), **others)


def seen_by(folder, rank=0):
    return json.loads((folder / "model" / f"rank_{rank}.json").read_text())


def put(url, text):
    with fsspec.open(url, "w") as file:
        file.write(text)


def scratch_is_empty(tmp_path):
    return not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())


def test_a_job_of_one_node(submitted, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    put("memory://bucket/train/a/b.txt", "far")
    put("memory://bucket/one.bin", "single")
    path = submitted(
        processes_per_node=2,
        arguments=("--lr", "0.1"),
        hyperparameters={"lr": 0.1},
        channels={
            "near": DataChannel(str(data)),
            "far": DataChannel("memory://bucket/train"),
            "one": DataChannel("memory://bucket/one.bin"),
            "fast": DataChannel("memory://bucket/train", "FastFile"),
        },
        environment={"COLOUR": "blue"},
    )
    folder = path.parent
    result = run(path)
    assert result.exit_code == 0, result.message
    seen = seen_by(folder, 1)
    assert seen["args"] == ["--lr", "0.1"] and seen["env"]["SM_HP_LR"] == "0.1" and seen["env"]["COLOUR"] == "blue"
    assert seen["cwd"] == str(folder / "code") and seen["env"]["SM_MODEL_DIR"] == str(folder / "model")
    assert seen["env"]["SM_CHANNEL_NEAR"] == str(folder / "input/data/near")
    assert seen["env"]["SM_CHANNEL_URL_FAST"] == "memory://bucket/train" and "SM_CHANNEL_FAST" not in seen["env"]
    assert seen["env"]["MODELPARALLEL_CHECKPOINTS"] == str(folder / "checkpoints")
    end = read_job_end(folder)
    assert (end.state, end.exit_code, end.failure) == ("succeeded", 0, None) and end.started <= end.updated
    assert end.status.is_final
    assert scratch_is_empty(tmp_path)
    assert (folder / "job.json").exists() and not (folder / "code").is_symlink()


def test_fetched_channels_are_there_while_the_job_runs(submitted, tmp_path):
    put("memory://bucket/train/a/b.txt", "far")
    put("memory://bucket/one.bin", "single")
    script = """
        import os
        from pathlib import Path
        far, one = Path(os.environ["SM_CHANNEL_FAR"]), Path(os.environ["SM_CHANNEL_ONE"])
        assert (far / "a/b.txt").read_text() == "far" and (one / "one.bin").read_text() == "single"
    """
    channels = {"far": DataChannel("memory://bucket/train"), "one": DataChannel("memory://bucket/one.bin")}
    result = run(submitted(script, channels=channels))
    assert result.exit_code == 0, result.message
    assert scratch_is_empty(tmp_path)


@pytest.mark.parametrize("code", ["archive", "memory://bucket/code.tar.gz"])
def test_code_is_unpacked_on_the_node(submitted, tmp_path, code):
    path = submitted(code=code, entry_point="pkg/train.py", folder=str(tmp_path / "own" / "j"))
    result = run(path)
    assert result.exit_code == 0, result.message
    seen = seen_by(tmp_path / "own" / "j")
    assert seen["cwd"].startswith(str(tmp_path / "scratch")) and seen["env"]["PYTHONPATH"].endswith(seen["cwd"])
    assert scratch_is_empty(tmp_path)


def test_a_failure_is_kept_and_sent(submitted, tmp_path):
    path = submitted("print('last words')\nraise ValueError('bad number')\n", output="memory://bucket/out")
    result = run(path)
    assert result.exit_code == 1 and "ValueError: bad number" in result.message
    end = read_job_end(path.parent)
    assert (end.state, end.exit_code) == ("failed", 1) and end.reason == "rank 0: ValueError: bad number"
    assert end.failure["rank"] == 0 and "raise ValueError" in end.failure["traceback"]
    memory = fsspec.filesystem("memory")
    names = {name.removeprefix("/bucket/out/") for name in memory.find("/bucket/out")}
    assert {"output/failure", "logs/rank_0.log", "logs/launcher.log", "status.json"} <= names
    assert not any(name.startswith(("code", "input", "job.json", "secrets")) for name in names)
    assert b"last words" in memory.cat("/bucket/out/logs/rank_0.log")


def test_outputs_go_to_a_folder_or_a_url(submitted, tmp_path):
    script = PRINT + "    (model / 'deep').mkdir(); (model / 'deep' / 'w.bin').write_text('w')\n"
    for number, output in enumerate((str(tmp_path / "out"), "memory://bucket/out")):
        result = run(submitted(script, output=output, folder=str(tmp_path / str(number) / "j")))
        assert result.exit_code == 0, result.message
    assert (tmp_path / "out" / "model" / "deep" / "w.bin").read_text() == "w"
    assert fsspec.filesystem("memory").cat("/bucket/out/model/deep/w.bin") == b"w"


def test_outputs_that_cannot_be_sent_make_a_job_fail(submitted, tmp_path):
    (tmp_path / "file").write_text("")
    path = submitted(output=str(tmp_path / "file"))
    result = run(path)
    assert result.exit_code == 1 and "has run to its end, but output: writing to" in result.message
    assert f"what was not sent is in {path.parent}" in result.message
    assert read_job_end(path.parent).state == "failed"
    assert seen_by(path.parent)


def test_secrets_reach_the_processes_and_nothing_else(submitted, tmp_path):
    secret = "s3cr3t-$'\"\n-end"
    (tmp_path / "expected").write_bytes(secret.encode())
    script = f"""
        import os
        assert os.environ["HF_TOKEN"] == open({str(tmp_path / "expected")!r}, newline="").read()
        raise ValueError(os.environ["HF_TOKEN"])
    """
    path = submitted(script, secrets={"HF_TOKEN": "env:X"})
    write_secrets(path.parent / "secrets.env", {"HF_TOKEN": secret})
    result = run(path)
    assert "ValueError: s3cr3t" in result.message  # what a script itself shows is its own affair
    for name in ("job.json", "status.json", "status/job.json", "logs/launcher.log", ".modelparallel-links"):
        assert "s3cr3t" not in (path.parent / name).read_text(), name
    path.with_name("secrets.env").unlink()
    del os.environ["HF_TOKEN"]
    with pytest.raises(LaunchError, match="secret HF_TOKEN"):
        run(path)
    assert read_job_end(path.parent).state == "failed"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"channels": {"train": DataChannel("/no/such")}},
            f"channel 'train': /no/such does not exist on {socket.gethostname()}",
        ),
        (
            {"channels": {"train": DataChannel("memory://none/x")}},
            "channel 'train'.*there is no file at memory://none/x",
        ),
        ({"channels": {"train": DataChannel("nope://x/y")}}, "channel 'train'.*nope://x/y cannot be opened"),
        ({"channels": {"a": DataChannel("/tmp"), "A": DataChannel("/tmp")}}, "would both be SM_CHANNEL_A"),
        ({"requirements": "none.txt"}, "requirements"),
        ({"secrets": {"A": "env:B"}}, "secret A: neither is it in"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(submitted, monkeypatch, settings, words):
    path = submitted()
    values = {**json.loads(path.read_text()), **json.loads(json.dumps(settings, default=vars))}
    path.write_text(json.dumps(values))
    with pytest.raises(LaunchError, match=words):
        run(path)
    assert not (path.parent / "model").exists()
    end = read_job_end(path.parent)
    assert (end.state, end.exit_code) == ("failed", 2) and not end.reason.startswith("Traceback")


def wheel_of(folder, name):
    """A package of one file, which pip installs without asking an index."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    information = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "answer = 42\n")
        archive.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: torch\n"
        )
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return path


def test_requirements_are_installed_once_on_top_of_what_is_there(submitted, tmp_path, monkeypatch):
    """torch, which the package wants, is not installed again: there is no index to get it from."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "source").mkdir()
    wheel = wheel_of(tmp_path / "source", "tiny_answer")
    (tmp_path / "source" / "requirements.txt").write_text(f"./{wheel.name}\n")
    script = "import tiny_answer\nassert tiny_answer.answer == 42\n"
    path = submitted(script, requirements="requirements.txt")
    result = run(path)
    assert result.exit_code == 0, result.message
    (env,) = [entry for entry in (path.parent / "env").iterdir() if entry.is_dir()]
    assert path.parent.joinpath("env", f"{env.name}.log").exists()
    made = env.stat().st_ino
    assert run(path).exit_code == 0 and env.stat().st_ino == made
    (path.parent / "code" / "requirements.txt").write_text("no-such-package-of-anybody\n")
    with pytest.raises(LaunchError, match=r"(?s)cannot be installed on .*no-such-package-of-anybody"):
        run(path)
    assert not list((path.parent / "env").glob("*.partial"))


def test_who_installs_is_named(tmp_path):
    said = []
    target = tmp_path / "env"
    who = f"{socket.gethostname()} (process {os.getpid()})"
    with node_requirements._only_one(target, said.append, 60.0):
        with pytest.raises(LaunchError, match=rf"has waited \d+ s for {re.escape(who)}, which installs"):
            with node_requirements._only_one(target, said.append, 0.1):
                pass
    assert said == [f"waiting for {who}, which installs the requirements"]
    with node_requirements._only_one(target, said.append, 0.1):
        pass


def run_nodes(paths, monkeypatch, restart_count=0):
    """A thread for each node of a job; (result or error, output) of each."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)  # the loopback is right for the nodes of this test alone
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ends = [None] * len(paths)

    def work(rank, path):
        num_nodes = len(paths)
        place = NodePlace("options", num_nodes, num_nodes, rank, "127.0.0.1", port, "j", restart_count=restart_count)
        output = io.StringIO()
        try:
            ends[rank] = _SubmittedNode(read_node_description(path), place, output).run(), output
        except LaunchError as error:
            ends[rank] = error, output

    threads = [threading.Thread(target=work, args=(rank, path)) for rank, path in enumerate(paths)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    return [(end, output.getvalue()) for end, output in ends]


TRAINS = """
    import os, sys
    from pathlib import Path
    rank = os.environ["RANK"]
    Path(os.environ["SM_MODEL_DIR"], f"rank_{rank}").write_text(os.environ["WORLD_SIZE"])
    Path(os.environ["SM_MODEL_DIR"], "same").write_text(rank)
    print("channel", Path(os.environ["SM_CHANNEL_FAR"], "x.txt").read_text())
"""


def test_two_nodes_share_a_folder(submitted, tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.txt").write_text("is there")
    path = submitted(
        TRAINS, num_nodes=2, code="archive", channels={"far": DataChannel(f"local://{tmp_path}/far")},
        output=f"local://{tmp_path}/out",
    )  # fmt: skip
    ends = run_nodes([path, path], monkeypatch)
    assert [result.exit_code for result, _ in ends] == [0, 0], "\n".join(f"{end.message}\n{text}" for end, text in ends)
    assert sorted(os.listdir(path.parent / "model")) == ["rank_0", "rank_1", "same"]
    assert (path.parent / "model" / "rank_1").read_text() == "2"
    assert all("channel is there" in output for _, output in ends)
    assert read_job_end(path.parent).state == "succeeded"
    assert (tmp_path / "out" / "model" / "rank_1").exists() and (tmp_path / "out" / "logs" / "node_1").is_dir()
    assert sum("files are in" in output for _, output in ends) == 1  # of the nodes that share, one sends
    assert scratch_is_empty(tmp_path)
    ends = run_nodes([path, path], monkeypatch, restart_count=1)
    assert [result.exit_code for result, _ in ends] == [0, 0], "\n".join(f"{end.message}\n{text}" for end, text in ends)
    for folder in (path.parent, path.parent / "starts" / "1"):
        assert (folder / "logs" / "node_0" / "rank_0.log").exists()
        assert (folder / "logs" / "node_1" / "rank_1.log").exists()


def test_two_nodes_with_a_folder_each_send_what_is_theirs(submitted, tmp_path, monkeypatch):
    script = """
        import os
        from pathlib import Path
        model, rank = Path(os.environ["SM_MODEL_DIR"]), os.environ["RANK"]
        (model / f"rank_{rank}").write_text(rank)
        if rank == "1":
            raise ValueError("bad")
    """
    paths = []
    for rank in range(2):
        path = submitted(script, num_nodes=2, folder=str(tmp_path / f"own{rank}"), output="memory://bucket/out")
        (tmp_path / f"node{rank}").mkdir()
        for name in ("job.json", "code"):
            os.rename(path.parent / name, tmp_path / f"node{rank}" / name)
        paths.append(tmp_path / f"node{rank}" / "job.json")
    for result, output in run_nodes(paths, monkeypatch):
        assert (
            result.exit_code == 1 and "rank 1 of 2" in result.message and "files are in memory://bucket/out" in output
        )
    names = {name.removeprefix("/bucket/out/") for name in fsspec.filesystem("memory").find("/bucket/out")}
    assert {"model/rank_0", "model/rank_1", "logs/node_0/rank_0.log", "logs/node_1/rank_1.log"} <= names
    assert {"status/node_1/rank_1.error.json", "output/failure", "status.json"} <= names
    assert read_job_end(tmp_path / "own0").failure["rank"] == 1


def test_what_one_node_lacks_is_said_on_all(submitted, tmp_path, monkeypatch):
    """Each has a folder of its own, with the same description; the second one lacks the data."""
    paths = []
    for rank in range(2):
        data = tmp_path / f"data{rank}"
        if rank == 0:
            data.mkdir()
        path = submitted(
            "", num_nodes=2, channels={"train": DataChannel(str(data))}, folder=str(tmp_path / f"own{rank}")
        )
        (tmp_path / f"node{rank}").mkdir()
        os.rename(path, tmp_path / f"node{rank}" / "job.json")
        os.rename(path.parent / "code", tmp_path / f"node{rank}" / "code")
        paths.append(tmp_path / f"node{rank}" / "job.json")
    for error, _ in run_nodes(paths, monkeypatch):
        assert "(node 1): channel 'train':" in str(error) and "data1 does not exist on" in str(error)
    assert read_job_end(tmp_path / "own0").state == "failed" and read_job_end(tmp_path / "own1") is None
    assert not (tmp_path / "own0" / "model").exists()


def test_the_code_is_not_there(submitted):
    path = submitted()
    os.rename(path.parent / "code", path.parent / "elsewhere")
    with pytest.raises(LaunchError, match=r"the code of the job is not on .*sourcedir.tar.gz does not exist"):
        run(path)


def test_the_command(submitted, monkeypatch):
    path = submitted("raise SystemExit(7)\n")
    result = CliRunner().invoke(app, ["node", str(path)])
    assert result.exit_code == 7 and "rank 0 of 1 failed first" in result.output
    result = CliRunner().invoke(app, ["node", str(path.parent / "none.json")])
    assert result.exit_code == 2 and "cannot be read" in result.output


def test_a_job_is_started_again_in_its_folder(submitted, monkeypatch):
    path = submitted("raise SystemExit(7)\n")
    run(path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (path.parent / "code" / "train.py").write_text(textwrap.dedent(PRINT))
    result = run(path)
    assert result.exit_code == 0, result.message
    assert seen_by(path.parent)["env"]["MODELPARALLEL_RESTART_COUNT"] == "1"
    earlier = path.parent / "starts" / "1"
    assert (earlier / "logs" / "rank_0.log").exists() and (earlier / "output" / "failure").exists()
    assert not (path.parent / "output" / "failure").exists()
    assert read_job_end(path.parent).starts == 1


def test_nothing_is_put_aside_of_a_start_that_was_elsewhere(submitted, monkeypatch):
    """A pod that is made again on another machine finds an empty folder."""
    monkeypatch.setenv("JOBSET_RESTART_ATTEMPT", "2")
    path = submitted()
    assert run(path).exit_code == 0
    assert seen_by(path.parent)["env"]["MODELPARALLEL_RESTART_COUNT"] == "2"
    assert not (path.parent / "starts").exists()


def test_a_fault_of_ours_is_not_taken_for_a_running_job(submitted, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a fault of ours")

    path = submitted()
    monkeypatch.setattr(node_command, "prepared_spec", broken)
    with pytest.raises(LaunchError, match="ZeroDivisionError: a fault of ours"):
        run(path)
    assert read_job_end(path.parent).state == "failed"
    monkeypatch.undo()
    monkeypatch.setattr(node_command, "run_node", broken)
    monkeypatch.setattr(node_preparation, "resolve_device", lambda asked: ("cuda", 0))
    with pytest.raises(ZeroDivisionError):
        run(path)
    end = read_job_end(path.parent)
    assert (end.state, end.exit_code, end.reason) == ("failed", 1, "ZeroDivisionError: a fault of ours")


def test_a_folder_of_others_is_not_taken(submitted, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.tex").write_text("mine")
    with pytest.raises(LaunchError, match=r"is no folder of a job and holds 'thesis\.tex'"):
        run(submitted(folder=str(own)))
    assert os.listdir(own) == ["thesis.tex"]


def test_states(tmp_path):
    assert read_job_end(tmp_path) is None
    write_job_end(tmp_path, JobEnd("j", "running", failure={"rank": 1}, starts=2))
    assert read_job_end(tmp_path).failure == {"rank": 1} and os.listdir(tmp_path) == ["status.json"]
    for text in (
        "",
        "[]",
        '{"format": 1, "state": "asleep", "name": "j"}',
        '{"format": 1, "state": "failed"}',
        "[" * 9999,
    ):
        (tmp_path / "status.json").write_text(text)
        assert read_job_end(tmp_path) is None


def test_a_job_that_is_stopped_while_it_is_prepared_leaves_nothing(submitted, tmp_path, monkeypatch):
    put("memory://bucket/x", "data")
    path = submitted(channels={"far": DataChannel("memory://bucket/x")})
    monkeypatch.setattr(node_preparation, "fetch", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    result = run(path)
    assert (
        result.exit_code == 143 and f"was stopped by SIGTERM while {socket.gethostname()} prepared it" in result.message
    )
    assert read_job_end(path.parent).state == "stopped" and scratch_is_empty(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_preemption_while_the_job_is_prepared_reaches_the_script(submitted, tmp_path, monkeypatch):
    put("memory://bucket/x", "data")
    script = """
        import os, time
        while not os.path.exists(os.environ["MODELPARALLEL_PREEMPTION_FILE"]):
            time.sleep(0.01)
        raise SystemExit(85)
    """
    path = submitted(script, channels={"far": DataChannel("memory://bucket/x")}, max_seconds=120.0)

    def preempted(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return fetch(*arguments)

    monkeypatch.setattr(node_preparation, "fetch", preempted)
    assert run(path).exit_code == 85
    end = read_job_end(path.parent)
    assert end.state == "pending" and "was preempted" in end.reason


def test_scratch_is_shared_and_removed_by_the_last(submitted, tmp_path):
    told = read_node_description(submitted())
    made = []

    def make(target):
        made.append(target)
        target.mkdir()

    with held_scratch(told, os.environ) as first:
        with held_scratch(told, os.environ) as second:
            assert first.root == second.root
            assert first.once("a", "source", make) == second.once("a", "source", make)
            assert len(made) == 1
        assert first.root.is_dir()
        first.once("a", "another source", make)
        assert len(made) == 2
    assert not first.root.exists()
    root = first.root
    root.symlink_to(tmp_path)
    with pytest.raises(LaunchError, match="is no folder of this user"):
        with held_scratch(told, os.environ):
            pass


def test_an_archive_that_leads_out_is_refused(tmp_path):
    import tarfile

    for number, (name, link) in enumerate(
        (("../x", ""), ("/x", ""), ("a", "../x"), ("a", "/etc/passwd"), ("a/../../x", ""))
    ):
        path = tmp_path / f"{number}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
        with pytest.raises(LaunchError, match="leads out of it"):
            node_preparation.unpack(path, tmp_path / "target")
    (tmp_path / "broken.tar.gz").write_bytes(b"no archive")
    with pytest.raises(LaunchError, match="cannot be unpacked"):
        node_preparation.unpack(tmp_path / "broken.tar.gz", tmp_path / "target")
    assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".*"))


def test_checkpoints_behind_a_url(submitted, tmp_path):
    script = """
        import os
        from pathlib import Path
        folder = Path(os.environ["SAGEMAKER_BASE_DIR"], "checkpoints")
        before = sorted(path.name for path in folder.iterdir())
        (folder / f"step_{len(before)}").mkdir()
        (folder / f"step_{len(before)}" / "w.bin").write_text(os.environ["MODELPARALLEL_CHECKPOINTS"])
        raise SystemExit(3 if not before else 0)
    """
    url = "memory://bucket/checkpoints"
    path = submitted(script, checkpoints=url, folder=str(tmp_path / "own1" / "j"))
    assert run(path).exit_code == 3  # sent also by a job that fails
    path = submitted(script, checkpoints=url, folder=str(tmp_path / "own2" / "j"))
    result = run(path)
    assert result.exit_code == 0, result.message
    memory = fsspec.filesystem("memory")
    assert sorted(memory.find("/bucket/checkpoints")) == [f"/bucket/checkpoints/step_{n}/w.bin" for n in (0, 1)]
    assert memory.cat("/bucket/checkpoints/step_1/w.bin") == url.encode()


def test_checkpoints_are_sent_in_the_order_in_which_they_were_written(tmp_path, monkeypatch):
    from modelparallel.launch import node_outputs

    sent, folder = [], tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(node_outputs, "send", lambda root, names, url, what: sent.extend(names))
    keeper = CheckpointKeeper("memory://x", folder, lambda: True, print)
    (folder / "old").write_text("there before")
    keeper.start()
    for number, name in enumerate(("b", "a", "complete")):
        (folder / name).write_text(name)
        os.utime(folder / name, (100 + number, 100 + number))
    keeper.send_settled()
    assert sent == []  # seen once: they may still be written
    (folder / "a").write_text("longer")
    os.utime(folder / "a", (103, 103))
    keeper.send_settled()
    assert sent == ["b", "complete"]
    keeper.finish()
    assert sent == ["b", "complete", "a"]
