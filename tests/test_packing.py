"""The code of a job for other machines: what is packed, what stays at home, and that it is the same each time."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from modelparallel.errors import LaunchError, SMPConfigError
from modelparallel.launch.clusters import code_tree
from modelparallel.launch.clusters.code_tree import code_entries
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.git_source import _credentials, check_git_config, clone
from modelparallel.launch.clusters.library_wheel import library_wheel
from modelparallel.launch.clusters.packing import copy_code, pack_code
from modelparallel.version import __version__

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def fill(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def job_of(folder, **settings):
    return ClusterJob(**{"name": "j", "entry_point": "train.py", "num_nodes": 1, "processes_per_node": 1,
                         "source_dir": folder, **settings})  # fmt: skip


def names(folder, **settings):
    return [name for name, entry in code_entries(job_of(folder, **settings)).items() if entry.kind != "folder"]


def content(path):
    with tarfile.open(path) as archive:
        return {member.name: member for member in archive}, {
            member.name: archive.extractfile(member).read() for member in archive if member.isfile()
        }


@pytest.fixture
def code(tmp_path):
    return fill(tmp_path / "code", {"train.py": "print(1)\n", "models/net.py": "x = 1\n", "réseau.txt": "ä\n"})


def test_equal_files_give_equal_bytes(code, tmp_path):
    (code / "run.sh").write_text("#!/bin/sh\n")
    (code / "run.sh").chmod(0o700)
    (code / "latest").symlink_to("models/net.py")
    first = pack_code(job_of(code), tmp_path / "out" / "sourcedir.tar.gz")
    other = tmp_path / "elsewhere"
    copy_code(job_of(code), other)
    for path in other.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (1, 1))
    (other / "train.py").chmod(0o600)
    second = pack_code(job_of(other), tmp_path / "second.tar.gz")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.digest == second.digest == hashlib.sha256(first.path.read_bytes()).hexdigest()
    assert first.size == first.path.stat().st_size
    members, texts = content(first.path)
    assert list(members) == list(first.names) == sorted(members)
    assert list(members) == ["latest", "models", "models/net.py", "run.sh", "réseau.txt", "train.py"]
    assert texts["train.py"] == b"print(1)\n" and texts["réseau.txt"] == "ä\n".encode()
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members.values()} == {
        (0, 0, 0, "", "")
    }
    assert oct(members["run.sh"].mode) == "0o755" and oct(members["train.py"].mode) == "0o644"
    assert members["latest"].issym() and members["latest"].linkname == "models/net.py"
    assert not list((tmp_path / "out").glob("*.partial"))
    (code / "train.py").write_text("print(2)\n")
    assert pack_code(job_of(code), tmp_path / "third.tar.gz").digest != first.digest


def test_what_stays_at_home(code):
    fill(code, {
        ".git/config": "", "__pycache__/train.cpython-311.pyc": "", "data/a.bin": "", "data/keep.txt": "",
        "out/model.pt": "", "models/.gitignore": "*.tmp\n!good.tmp\n", "models/bad.tmp": "", "models/good.tmp": "",
        "generated.py": "", ".gitignore": "out/\n*.bin\ngenerated.py\n# a comment\n\n/top.txt\n", "top.txt": "",
        "models/top.txt": "", ".modelparallelignore": "data/*\n!data/keep.txt\n!generated.py\n",
    })  # fmt: skip
    assert names(code) == [
        ".gitignore", ".modelparallelignore", "data/keep.txt", "generated.py", "models/.gitignore", "models/good.tmp",
        "models/net.py", "models/top.txt", "réseau.txt", "train.py",
    ]  # fmt: skip
    fill(code, {".modelparallelignore": "!__pycache__/\n!*.pyc\n!.git\n.gitignore\n.modelparallelignore\n"})
    there = names(code)
    assert "__pycache__/train.cpython-311.pyc" in there
    assert not [name for name in there if name.startswith(".git/")]
    assert ".gitignore" not in there and "models/.gitignore" not in there


def test_ignore_files_of_the_repository_around_count(tmp_path):
    fill(tmp_path, {".gitignore": "*.ckpt\n/code/private/\n", ".git/info/exclude": "notes.txt\n", ".git/HEAD": ""})
    code = fill(
        tmp_path / "code", {"train.py": "", "a.ckpt": "", "private/x": "", "sub/private/x": "", "notes.txt": ""}
    )
    assert names(code) == ["sub/private/x", "train.py"]
    # What lies above without a repository says nothing.
    (tmp_path / ".git" / "HEAD").unlink()
    (tmp_path / ".git").rename(tmp_path / "git")
    assert "a.ckpt" in names(code)


@pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v git"], capture_output=True).returncode != 0, reason="no git"
)
def test_the_same_files_as_git_would_take(tmp_path):
    patterns = ["*.log", "!keep.log", "/build", "docs/**/gen", "a/*/c", "deep/", "!deep/x", "**/skip.txt", "sp\\ ace"]
    fill(tmp_path, {".gitignore": "\n".join(patterns), "train.py": "", "a/.gitignore": "!*.log\n"})
    for name in ("x.log", "keep.log", "build/o", "src/build/o", "docs/gen/p", "docs/q/r/gen/p", "a/b/c/d", "a/c",
                 "deep/x", "s/deep/y", "skip.txt", "t/skip.txt", "sp ace", "a/z.log", "ä.txt"):  # fmt: skip
        fill(tmp_path, {name: ""})
    git = ["git", "-c", "core.quotePath=false", "-c", "core.excludesFile=", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
    listed = subprocess.run([*git, "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True, text=True)
    assert names(tmp_path) == sorted(listed.stdout.splitlines())


def test_an_entry_point_that_is_left_out_is_named_with_its_line(code):
    fill(code, {".gitignore": "models\n", ".modelparallelignore": "tr*.py\n"})
    with pytest.raises(LaunchError, match=r"entry point train.py is left out .* 'tr\*.py' of .*\.modelparallelignore"):
        code_entries(job_of(code))
    with pytest.raises(LaunchError, match=r"'models' of .*\.gitignore: add !models to"):
        code_entries(job_of(code, entry_point="models/net.py"))
    fill(code, {".modelparallelignore": "!models\n"})
    assert "models/net.py" in names(code, entry_point="models/net.py")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"entry_point": "trian.py"}, r"entry point .*trian.py does not exist"),
        ({"entry_point": "models"}, "is a directory"),
        ({"entry_point": "../train.py"}, "outside of source_dir"),
        ({"entry_point": "/bin/sh"}, "outside of source_dir"),
        ({"requirements": "req.txt"}, r"requirements .*req.txt does not exist"),
        ({"dependencies": (Path("/no/such"),)}, "dependency /no/such does not exist"),
        ({"source_dir": Path("/no/such")}, "source_dir /no/such is no directory"),
    ],
)
def test_what_is_missing(code, settings, words):
    with pytest.raises(LaunchError, match=words):
        code_entries(job_of(code, **settings))


def test_links_that_lead_out(code, tmp_path):
    outside = fill(tmp_path, {"big/data.bin": ""})
    (code / "data").symlink_to(outside / "big")
    with pytest.raises(LaunchError, match=f"the link {code}/data leads out, to {outside}/big"):
        code_entries(job_of(code))
    fill(code, {".gitignore": "/data\n"})
    assert "data" not in names(code)
    # Absolute, or by way of the folder's own name: both are inside, and lead to the right place anywhere.
    (code / "models" / "absolute").symlink_to(code / "train.py")
    (code / "models" / "around").symlink_to(f"../../{code.name}/train.py")
    (code / "round").symlink_to("round")
    entries = code_entries(job_of(code))
    assert entries["models/absolute"].link == entries["models/around"].link == "../train.py"
    assert entries["round"].link == "round"
    (tmp_path / "same").symlink_to(code)
    assert names(tmp_path / "same") == names(code)


def test_too_much_names_the_biggest(code, monkeypatch):
    fill(code, {"weights.bin": "x" * 3000, "small.bin": "x" * 200})
    monkeypatch.setattr(code_tree, "MOST_BYTES", 3000)
    with pytest.raises(
        LaunchError, match=r"more than 0.0 MB: the biggest are weights.bin \(.*\), small.bin .*channels"
    ):
        code_entries(job_of(code))
    fill(code, {".modelparallelignore": "weights.bin"})
    code_entries(job_of(code))


def test_a_name_that_is_no_file_stays_out(code):
    os.mkfifo(code / "pipe")
    assert "pipe" not in names(code)


def test_a_wrong_pattern_is_named(code):
    fill(code, {"models/.gitignore": "!\n"})
    with pytest.raises(LaunchError, match=r"models/.gitignore: .*correct the pattern"):
        code_entries(job_of(code))


def test_dependencies_lie_beside_the_code(code, tmp_path):
    library = fill(tmp_path / "lib" / "tools", {"__init__.py": "", "junk.o": "", ".gitignore": "*.o\n"})
    single = fill(tmp_path, {"one.py": "y = 1\n"}) / "one.py"
    (tmp_path / "alias").symlink_to(library)
    there = names(code, dependencies=(library, single))
    assert {"tools/__init__.py", "one.py"} <= set(there) and "tools/junk.o" not in there
    assert "alias/__init__.py" in names(code, dependencies=(tmp_path / "alias",))
    with pytest.raises(LaunchError, match=r"'models' is there already, from .*code/models"):
        code_entries(job_of(code, dependencies=(fill(tmp_path / "b" / "models", {"x": ""}),)))
    with pytest.raises(LaunchError, match="'tools' is there already"):
        code_entries(job_of(code, dependencies=(library, fill(tmp_path / "c" / "tools", {"x": ""}))))


def packed_requirements(job, tmp_path, **options):
    return content(pack_code(job, tmp_path / "p.tar.gz", **options).path)[1].get("requirements.txt")


def test_requirements(code, tmp_path):
    assert packed_requirements(job_of(code), tmp_path) is None
    assert packed_requirements(job_of(code), tmp_path, library="index") == f"modelparallel=={__version__}\n".encode()
    fill(code, {"reqs/gpu.txt": "numpy\n"})
    job = job_of(code, requirements="./reqs/gpu.txt")
    assert packed_requirements(job, tmp_path) == b"-r reqs/gpu.txt\n"
    fill(code, {"requirements.txt": "einops"})
    assert packed_requirements(job_of(code), tmp_path) == b"einops"
    job = job_of(code, requirements="requirements.txt")
    assert packed_requirements(job, tmp_path, library="index") == f"einops\nmodelparallel=={__version__}\n".encode()
    with pytest.raises(LaunchError, match=r"requirements\.txt is there, too"):
        pack_code(job_of(code, requirements="reqs/gpu.txt"), tmp_path / "p.tar.gz")
    with pytest.raises(LaunchError, match="library 'whel'"):
        pack_code(job_of(code), tmp_path / "p.tar.gz", library="whel")


def test_further_files(code, tmp_path):
    packed = pack_code(job_of(code), tmp_path / "p.tar.gz", extra={"job.json": b"{}"})
    assert content(packed.path)[1]["job.json"] == b"{}"
    with pytest.raises(LaunchError, match=r"'train\.py' is written by the launcher itself"):
        pack_code(job_of(code), tmp_path / "p.tar.gz", extra={"train.py": b""})
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot be packed into .*file/p.tar.gz"):
        pack_code(job_of(code), tmp_path / "file" / "p.tar.gz")


def test_the_library_as_a_wheel(code, tmp_path):
    packed = pack_code(job_of(code), tmp_path / "p.tar.gz", library="wheel")
    name, wheel = library_wheel()
    _, texts = content(packed.path)
    assert texts[name] == wheel and texts["requirements.txt"] == f"./{name}\n".encode()
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        there = set(archive.namelist())
        metadata = archive.read(f"modelparallel-{__version__}.dist-info/METADATA").decode()
    assert {"modelparallel/launch/clusters/packing.py", "smdistributed/modelparallel/torch/__init__.py"} <= there
    assert f"\nVersion: {__version__}\n" in metadata and "\nRequires-Dist: torch" in metadata
    assert not [name for name in there if name.endswith(".pyc")]
    (tmp_path / name).write_bytes(wheel)
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target"]
    subprocess.run(
        [*pip, str(target), str(tmp_path / name)], check=True, capture_output=True
    )  # checks names and digests
    assert (target / "modelparallel" / "py.typed").exists() and (target / "bin" / "modelparallel").exists()


def test_a_copy_follows_the_code(code, tmp_path):
    target = tmp_path / "jobs" / "j" / "code"
    copied = copy_code(job_of(code), target)
    assert copied == tuple(code_entries(job_of(code)))
    unchanged = (target / "train.py").stat()
    assert unchanged.st_mtime_ns == (code / "train.py").stat().st_mtime_ns
    outside = fill(tmp_path, {"outside.txt": "mine"}) / "outside.txt"
    (code / "models" / "net.py").unlink()
    fill(code, {"models/new.py": "z", "réseau.txt": "longer than before\n"})
    fill(target, {"left/over": "", "extra.py": ""})
    (target / "models" / "new.py").symlink_to(outside)  # in the way, and leads to a file of others
    copy_code(job_of(code), target)
    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*")) == [
        "models", "models/new.py", "réseau.txt", "train.py",
    ]  # fmt: skip
    assert (target / "models" / "new.py").read_text() == "z" and outside.read_text() == "mine"
    assert (target / "réseau.txt").read_text() == "longer than before\n"
    assert (target / "train.py").stat().st_ino == unchanged.st_ino  # not written again


def test_a_copy_inside_the_code(code, tmp_path):
    with pytest.raises(LaunchError, match="one inside the other"):
        copy_code(job_of(code), code / "jobs" / "j" / "code")
    with pytest.raises(LaunchError, match="one inside the other"):
        copy_code(job_of(code), tmp_path)
    for name in ("j", "k"):
        copy_code(job_of(code), code / "jobs" / name / "code", jobs=code / "jobs")
    assert not (code / "jobs" / "k" / "code" / "jobs").exists() and (code / "jobs" / "k" / "code" / "train.py").exists()
    (tmp_path / "link").symlink_to(code)
    with pytest.raises(LaunchError, match="is no folder"):
        copy_code(job_of(code), tmp_path / "link")


@pytest.fixture
def repository(tmp_path):
    folder = fill(tmp_path / "repository", {"train.py": "1"})
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    commits = []
    for text in ("1", "2"):
        fill(folder, {"train.py": text})
        for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", text]):
            subprocess.run([*git, *command], check=True, capture_output=True)
        commits.append(subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip())
    subprocess.run([*git, "branch", "old", commits[0]], check=True)
    return folder, commits


@needs_git
def test_code_of_a_repository(repository, tmp_path):
    folder, commits = repository
    for number, (config, text, commit) in enumerate(
        (({}, "2", commits[1]), ({"branch": "old"}, "1", commits[0]), ({"commit": commits[0][:8]}, "1", commits[0]))
    ):
        cloned = clone({"repo": str(folder), **config}, tmp_path / f"clone{number}")
        assert (cloned.path / "train.py").read_text() == text and cloned.commit == commit
        assert names(cloned.path) == ["train.py"]
    with pytest.raises(LaunchError, match=r"git clone of .*Remote branch none not found"):
        clone({"repo": str(folder), "branch": "none"}, tmp_path / "x")
    with pytest.raises(LaunchError, match="git checkout of"):
        clone({"repo": str(folder), "commit": "1234567"}, tmp_path / "y")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("repo", "expected"),
        ({"branch": "main"}, '"repo" is missing'),
        ({"repo": "r", "brnch": "main"}, "did you mean 'branch'"),
        ({"repo": "--upload-pack=x"}, "does not begin with '-'"),
        ({"repo": "r", "commit": ""}, "expected a text"),
        ({"repo": "https://user:secret@host/r"}, "credentials in a URL"),
        ({"repo": "git@host:r", "token": "secret"}, "sent to https:// alone"),
        ({"repo": "https://host/r", "password": "secret"}, '"password" needs "username"'),
        ({"repo": "https://host/r", "token": "-secret"}, r"got \*\*\*"),
    ],
)
def test_wrong_repositories(config, words):
    with pytest.raises(SMPConfigError, match=words) as caught:
        check_git_config(config)
    assert "secret" not in str(caught.value)


def test_credentials_of_a_repository_are_for_its_host_alone():
    variables = _credentials({"repo": "https://host.example/a/b.git", "token": "t"})
    assert variables["GIT_CONFIG_KEY_0"] == "http.https://host.example/.extraHeader"
    assert "GIT_CONFIG_COUNT" not in _credentials({"repo": "https://host.example/a"})
