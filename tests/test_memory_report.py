"""smp.memory_report(), the formula behind its predictions, and what is said when memory runs out (docs/memory.md)."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

import modelparallel as smp
from modelparallel.errors import OutOfMemoryError, SMPError
from modelparallel.job.session import shutdown
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.memory_summary import memory_summary
from modelparallel.plan.memory_estimate import MemorySettings, ParameterGroup, estimate_memory
from modelparallel.plan.partition import readable_bytes
from modelparallel.training import runtime
from modelparallel.training.memory_report import is_out_of_memory
from pool import run_ranks
from rank_tests import RankTests, on
from training import square_step

BILLION = 10**9


def bytes_per_parameter(settings: MemorySettings, **group) -> float:
    return estimate_memory([ParameterGroup(BILLION, **group)], settings).total / BILLION


def test_bytes_per_parameter_are_those_of_the_guide():
    assert bytes_per_parameter(MemorySettings()) == 16, "fp32 with Adam: 4 + 4 + 8"
    half = {"element_bytes": 2}
    assert bytes_per_parameter(MemorySettings(has_masters=True), **half) == 16, "2 + 2 + 4 + 8"
    assert bytes_per_parameter(MemorySettings(has_masters=True), gradient_bytes=4, **half) == 18
    assert bytes_per_parameter(MemorySettings(has_masters=True, has_master_gradients=True), **half) == 20
    assert bytes_per_parameter(MemorySettings(optimizer_tensors=1)) == 12, "SGD with momentum"
    assert bytes_per_parameter(MemorySettings(optimizer_tensors=0), is_trained=False) == 4
    assert bytes_per_parameter(MemorySettings(), element_bytes=8) == 32, "float64"
    with_buckets = estimate_memory([ParameterGroup(BILLION)], MemorySettings(), bucket_bytes=4 * BILLION)
    assert with_buckets.total == 20 * BILLION and with_buckets.buckets == 4 * BILLION


def test_what_is_shared_out_is_divided():
    assert bytes_per_parameter(MemorySettings(optimizer_shards=4)) == 4 + 4 + 2
    everything = MemorySettings(
        parameter_shards=8, gradient_shards=8, optimizer_shards=8, has_masters=True, has_master_gradients=True
    )
    assert bytes_per_parameter(everything, element_bytes=2) == 20 / 8
    uneven = estimate_memory([ParameterGroup(10)], MemorySettings(optimizer_shards=4))
    assert uneven.optimizer_state == 3 * 8, "the largest share counts"
    mixed = estimate_memory(
        [ParameterGroup(10, 2), ParameterGroup(5, 4, is_trained=False)],
        MemorySettings(has_masters=True),
        buffer_bytes=7,
        activation_bytes=100,
    )
    assert dict(mixed.items()) == {
        "parameters": 40, "gradients": 20, "optimizer state": 80, "masters": 40, "buffers": 7, "reducer buckets": 0,
        "activations": 100,
    }  # fmt: skip
    assert mixed.total == 287
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixed.masters = 1


# The report

ONE = RankTests(1, {"microbatches": 2})
DP2 = RankTests(2, {"microbatches": 2})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4, "memory_weight": 1.0})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
BF16 = RankTests(1, {"bf16": True, "microbatches": 2})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with smp.tensor_parallelism():
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.norm = nn.BatchNorm1d(64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.frozen(self.norm(x))


def trained():
    model = smp.DistributedModel(Net())
    optimizer = smp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))
    square_step(model, torch.randn(8, 64))
    optimizer.step()
    return model, optimizer


@on(ONE, DP2, PP2, TP2, BF16)
def test_each_rank_reports_what_it_holds():
    model, _ = trained()
    local = smp.memory_report(is_local=True)
    report = smp.memory_report()
    assert [rank.global_rank for rank in report.ranks] == list(range(smp.size()))
    own = report.ranks[smp.rank()]
    assert local.ranks[0].held == own.held and local.ranks[0].parameters == own.parameters
    held = list(model.local_parameters())
    updated = [parameter for parameter in held if parameter.requires_grad]
    is_half = smp.state.cfg.bf16
    assert own.parameters == sum(parameter.nbytes for parameter in held)
    # Frozen parameters have neither gradients nor state; each of the others has two moments, and a count of 4 bytes.
    assert own.gradients == sum(parameter.grad.nbytes for parameter in updated)
    num_elements = sum(parameter.numel() for parameter in updated)
    masters = 4 * num_elements if is_half else 0
    assert own.optimizer_state >= 8 * num_elements + masters + 4 * len(updated)
    assert own.optimizer_state <= 8 * num_elements + masters + 4 * len(updated) + 4 * 64 * 65 * is_half
    assert own.buffers == sum(buffer.nbytes for _, buffer in model.named_buffers())
    reduced = [
        parameter
        for parameter in updated
        if (smp.rdp_size() if model.is_scaled_batch_parameter(parameter) else smp.dp_size()) > 1
    ]
    gradient_bytes = sum(parameter.grad.nbytes for parameter in reduced)
    assert gradient_bytes <= own.buckets <= gradient_bytes + 1000 * bool(reduced), "and some flags"
    assert (own.activations is not None) == (smp.pp_size() > 1)
    assert own.resident_peak >= own.resident > own.held and own.device_peak is None
    # Without activations the prediction is the formula; counts of the optimizer and flags of buckets are not in it.
    fixed = own.predicted.total - own.predicted.activations
    assert abs(own.held - (own.activations or 0) - fixed) <= 0.02 * fixed + 4 * 64 * 65 * is_half, (own, fixed)
    lines = str(report).splitlines()
    assert len(lines) == smp.size() + 1 and lines[0].split()[:3] == ["rank", "stage", "parameters"]
    assert "buckets" in lines[0] if smp.dp_size() > 1 else "buckets" not in lines[0]


@on(PP2)
def test_activations_are_those_of_the_microbatches_in_flight():
    model, _ = trained()
    square_step(model, torch.randn(8, 64))
    own = smp.memory_report(is_local=True).ranks[0]
    figures = model.partition_plan.figures[smp.pp_rank()]
    in_flight = 2 if smp.pp_rank() == 0 else 1
    # The models of earlier tests of this process set are alike, and in the report, too.
    num_models = len(runtime.current().models)
    assert figures.activation_bytes > 0 and own.activations == num_models * in_flight * figures.activation_bytes
    assert own.predicted.activations == num_models * (figures.memory_bytes - figures.state_bytes)


@on(DP2)
def test_gradients_that_are_missing_and_models_that_have_not_run():
    model = smp.DistributedModel(nn.Linear(4, 4, bias=False))
    own = smp.memory_report(is_local=True).ranks[0]
    assert (own.parameters, own.gradients, own.optimizer_state) >= (64, 0, 0) and own.predicted.optimizer_state >= 128
    assert model is not None


# Running out of memory


def test_what_counts_as_running_out():
    class FromAllocator(RuntimeError):
        pass

    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(FromAllocator("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(OutOfMemoryError("said"))


def run_out(where):
    model = smp.DistributedModel(nn.Linear(512, 512))
    optimizer = smp.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1))

    @smp.step
    def hungry(model, x):
        loss = model(x).square().mean()
        model.backward(loss)
        if where == "step" and smp.dp_rank() == 1:
            torch.ones(2 * BILLION)
        return loss

    size = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    if where == "optimizer":
        hungry(model, torch.randn(4, 512))

        def allocate(*args):
            return torch.ones(2 * BILLION)

        optimizer.optimizer.register_step_pre_hook(allocate)
    resource.setrlimit(resource.RLIMIT_AS, (size + 1_000_000_000, before[1]))
    try:
        hungry(model, torch.randn(4, 512))
        optimizer.step()
    except SMPError as error:
        return type(error).__name__, isinstance(error, RuntimeError) and isinstance(error, MemoryError), str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
@pytest.mark.parametrize("where", ["step", "optimizer"])
def test_running_out_of_memory_says_who_holds_what_and_what_helps(where):
    parameters = {"microbatches": 2, "ddp": True, "timeout_seconds": 3}
    name, is_both, text = run_ranks(run_out, 2, where, parameters=parameters)[1]
    assert name == "OutOfMemoryError" and is_both
    place = "in hungry, call 1 of a step function" if where == "step" else "in optimizer.step()"
    assert text.startswith(f"global rank 1 (pp_rank 0) ran out of memory {place}: "), text
    assert "allocate" in text and "it holds: parameters 1.0 MiB" in text
    assert "predicted: parameters 1.0 MiB, gradients 1.0 MiB, optimizer state 2.0 MiB" in text
    ways = text.partition("what would help:\n")[2].splitlines()
    assert len(ways) == 3 and "shard_optimizer_state" in text and "microbatches: 4" in text


def leave_memory_behind():
    model = smp.DistributedModel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters()))
    for _ in range(2):
        square_step(model, torch.randn(4, 64))
        optimizer.step()
    held = smp.memory_report(is_local=True).ranks[0].held
    shutdown()
    return held


def test_a_job_ends_with_the_memory_of_each_stage(tmp_path):
    folder = JobFolder(tmp_path)
    parameters = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True}
    environ = {"SMP_EVENT_DIR": str(folder.events)}
    held = run_ranks(leave_memory_behind, 4, parameters=parameters, environ=environ)
    lines = memory_summary(folder)
    assert len(lines) == 2 and all(
        f"memory of stage {stage} (2 ranks, most on rank" in lines[stage] for stage in (0, 1)
    )
    record = json.loads((folder.events / "rank1.memory.json").read_text())
    assert record["held"] == pytest.approx(held[1], rel=0.1)  # the first step had more in flight
    assert 0 < record["predicted"] < record["resident_peak"]
    assert f"{readable_bytes(record['predicted'])} predicted, process peak " in "".join(lines)
    (folder.events / "rank9.memory.json").write_text('{"stage": 7')  # killed meanwhile
    assert memory_summary(folder) == lines
    assert memory_summary(JobFolder(tmp_path / "other")) == []
