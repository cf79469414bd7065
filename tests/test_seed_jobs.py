"""Both example jobs equal one process on the union of the batches: in the pool, by torch elastic and by mpirun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from parity import assert_parity, reference_run
from pool import run_ranks
from seed_job import BATCH_SIZES, NUM_STEPS, PARAMETERS, make_digits, make_net, train

pytest.importorskip("torchvision")
pytest.importorskip("torchnet.dataset")  # here, so that the pool imports it once for all

SCRIPTS = list(PARAMETERS)
COPIES = {"train_tensor_parallel": 8, "train_tensor_pipeline_parallel": 4}
REPLACED = {"train_tensor_parallel": {"fc1", "fc2"}, "train_tensor_pipeline_parallel": {"fc1"}}


def union_batches(num_copies, dtype):
    """Step by step the batches of all data-parallel ranks, one after another; each rank has a contiguous shard."""
    batch_size = BATCH_SIZES[dtype]
    images, targets = make_digits(batch_size * NUM_STEPS * num_copies, dtype)
    size = batch_size * NUM_STEPS
    for step in range(NUM_STEPS):
        rows = torch.cat(
            [
                torch.arange(size * dp_rank, size * (dp_rank + 1))[step * batch_size :][:batch_size]
                for dp_rank in range(num_copies)
            ]
        )
        yield images[rows], targets[rows]


def check(script, results, dtype, num_copies=None):
    num_copies = num_copies or COPIES[script]
    reference = reference_run(
        lambda: make_net(script, dtype),
        list(union_batches(num_copies, dtype)),
        lambda model, data, target: F.nll_loss(model(data), target),
        num_microbatches=PARAMETERS[script].get("microbatches", 1),
        num_copies=num_copies,
        make_optimizer=lambda parameters: torch.optim.Adadelta(parameters, lr=4.0),
    )
    losses = {dp_rank: values for dp_rank, values, _, _ in results}
    assert sorted(losses) == list(range(num_copies))
    mean = [sum(values) / num_copies for values in zip(*losses.values(), strict=True)]
    assert mean == pytest.approx(reference.losses, rel=1e-9 if dtype == torch.float64 else 1e-5)
    for _, values, weights, classes in results:
        assert len(values) == NUM_STEPS
        assert {name for name, kind in classes.items() if kind == "DistributedLinear"} == REPLACED[script]
        assert_parity(weights, reference.weights, dtype=dtype)


def test_c044_tensor_parallel_job_equals_one_process():
    script = SCRIPTS[0]
    check(script, run_ranks(train, 8, script, torch.float64, parameters=PARAMETERS[script]), torch.float64)


def test_c043_tensor_and_pipeline_parallel_job_equals_one_process():
    script = SCRIPTS[1]
    check(script, run_ranks(train, 8, script, torch.float64, parameters=PARAMETERS[script]), torch.float64)


@pytest.mark.parametrize(
    ("script", "backend"),
    [
        (SCRIPTS[0], "mpi"),
        pytest.param(SCRIPTS[1], "elastic", marks=pytest.mark.slow),
        pytest.param(SCRIPTS[0], "elastic", marks=pytest.mark.slow),
        pytest.param(SCRIPTS[1], "mpi", marks=pytest.mark.slow),
    ],
)
def test_c043_c044_launched_jobs_equal_one_process(script, backend, tmp_path):
    if backend == "mpi" and shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
        pytest.skip("mpirun is not installed")
    command = [sys.executable, "-m", "modelparallel", "run", "--nproc", "8", "--backend", backend, "--device", "cpu"]
    command += ["--parameters", json.dumps(PARAMETERS[script]), "--job-dir", str(tmp_path / "job")]
    command += [str(Path(__file__).with_name("seed_job.py")), script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    stages = range(PARAMETERS[script]["pipeline_parallel_degree"])
    assert all(f"[launcher] memory of stage {stage} (" in result.stdout for stage in stages), result.stdout[-4000:]
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(8)]
    check(script, results, torch.float32)
