"""``smp.save_checkpoint`` and ``smp.resume_from_checkpoint`` with ``partial=True`` (smp-api section 14)."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import modelparallel as smp
from checkpoint_jobs import Dropping, make_job, train
from distributed_run import shared_folder
from modelparallel.checkpoints.partial.dcp_storage import DraftWriter
from modelparallel.checkpoints.stores.local import HashingFileSystem
from modelparallel.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    DivergenceError,
    SMPConfigError,
    StepUsageError,
)
from pool import run_ranks
from rank_tests import RankTests, on
from training import square_step

CLIPPING = {"sdp_gradient_clipping": 1e6, "sdp_param_persistence_threshold": 0}
ONE = RankTests(1, {})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
PP2_FP16 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "fp16": True})
SHARDED_BF16 = RankTests(2, {"shard_optimizer_state": True, "bf16": True})
FSDP_FP16 = RankTests(2, {"sharded_data_parallel_degree": 2, "fp16": True, **CLIPPING})
PP2_DP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})
SEEDED = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "seed": 7})
SCALED = {"dynamic_loss_scale": True, "dynamic_loss_args": {"init_scale": 2.0**12, "scale_window": 2}}


@on(PP2, TP2, PP2_FP16, SHARDED_BF16, FSDP_FP16, PP2_DP2, SEEDED)
def test_a_resumed_job_goes_on_to_the_bit():
    """Model, optimizer, masters, loss scale and random numbers."""
    folder = shared_folder()
    arguments = SCALED if smp.state.cfg.fp16 else {}
    model, optimizer = make_job(0, make_net=Dropping, **arguments)
    train(model, optimizer, range(3))
    smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer)
    scale = optimizer.loss_scale
    expected = train(model, optimizer, range(3, 7))
    other, other_optimizer = make_job(1, make_net=Dropping, **arguments)
    smp.resume_from_checkpoint(folder, "t")
    if not smp.pp_size() > 1:
        assert other_optimizer.loss_scale == scale
    assert train(other, other_optimizer, range(3, 7)) == expected
    assert other_optimizer.loss_scale == optimizer.loss_scale
    state, found = model.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], found[name]) for name in state)


@on(PP2, PP2_FP16)
def test_c088_state_dicts_loaded_before_the_first_step_take_effect_in_it():
    arguments = SCALED if smp.state.cfg.fp16 else {}
    model, optimizer = make_job(0, **arguments)
    train(model, optimizer, range(3))
    full = model.state_dict(), optimizer.state_dict()
    local = model.local_state_dict(gather_if_shard=True)
    own = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in local.items()}
    partial = own, optimizer.local_state_dict()
    partial = torch.load(saved_to_memory(partial), weights_only=True)
    full = torch.load(saved_to_memory(full), weights_only=True)
    expected = train(model, optimizer, range(3, 6))
    for model_state, optimizer_state in (full, partial):
        other, other_optimizer = make_job(1, **arguments)
        other.load_state_dict(model_state)
        other_optimizer.load_state_dict(optimizer_state)
        assert train(other, other_optimizer, range(3, 6)) == expected


def saved_to_memory(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@on(ONE, PP2, TP2, PP2_DP2)
def test_c090_files_newest_user_content_and_the_number_that_is_kept():
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    content = {"epoch": 3, "history": [1.0, 2.0]}
    for tag in ("t1", "t2", "t3"):
        smp.save_checkpoint(
            folder, tag=tag, partial=True, model=model, optimizer=optimizer, user_content={**content, "tag": tag},
            num_kept_partial_checkpoints=2,
        )  # fmt: skip
        names = {path.name for path in (Path(folder) / f"{tag}_partial").iterdir()}
        expected = {f"{noun}_{pp}_{tp}.pt" for noun in ("model", "optimizer") for pp in range(smp.pp_size())
                    for tp in range(smp.tp_size())}  # fmt: skip
        assert names >= expected | {"user_content.pt", ".metadata", "complete.json"}
        assert (Path(folder) / "newest").read_text().strip() == f"{tag}_partial"
        smp.barrier()
    assert {path.name for path in Path(folder).iterdir()} == {"t2_partial", "t3_partial", "newest"}
    assert smp.resume_from_checkpoint(folder) == {**content, "tag": "t3"}
    assert smp.resume_from_checkpoint(folder, "t2") == {**content, "tag": "t2"}
    with pytest.raises(CheckpointNotFoundError, match="t1_partial"):
        smp.resume_from_checkpoint(folder, "t1")


@on(PP2_DP2)
def test_copies_share_the_writing():
    """No tensor is written twice, and both copies write."""
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer)
    files = json.loads((Path(folder) / "t_partial" / "complete.json").read_text())["files"]
    assert {f"model_{pp}_0{rdp}.pt" for pp in range(2) for rdp in ("", "_1")} <= files.keys()
    num_elements = sum(torch.Size(row.full_shape).numel() for row, _ in model.table.parameters())
    written = sum(entry["size"] for name, entry in files.items() if name.startswith("model_"))
    num_tensors = sum(1 for _ in model.table.parameters())
    assert num_elements * 4 < written < num_elements * 4 + 3000 * num_tensors


class Uneven(nn.Module):
    """Memory is in the first layers, and work in the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(40, 40) for _ in range(3))
        self.long = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.wide:
            x = torch.tanh(layer(x))
        x = x[:, None, :6].expand(-1, 200, 6)
        for layer in self.long:
            x = torch.tanh(layer(x))
        return x


