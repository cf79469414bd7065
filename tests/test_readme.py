"""The README's diff and commands are true."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block(language):
    return re.search(rf"^```{language}\n(.*?)^```", README, re.M | re.S).group(1)


def scripts():
    """The plain script (left side of the diff) and the distributed one (right side)."""
    lines = block("diff").splitlines()
    sides = [[line[1:] for line in lines if line[:1] in (" ", "", sign)] for sign in ("-", "+")]
    return ["\n".join(side) + "\n" for side in sides]


def losses(text):
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", text)]


def command(line, *, cwd):
    arguments = shlex.split(line)
    assert arguments[0] == "modelparallel"
    arguments[:1] = [sys.executable, "-m", "modelparallel"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=cwd, env=environ, capture_output=True, text=True, timeout=500)


def test_the_diff_trains_the_same_network_over_two_stages(tmp_path):
    plain, distributed = scripts()
    (tmp_path / "plain.py").write_text(plain)
    (tmp_path / "train.py").write_text(distributed)
    expected = losses(
        subprocess.run([sys.executable, "plain.py"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    )
    line = next(line for line in README.splitlines() if line.startswith("modelparallel run"))
    result = command(line, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = losses(result.stdout)
    assert len(expected) == 5 and expected[-1] < expected[0]
    assert sorted(found, reverse=True) == pytest.approx(sorted(expected * 2, reverse=True), abs=2e-6)
    assert "Partition assignments:" in result.stdout + result.stderr


def test_make_targets_and_files_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for link in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / link).exists(), link


def test_extras_that_it_names_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"'(?:\.|modelparallel)\[(\w+)\]'", README):
        assert re.search(rf"^{extra} = \[", project, re.M), extra
