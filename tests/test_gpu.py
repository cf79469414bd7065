"""What only a GPU shows: NCCL with one process, and several processes that share the GPU (``ddp_dist_backend`` gloo).

Skipped where there is no GPU. Each compares with one process that trains on the same GPU without this library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import modelparallel as smp
from checkpoint_jobs import make_job, train
from distributed_run import own_device
from modelparallel.errors import OutOfMemoryError
from pool import run_ranks
from recomputation_models import Block
from training import square_step
from training_cells import Cell, verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_GPU = {"MODELPARALLEL_DEVICE": "cuda"}
SHARED = {"ddp": True, "ddp_dist_backend": "gloo", "timeout_seconds": 60}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_one_process_with_nccl(precision, recomputes):
    verify(Cell(1, 1, 1, "ddp", precision, recomputes), "cuda", offload_activations=recomputes)


@pytest.mark.parametrize(
    "cell",
    [
        Cell(2, 2, 1, "ddp", "fp32", False),
        Cell(2, 1, 2, "ddp", "fp32", True),
        Cell(2, 1, 1, "ddp", "bf16", False),
        Cell(2, 1, 1, "optimizer", "fp32", False),
        Cell(2, 1, 1, "sdp", "fp32", True),
        Cell(4, 2, 2, "ddp", "fp32", True),
        Cell(4, 2, 2, "ddp", "fp16", False),
        Cell(4, 1, 2, "optimizer", "bf16", True),
        Cell(4, 1, 2, "sdp", "fp16", False),
        Cell(4, 2, 1, "sdp", "bf16", True),
        Cell(8, 2, 2, "sdp", "fp32", True),
    ],
    ids=str,
)
def test_processes_that_share_a_gpu(cell):
    verify(cell, "cuda", offload_activations=cell.recomputes)


@pytest.mark.parametrize("schedule", ["simple", "zero_bubble"])
def test_schedules(schedule):
    verify(Cell(2, 2, 1, "ddp", "fp32", False), "cuda", pipeline=schedule)


def groups_on_rank() -> tuple[str, float, int | None]:
    total = torch.full((3,), 2.0, device=own_device())
    dist.all_reduce(total, group=smp.get_world_process_group())
    (memory,) = smp.memory_report().ranks
    return dist.get_backend_config(smp.get_world_process_group()), float(total.sum()), memory.device_peak


def test_groups_are_of_nccl_and_memory_is_that_of_the_device():
    ((backends, total, peak),) = run_ranks(groups_on_rank, 1, parameters={}, environ=ON_GPU)
    assert "cuda:nccl" in backends and total == 6.0 and peak > 0


def exhausted_on_rank() -> str:
    @smp.step
    def greedy_step(model: Any, x: Tensor) -> Tensor:
        loss = model(x).square().mean() + torch.empty(2**45, device=x.device)[0]
        model.backward(loss)
        return loss

    model = smp.DistributedModel(nn.Linear(8, 8))
    with pytest.raises(OutOfMemoryError) as caught:
        greedy_step(model, torch.zeros(4, 8, device=own_device()))
    return str(caught.value)


def test_an_exhausted_device_is_explained():
    (message,) = run_ranks(exhausted_on_rank, 1, parameters={}, environ=ON_GPU)
    assert "global rank 0" in message and "it holds:" in message and "predicted:" in message


def dropping_on_rank(is_marked: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradients of a model with dropout, which draws from the GPU's generator."""
    torch.manual_seed(1)
    model = smp.DistributedModel(nn.Sequential(*(Block() for _ in range(4))).double().train())
    if is_marked:
        smp.set_activation_checkpointing(model.get_module())
    torch.manual_seed(2)
    losses = []
    for number in range(3):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        model.zero_grad()
        losses.append(float(square_step(model, x.to(own_device())).reduce_mean()))
    gradients = {name: parameter.grad.cpu() for name, parameter in model.local_named_parameters()}
    return losses, gradients


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("offloads", [False, True])
def test_recomputation_draws_the_same_random_numbers(num_ranks, offloads):
    parameters = {"microbatches": 2, **(SHARED if num_ranks > 1 else {}), "pipeline_parallel_degree": num_ranks}
    kept = run_ranks(dropping_on_rank, num_ranks, False, parameters=parameters, environ=ON_GPU)
    parameters = {**parameters, "offload_activations": offloads}
    recomputed = run_ranks(dropping_on_rank, num_ranks, True, parameters=parameters, environ=ON_GPU)
    assert kept[0][0][0] != kept[0][0][1]
    for (losses, gradients), (expected, expected_gradients) in zip(recomputed, kept, strict=True):
        assert losses == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-12)