def plan_on_ranks(folder: str, saves: bool, resumes: bool) -> tuple[tuple[str, int], ...]:
    torch.manual_seed(0)
    model = smp.DistributedModel(Uneven())
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    if resumes:
        smp.resume_from_checkpoint(folder)
    square_step(model, torch.randn(8, 40))
    if saves:
        smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer)
    return model.partition_plan.modules


def test_c092_a_partial_checkpoint_brings_its_plan(tmp_path):
    settings = {"pipeline_parallel_degree": 2, "microbatches": 2}
    by_memory, by_work = {**settings, "memory_weight": 1.0}, {**settings, "memory_weight": 0.0}
    saved = run_ranks(plan_on_ranks, 2, str(tmp_path), True, False, parameters=by_memory)[0]
    fresh = run_ranks(plan_on_ranks, 2, str(tmp_path), False, False, parameters=by_work)[0]
    resumed = run_ranks(plan_on_ranks, 2, str(tmp_path), False, True, parameters=by_work)[0]
    assert saved != fresh
    assert resumed == saved


@on(PP2, TP2)
def test_saving_in_the_background_keeps_what_was_there_when_it_began():
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(2))
    smp.save_checkpoint(folder, "blocking", model=model, optimizer=optimizer)
    pending = smp.save_checkpoint(folder, "background", model=model, optimizer=optimizer, async_save=True)
    expected = train(model, optimizer, range(2, 4))
    pending.wait()
    assert pending.done()
    records = [json.loads((Path(folder) / f"{tag}_partial" / "complete.json").read_text())["files"]
               for tag in ("blocking", "background")]  # fmt: skip
    tensors = [{name: entry for name, entry in record.items() if name.endswith(".pt") and "job" not in name}
               for record in records]  # fmt: skip
    assert tensors[0] == tensors[1] and tensors[0]
    other, other_optimizer = make_job(1)
    smp.resume_from_checkpoint(folder, "background")
    assert train(other, other_optimizer, range(2, 4)) == expected


@on(PP2)
def test_a_second_save_waits_or_is_refused():
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    may_write, original = threading.Event(), DraftWriter.write_data

    def write_later(self, plan, planner):
        assert may_write.wait(20)
        return original(self, plan, planner)

    DraftWriter.write_data = write_later
    try:
        pending = smp.save_checkpoint(folder, "a", model=model, optimizer=optimizer, async_save=True)
        assert not pending.done()
        with pytest.raises(CheckpointError, match="'a' is still being written"):
            smp.save_checkpoint(folder, "b", model=model, optimizer=optimizer, if_saving="refuse")
        threading.Timer(0.3, may_write.set).start()
        smp.save_checkpoint(folder, "c", model=model, optimizer=optimizer)
    finally:
        DraftWriter.write_data = original
    assert {path.name for path in Path(folder).iterdir()} == {"a_partial", "c_partial", "newest"}


