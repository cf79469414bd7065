"""`modelparallel run --backend mpi --hosts ...`: mpirun starts the processes of several hosts from one of them."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from clusters.hosts import Host, two_hosts
from clusters.runs import PATIENCE, SCRIPT, check_losses
from modelparallel.errors import LaunchError
from modelparallel.launch.mpi_backend import find_mpirun
from scripts import ROOT

__all__ = ["two_hosts"]


@pytest.fixture(autouse=True)
def _has_mpirun():
    try:
        find_mpirun()
    except LaunchError as error:
        pytest.skip(str(error))


def agent_for(hosts: Sequence[Host], folder: Path) -> Path:
    """What mpirun calls in the place of ssh: the daemon of a host is started there, without a server for it."""
    path = folder / "agent.sh"
    cases = "".join(f'{host.name}) exec {shlex.join(host.command(["sh", "-c"]))} "$*" ;;\n' for host in hosts)
    path.write_text(f'#!/bin/sh\nhost=$1; shift\ncase "$host" in\n{cases}esac\necho "no host $host"; exit 1\n')
    path.chmod(0o755)
    return path


def run_over(hosts: Sequence[Host], folder: Path, job: Sequence[str | Path], *options: str):
    command = [sys.executable, "-m", "modelparallel", "run", "--device", "cpu", "--backend", "mpi", *options]
    command += ["--job-dir", str(folder / "job"), *map(str, job)]
    agent = str(agent_for(hosts, folder))
    return hosts[0].run(command, timeout=PATIENCE, cwd=folder, PRTE_MCA_plm_ssh_agent=agent)


def test_the_second_seed_job_over_two_hosts_equals_one_process(two_hosts, tmp_path):
    seed_jobs = pytest.importorskip("test_seed_jobs")
    name = "train_tensor_pipeline_parallel"
    parameters = json.dumps(seed_jobs.PARAMETERS[name])
    hosts = ",".join(f"{host.name}:2" for host in two_hosts)
    job = [ROOT / "tests" / "seed_job.py", name, tmp_path]
    result = run_over(two_hosts, tmp_path, job, "--hosts", hosts, "--parameters", parameters)
    assert result.returncode == 0, result.stdout
    assert "4 processes (2 on node-a, 2 on node-b) by mpi on cpu" in result.stdout
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(4)]
    seed_jobs.check(name, results, torch.float32, num_copies=2)


def test_hosts_of_a_file_and_what_each_rank_is_told(two_hosts, tmp_path):
    (tmp_path / "hostfile").write_text("# two hosts\nnode-a slots=1\nnode-b slots=2\n")
    script = tmp_path / "told.py"
    script.write_text(
        f"import os, runpy\nprint('on', *(os.environ[n] for n in ('SM_CURRENT_HOST', 'SM_NUM_GPUS', 'SM_HOSTS')))\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    parameters = '{"pipeline_parallel_degree": 3, "microbatches": 2}'
    options = ("--hostfile", str(tmp_path / "hostfile"), "--parameters", parameters)
    result = run_over(two_hosts, tmp_path, [script], *options)
    assert result.returncode == 0, result.stdout
    check_losses(result.stdout)
    for rank, told in enumerate(("node-a 1", "node-b 2", "node-b 2")):
        assert f'[rank {rank}] on {told} ["node-a","node-b"]' in result.stdout, result.stdout
    shutil.rmtree(tmp_path / "job")
    failed = run_over(two_hosts, tmp_path, [SCRIPT, "--fail", "2:1"], *options)
    assert failed.returncode == 1 and "rank 2 of 3 failed first" in failed.stdout, failed.stdout
    assert "ValueError: deliberate failure of the script" in failed.stdout