def scaled_on_rank(is_split: bool) -> list[float]:
    """A script with autocast and GradScaler, as it is without this library or with it."""
    device = torch.device("cuda", 0)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    model = smp.DistributedModel(net) if is_split else net
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = smp.DistributedOptimizer(optimizer) if is_split else optimizer
    scaler = smp.amp.GradScaler() if is_split else torch.amp.GradScaler("cuda")

    def forward_backward(model: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaled = scaler.scale(loss) if is_split else scaler.scale(loss) / 2
        model.backward(scaled) if is_split else scaled.backward()
        return loss

    step = smp.step(forward_backward)
    losses = []
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 16, generator=generator).to(device)
        y = torch.randint(0, 8, (8,), generator=generator).to(device)
        optimizer.zero_grad()
        if is_split:
            losses.append(float(step(model, x, y).reduce_mean()))
        else:
            parts = [forward_backward(model, *part) for part in zip(x.split(4), y.split(4), strict=True)]
            losses.append(float(torch.stack(parts).mean()))
        scaler.step(optimizer)
        scaler.update()
    return losses


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_autocast_and_grad_scaler(num_ranks):
    parameters = {"microbatches": 2, **(SHARED if num_ranks > 1 else {}), "pipeline_parallel_degree": num_ranks}
    (expected,) = run_ranks(scaled_on_rank, 1, False, environ=ON_GPU)
    for losses in run_ranks(scaled_on_rank, num_ranks, True, parameters=parameters, environ=ON_GPU):
        assert losses == pytest.approx(expected, rel=2e-3)
    assert expected[-1] != expected[0]


def saved_on_rank(path: str, asynchronous: bool) -> list[float]:
    model, optimizer = make_job(0, torch.float64)
    train(model, optimizer, range(3))
    smp.save_checkpoint(path, "t", model=model, optimizer=optimizer, async_save=asynchronous)
    return train(model, optimizer, range(3, 6))


def resumed_on_rank(path: str) -> list[float]:
    model, optimizer = make_job(1, torch.float64)
    smp.resume_from_checkpoint(path, "t")
    return train(model, optimizer, range(3, 6))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints(tmp_path, asynchronous):
    both = {**SHARED, "pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2}
    sharded = {**SHARED, "sharded_data_parallel_degree": 2, "microbatches": 2, "sdp_gradient_clipping": 1e6}
    path = str(tmp_path)
    expected = run_ranks(saved_on_rank, 4, path, asynchronous, parameters=both, environ=ON_GPU)[0]
    for num_ranks, parameters in ((4, both), (2, sharded), (1, {"microbatches": 2})):
        for losses in run_ranks(resumed_on_rank, num_ranks, path, parameters=parameters, environ=ON_GPU):
            assert losses == pytest.approx(expected, rel=1e-9)


def late_on_rank() -> dict[str, Tensor]:
    with smp.delay_param_initialization():
        torch.manual_seed(4)
        net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    model = smp.DistributedModel(net)
    assert all(parameter.is_cuda for parameter in model.parameters())
    return {name: value.cpu() for name, value in model.state_dict().items()}


def test_models_built_late_have_the_weights_of_eager_ones():
    torch.manual_seed(4)
    eager = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)).state_dict()
    for found in run_ranks(late_on_rank, 1, parameters={}, environ=ON_GPU):
        assert all(torch.equal(found[name], value) for name, value in eager.items())


SCRIPT = """
import torch
import smdistributed.modelparallel.torch as smp
smp.init()
device = torch.device("cuda", smp.local_rank() % torch.cuda.device_count())
torch.cuda.set_device(device)
torch.manual_seed(0)
model = smp.DistributedModel(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)))
optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
@smp.step
def step(model, x):
    loss = model(x).square().mean()
    model.backward(loss)
    return loss
x = torch.randn(8, 8, device=device)
for _ in range(3):
    optimizer.zero_grad()
    loss = step(model, x).reduce_mean()
    optimizer.step()
assert loss.is_cuda
print(f"rank {smp.rank()} of {smp.size()} on {loss.device}: {float(loss):.6f}", flush=True)
"""


@pytest.mark.parametrize(("num_ranks", "parameters"), [(1, {}), (2, {**SHARED, "pipeline_parallel_degree": 2})])
def test_a_launched_job(tmp_path, num_ranks, parameters):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "modelparallel", "run", "--nproc", str(num_ranks), "--device", "cuda"]
    command += ["--parameters", json.dumps({"microbatches": 2, **parameters}), str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("on cuda:0: ") == num_ranks, done.stdout


def test_more_processes_than_gpus_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "modelparallel", "run", "--nproc", "9", "--device", "cuda", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "ddp_dist_backend 'gloo'" in " ".join(done.stderr.split())