def break_disk_of(rank: int):
    """From now on nothing can be written on that rank; returns what ends it."""
    original = HashingFileSystem.create_stream

    def create_stream(self, path, mode):
        if mode == "wb" and smp.rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(self, path, mode)

    HashingFileSystem.create_stream = create_stream

    def mend():
        HashingFileSystem.create_stream = original

    return mend


@on(PP2, PP2_DP2)
def test_a_rank_that_cannot_write_fails_the_save_everywhere_and_spoils_nothing():
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    smp.save_checkpoint(folder, "good", model=model, optimizer=optimizer, user_content="good")
    for is_async in (False, True):
        mend = break_disk_of(smp.size() - 1)
        try:
            with pytest.raises(CheckpointError, match=f"rank {smp.size() - 1}.*No space left"):
                pending = smp.save_checkpoint(folder, "bad", model=model, optimizer=optimizer, async_save=is_async)
                pending.wait()
        finally:
            mend()
        smp.barrier()
        assert {path.name for path in Path(folder).iterdir()} == {"good_partial", "newest"}
        smp.barrier()
    assert smp.resume_from_checkpoint(folder) == "good"
    smp.save_checkpoint(folder, "bad", model=model, optimizer=optimizer, user_content="mended")
    assert smp.resume_from_checkpoint(folder) == "mended"


class BrokenLoader:
    """Fails on the last rank alone."""

    def state_dict(self):
        if smp.rank() == smp.size() - 1:
            raise OSError("the index of the data is gone")
        return {"place": 3}

    def load_state_dict(self, state):
        self.state_dict()


class GoodLoader(BrokenLoader):
    def state_dict(self):
        return {"place": 3}

    def load_state_dict(self, state):
        self.place = state["place"]


@on(PP2, PP2_DP2)
def test_what_fails_on_one_rank_before_the_files_fails_everywhere():
    folder, is_last = shared_folder(), smp.rank() == smp.size() - 1
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    cause = (
        (OSError, "the index of the data is gone") if is_last else (CheckpointError, f"rank {smp.size() - 1} failed")
    )
    with pytest.raises(cause[0], match=cause[1]):
        smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer, data_loader=BrokenLoader())
    content = (lambda: 0) if smp.rank() == 0 else None
    with pytest.raises(CheckpointError, match="user_content cannot be saved"):
        smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer, user_content=content)
    smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer, data_loader=GoodLoader())
    with pytest.raises(cause[0], match=cause[1]):
        smp.resume_from_checkpoint(folder, data_loader=BrokenLoader())
    loader = GoodLoader()
    smp.resume_from_checkpoint(folder, data_loader=loader)
    assert loader.place == 3


@on(PP2)
def test_damage_is_found_by_all_and_passed_over_where_that_is_asked_for():
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    for tag in ("old", "new"):
        smp.save_checkpoint(folder, tag, model=model, optimizer=optimizer, user_content=tag)
    file = Path(folder) / "new_partial" / "optimizer_1_0.pt"
    if smp.rank() == 0:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    smp.barrier()
    with pytest.raises(CheckpointCorruptError, match=r"optimizer_1_0\.pt"):
        smp.resume_from_checkpoint(folder)
    assert smp.resume_from_checkpoint(folder, tag="newest-complete") == "old"
    if smp.rank() == 0:
        shutil.rmtree(Path(folder) / "old_partial")
    smp.barrier()
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint in .* is whole"):
        smp.resume_from_checkpoint(folder, tag="newest-complete")


