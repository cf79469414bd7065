"""What `make package` makes: what is in it, and that it works where nothing else of this repository is."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from modelparallel import __version__

ROOT = Path(__file__).resolve().parent.parent
JOB = """
import modelparallel
import smdistributed.modelparallel.torch as smp
import torch

assert smp is modelparallel
smp.init()
torch.manual_seed(0)
model = smp.DistributedModel(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@smp.step
def train_step(model, x):
    loss = model(x).square().mean()
    model.backward(loss)
    return loss


losses = []
for _ in range(3):
    optimizer.zero_grad()
    losses.append(train_step(model, torch.ones(4, 4)).reduce_mean().item())
    optimizer.step()
assert losses[-1] < losses[0], losses
print("stage", smp.pp_rank(), "of", smp.pp_size(), "trained with", modelparallel.__file__)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The folder with source archive and wheel, made as `make package` does, from a copy of the repository."""
    pytest.importorskip("build", reason="make test-all installs it")
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "repository"
    for entry in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "src", "tests", "bench", "examples", "docs"):
        source, target = ROOT / entry, copy / entry
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    command = [sys.executable, "-m", "build", "--quiet", "--outdir", str(folder), str(copy)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


def needed_distributions(name, found=None):
    """The distributions of this environment that `pip install <name>` brings, the first one left out."""
    found = {} if found is None else found
    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[requirement.name] = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # a build of torch may do without some of its packages
        needed_distributions(requirement.name, found)
    return found


def link_distributions(distributions, folder):
    """Show the packages of this environment in another one, without copying them."""
    for each in distributions:
        for top in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(each.locate_file(top)).resolve())


@pytest.mark.slow
def test_the_wheel_holds_the_packages_of_src_and_nothing_else(packages):
    (wheel,) = packages.glob("*.whl")
    assert wheel.name == f"modelparallel-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"modelparallel-{__version__}.dist-info/METADATA").decode()
    files = [path for path in (ROOT / "src").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    assert inside == {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert {"modelparallel/py.typed", "smdistributed/modelparallel/torch/__init__.py"} <= inside
    assert "Requires-Dist: torch>=2.11" in metadata and "License-Expression: Apache-2.0" in metadata


@pytest.mark.slow
def test_the_source_archive_holds_what_the_wheel_is_made_of(packages):
    (archive,) = packages.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        tops = {Path(name).parts[1] for name in opened.getnames() if len(Path(name).parts) > 1}
    assert {"src", "pyproject.toml", "README.md", "LICENSE"} <= tops
    assert not {"tests", "bench", "examples", "docs"} & tops


@pytest.mark.slow
def test_a_job_runs_in_an_environment_that_has_the_wheel_and_what_it_needs_alone(packages, tmp_path):
    (wheel,) = packages.glob("*.whl")
    venv.create(tmp_path / "environment", symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    installed = subprocess.run(install, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    (site_packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    needed = needed_distributions("modelparallel")
    assert "torch" in needed and "typer" in needed and "transformers" not in needed
    link_distributions(needed.values(), site_packages)

    def run(*command):
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    (tmp_path / "job.py").write_text(JOB)
    command = str(python.parent / "modelparallel")
    shown = run(command, "--version")
    assert shown.stdout.strip() == __version__, shown.stdout + shown.stderr
    parameters = '{"pipeline_parallel_degree": 2, "microbatches": 2}'
    result = run(command, "run", "--nproc", "2", "--device", "cpu", "--parameters", parameters, "job.py")
    assert result.returncode == 0, result.stdout + result.stderr
    for stage in (0, 1):
        assert f"stage {stage} of 2 trained with {site_packages}/modelparallel/__init__.py" in result.stdout