@on(PP2)
def test_wrong_calls_say_what_is_wrong():
    folder = shared_folder()
    model, optimizer = make_job(0)
    with pytest.raises(StepUsageError, match="not partitioned yet"):
        smp.save_checkpoint(folder, "t", model=model)
    train(model, optimizer, range(1))
    for arguments, text in [
        ({"num_kept_partial_checkpoints": 0}, "num_kept_partial_checkpoints=0"),
        ({"if_saving": "hope"}, "if_saving='hope'"),
        ({"model": nn.Linear(1, 1)}, r"expected a smp\.DistributedModel, got Linear"),
        ({"partial": False, "async_save": True, "model": model}, "needs partial=True"),
        ({"data_loader": object()}, "no state_dict"),
    ]:
        with pytest.raises(SMPConfigError, match=text):
            smp.save_checkpoint(folder, "t", **arguments)
    with pytest.raises(DivergenceError, match="rank 1"):
        smp.save_checkpoint(folder, f"t{smp.rank()}", model=model)
    with pytest.raises(CheckpointNotFoundError, match="no file 'newest'"):
        smp.resume_from_checkpoint(folder)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x))


class Larger(Other):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 5)


class WithMore(Other):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(4, 4)


@on(ONE)
def test_another_model_is_refused_unless_what_both_have_is_asked_for():
    folder = shared_folder()
    model = smp.DistributedModel(Other())
    optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer)
    larger = smp.DistributedModel(Larger())
    larger_optimizer = smp.DistributedOptimizer(torch.optim.SGD(larger.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"'model\.second\.\w+' has shape"):
        smp.resume_from_checkpoint(folder, load_optimizer=False)
    more = smp.DistributedModel(WithMore())
    more_optimizer = smp.DistributedOptimizer(torch.optim.SGD(more.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"lacks third\.bias, third\.weight"):
        smp.resume_from_checkpoint(folder)
    with pytest.raises(CheckpointError, match="groups"):
        smp.resume_from_checkpoint(folder, strict=False)
    smp.resume_from_checkpoint(folder, strict=False, load_optimizer=False)
    assert torch.equal(more.state_dict()["first.weight"], model.state_dict()["first.weight"])
    del larger_optimizer, more_optimizer  # kept so far, since only those that live are resumed


class Secret:
    """Not among the types that open by themselves."""

    def __init__(self) -> None:
        self.value = 5


@on(ONE)
def test_foreign_objects_open_only_when_they_are_named():
    folder = shared_folder()
    model, optimizer = make_job(0)
    smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer, user_content={"secret": Secret()})
    with pytest.raises(CheckpointError, match="Secret"):
        smp.resume_from_checkpoint(folder)
    assert smp.resume_from_checkpoint(folder, allowed_types=[Secret])["secret"].value == 5
    assert smp.resume_from_checkpoint(folder, trust_pickles=True)["secret"].value == 5


def sample_on_ranks(folder: str, tag: str, num_batches: int, saves_as: str | None) -> list[list[int]]:
    """The samples of each global batch, in order."""
    make_job(0)
    sampler = smp.GlobalBatchSampler(23, 6, seed=4)
    loader = DataLoader(range(23), batch_sampler=sampler)
    if tag:
        smp.resume_from_checkpoint(folder, tag, data_loader=sampler)
    taken: list[list[int]] = []
    while len(taken) < num_batches:
        for batch in loader:
            parts = smp.allgather(batch.tolist(), smp.DP_GROUP)
            taken.append([index for part in parts for index in part])
            if len(taken) == num_batches:
                break
    if saves_as:
        smp.save_checkpoint(folder, saves_as, data_loader=sampler)
    return taken


def test_another_number_of_ranks_goes_on_with_the_next_sample(tmp_path):
    folder, ddp = str(tmp_path), {"ddp": True}
    expected = run_ranks(sample_on_ranks, 1, folder, "", 8, None, parameters=ddp)[0]
    before = run_ranks(sample_on_ranks, 2, folder, "", 2, "two", parameters=ddp)[0]
    middle = run_ranks(sample_on_ranks, 3, folder, "two", 3, "three", parameters=ddp)[0]
    after = run_ranks(sample_on_ranks, 1, folder, "three", 3, None, parameters=ddp)[0]
    assert before + middle + after == expected
    first, second = ([index for batch in epoch for index in batch] for epoch in (expected[:3], expected[3:6]))
    assert len(set(first)) == len(set(second)) == 18 and first != second  # epochs are shuffled anew
