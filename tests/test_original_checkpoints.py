"""Partial checkpoints in the layout of the original library: one pickle per rank (smp-api sections 14 and 18)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from smdistributed.modelparallel.torch.sharded_data_parallel_checkpoint import (
    get_full_state_dict_from_sharded_data_parallel_checkpoint as merge,
)

import modelparallel as smp
from checkpoint_jobs import Dropping, make_job, train
from distributed_run import shared_folder
from modelparallel.errors import CheckpointError, CheckpointNotFoundError, SMPError
from pool import run_ranks
from rank_tests import RankTests, on
from sharded_training import TiedGPT

CLIPPING = {"sdp_gradient_clipping": 1e6, "sdp_param_persistence_threshold": 0}
ONE = RankTests(1, {})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
PP2_TP2 = RankTests(4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2})
PP2_DP2_BF16 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2, "bf16": True})
SHARDS = RankTests(2, {"shard_optimizer_state": True})
FP16 = RankTests(1, {"fp16": True})


def write_original(folder: str, model, optimizer, *, by_mp_rank: bool = False, content=None) -> None:
    """The files as the documents list them: those of the ranks with rdp_rank 0, shards of the optimizer of all."""
    place = f"{folder}/t_partial"
    os.makedirs(place, exist_ok=True)
    rank = f"{smp.mp_rank()}" if by_mp_rank else f"{smp.pp_rank()}_{smp.tp_rank()}"
    is_sharded = smp.state.cfg.shard_optimizer_state
    state, optimizer_state = (
        model.local_state_dict(gather_if_shard=True),
        optimizer.local_state_dict(gather_if_shard=not is_sharded),
    )
    if smp.rdp_rank() == 0:
        torch.save(state, f"{place}/model_{rank}.pt")
    if smp.rdp_rank() == 0 or is_sharded:
        torch.save(optimizer_state, f"{place}/optimizer_{rank}{f'_{smp.rdp_rank()}' if is_sharded else ''}.pt")
    if smp.rank() == 0:
        torch.save(content, f"{place}/user_content.pt")
        Path(f"{folder}/newest").write_text("t_partial\n")
    smp.barrier()


def written_job(num_steps: int, make_net: Any = TiedGPT, **how: Any) -> tuple[str, Any, Any]:
    """The folder, model and optimizer of a job that has trained and has written its files; ``how``: as above."""
    folder = shared_folder()
    model, optimizer = make_job(0, make_net=make_net)
    train(model, optimizer, range(num_steps))
    write_original(folder, model, optimizer, **how)
    return folder, model, optimizer


@on(ONE, PP2, TP2, PP2_TP2, PP2_DP2_BF16, SHARDS, FP16)
def test_a_job_of_the_same_shape_goes_on_to_the_bit():
    """Before and after the first step; masters and loss scale included."""
    folder, model, optimizer = written_job(2, content={"epoch": 3})
    expected = train(model, optimizer, range(2, 5))
    for is_stepped in (False, True):
        other, other_optimizer = make_job(1)
        if is_stepped:
            train(other, other_optimizer, range(1))
        assert smp.resume_from_checkpoint(folder, *(["t"] if is_stepped else [])) == {"epoch": 3}
        assert train(other, other_optimizer, range(2, 5)) == expected
        assert other_optimizer.loss_scale == optimizer.loss_scale


@on(PP2)
def test_names_by_mp_rank_and_a_prefix_of_all_names():
    folder, model, optimizer = written_job(2, by_mp_rank=True)
    expected = train(model, optimizer, range(2, 4))
    for _ in range(2):
        other, other_optimizer = make_job(1)
        assert smp.resume_from_checkpoint(folder) is None
        assert train(other, other_optimizer, range(2, 4)) == expected
        file = f"{folder}/t_partial/model_{smp.mp_rank()}.pt"
        state = torch.load(file)
        torch.save({"module": {f"module.{key}": value for key, value in state.items() if key[0] != "_"}}, file)
        smp.barrier()


@on(PP2)
def test_a_stage_takes_what_it_needs_from_the_files_of_the_others():
    """The partition of this job need not be that of the one that saved."""
    folder, model, _optimizer = written_job(2)
    expected = model.state_dict()
    if smp.rank() == 0:  # as if each stage had had what the other has
        place = Path(folder) / "t_partial"
        for old, new in (("model_0_0.pt", "x"), ("model_1_0.pt", "model_0_0.pt"), ("x", "model_1_0.pt")):
            (place / old).rename(place / new)
    smp.barrier()
    for is_stepped in (False, True):
        other, other_optimizer = make_job(1)
        other_optimizer.param_groups[0]["lr"] = other_optimizer.param_groups[1]["lr"] = 0.0
        if is_stepped:
            train(other, other_optimizer, range(1))
        smp.resume_from_checkpoint(folder, load_optimizer=False)
        train(other, other_optimizer, range(1))  # changes nothing; before the first step, it makes the partition
        found = other.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@on(ONE)
def test_options():
    folder, _model, _optimizer = written_job(2, make_net=Dropping)
    state = torch.load(f"{folder}/t_partial/model_0_0.pt")
    first = next(iter(state))
    torch.save({name: value for name, value in state.items() if name != first}, f"{folder}/t_partial/model_0_0.pt")
    _, other_optimizer = make_job(1, make_net=Dropping)
    with pytest.raises(RuntimeError, match=f"missing.*{first}"):
        smp.resume_from_checkpoint(folder)
    smp.resume_from_checkpoint(folder, strict=False, load_optimizer=False)
    assert not other_optimizer.optimizer.state
    smp.resume_from_checkpoint(folder, strict=False, load_sharded_optimizer_state=False)
    assert not other_optimizer.optimizer.state
    smp.resume_from_checkpoint(folder, strict=False)
    assert other_optimizer.optimizer.state
    Path(f"{folder}/t_partial/user_content.pt").write_bytes(b"")  # the Trainer's mark
    assert smp.resume_from_checkpoint(folder, "t", strict=False) is None
    with pytest.raises(CheckpointError, match="keeps no place in the data"):
        smp.resume_from_checkpoint(folder, "t", data_loader=smp.GlobalBatchSampler(8, batch_size=2))
    with pytest.raises(CheckpointNotFoundError):
        smp.resume_from_checkpoint(folder, "newest-complete")


class Foreign:
    """A class that is not on the allow-list."""


@on(PP2)
def test_pickles_of_others_are_not_opened():
    """What one rank is refused is an error on all."""
    folder, _model, _optimizer = written_job(1)
    if smp.rank() == 1:
        state = torch.load(f"{folder}/t_partial/optimizer_1_0.pt")
        torch.save({**state, "scheduler": Foreign()}, f"{folder}/t_partial/optimizer_1_0.pt")
    smp.barrier()
    with pytest.raises(CheckpointError, match=r"Foreign, which is not allowed.*allowed_types") as caught:
        smp.resume_from_checkpoint(folder)
    assert ("rank 1 failed" in str(caught.value)) is (smp.rank() == 0)
    smp.resume_from_checkpoint(folder, allowed_types=[Foreign])
    smp.resume_from_checkpoint(folder, trust_pickles=True)
    smp.resume_from_checkpoint(folder, load_optimizer=False)
    if smp.rank() == 0:
        torch.save(torch.zeros(3), f"{folder}/t_partial/model_0_0.pt")
    smp.barrier()
    with pytest.raises(CheckpointError, match="holds a Tensor and not the state dict of a model"):
        smp.resume_from_checkpoint(folder)


def write_on_ranks(folder: str) -> None:
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    write_original(folder, model, optimizer)


def resume_on_ranks(folder: str) -> str:
    make_job(1)
    with pytest.raises(CheckpointError) as caught:
        smp.resume_from_checkpoint(folder, "t")
    return str(caught.value)


def test_another_number_of_ranks_is_refused(tmp_path):
    shape = {"pipeline_parallel_degree": 2, "microbatches": 2, "ddp": True}
    run_ranks(write_on_ranks, 2, str(tmp_path), parameters=shape)
    for degrees in ({}, {"tensor_parallel_degree": 2}):
        for text in run_ranks(resume_on_ranks, 2, str(tmp_path), parameters={"ddp": True, **degrees}):
            assert (
                "saved with pipeline_parallel_degree=2 and tensor_parallel_degree=1 (model_0_0.pt, model_1_0.pt)"
                in text
            )
            assert "this job has pipeline_parallel_degree=1" in text and isinstance(CheckpointError(text), SMPError)
    os.unlink(tmp_path / "t_partial" / "model_0_0.pt")
    for text in run_ranks(resume_on_ranks, 2, str(tmp_path), parameters=shape):
        assert "model_1_0.pt), and this job" in text
    torch.save({}, tmp_path / "t_partial" / "model_0.pt")
    for text in run_ranks(resume_on_ranks, 2, str(tmp_path), parameters=shape):
        assert "two sorts of names" in text


# Merging a checkpoint of sharded data parallelism in one process


def write_sharded(folder: Path, num_shards: int) -> dict[str, torch.Tensor]:
    """The layout that the converter of the original's examples reads; returns what is in it."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[dict[str, tuple[int, ...]]] = [
        {"module.a.weight": (3, 5), "module.a.bias": (3,)},
        {"module.b": (7,)},
    ]
    whole = {name: torch.randn(shape, generator=generator) for group in shapes for name, shape in group.items()}
    buffers = {"module.mean": torch.randn(2, generator=generator), "module.count": torch.tensor(3)}
    place = folder / "t_partial"
    place.mkdir()
    module = {**{name: value.bfloat16() for name, value in whole.items()}, **buffers}
    torch.save({"module": module}, place / "model_0.pt")
    sizes = [{name: torch.Size(shape) for name, shape in group.items()} for group in shapes]
    torch.save({"buffer_names": list(buffers), "param_shapes": sizes, "epoch": 1}, place / "user_content.pt")
    flats = [torch.cat([whole[name].flatten() for name in group]) for group in shapes]
    padded = [torch.cat([flat, torch.zeros(-len(flat) % (2 * num_shards))]) for flat in flats]
    for index in range(num_shards):
        own = [flat.chunk(num_shards)[index].clone() for flat in padded]
        torch.save({"partition_count": [num_shards] * 2, "fp32_flat_groups": own}, place / f"optimizer_{index}.pt")
    (folder / "newest").write_text("t_partial")
    return {name.removeprefix("module."): value for name, value in {**whole, **buffers}.items()}


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_shards_of_the_original_are_merged(tmp_path, num_shards):
    expected = write_sharded(tmp_path, num_shards)
    for arguments in ({}, {"tag": "t_partial"}, {"tag": "t"}):
        found = merge(str(tmp_path), **arguments)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = merge(tmp_path, dtype=torch.float16)
    assert found["count"].dtype == torch.int64
    torch.testing.assert_close(found["a.weight"], expected["a.weight"].half(), rtol=0, atol=0)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    write_sharded(tmp_path, 2)
    place = tmp_path / "t_partial"
    first = torch.load(place / "optimizer_0.pt")
    flats = first["fp32_flat_groups"]
    torch.save({**first, "fp32_flat_groups": [flat.flip(0) for flat in flats]}, place / "optimizer_0.pt")
    with pytest.raises(CheckpointError, match=r"'module\.a\.weight' cut from the shards is not"):
        merge(tmp_path)
    torch.save({**first, "fp32_flat_groups": [flat[:2] for flat in flats]}, place / "optimizer_0.pt")
    with pytest.raises(CheckpointError, match=r"have 12 elements, and its parameters 18"):
        merge(tmp_path)
    torch.save(first, place / "optimizer_0.pt")
    (place / "optimizer_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no file 'optimizer_1\.pt'"):
        merge(tmp_path)
    torch.save({**first, "other": Foreign()}, place / "optimizer_0.pt")
    with pytest.raises(CheckpointError, match=r"Foreign, which is not allowed"):
        merge(tmp_path)
    torch.save(None, place / "user_content.pt")
    with pytest.raises(CheckpointError, match=r"'param_shapes'"):
        merge(tmp_path)


@on(ONE)
def test_a_job_does_not_resume_from_shards_of_the_original():
    folder = shared_folder()
    write_sharded(Path(folder), 1)
    job = make_job(0)
    with pytest.raises(CheckpointError, match="get_full_state_dict_from_sharded_data_parallel_checkpoint"):
        smp.resume_from_checkpoint(folder, strict=False)
    del job


def save_sharded(folder: str) -> None:
    model, optimizer = make_job(0)
    train(model, optimizer, range(2))
    smp.save_checkpoint(folder, "t")
    smp.save_checkpoint(folder, "full", partial=False, full_optimizer=True)


@pytest.mark.parametrize("has_masters", [False, True])
def test_our_sharded_checkpoints_are_merged(tmp_path, has_masters):
    """fp32 masters where there are some; the plain model takes the result."""
    masters_of = {"shard_optimizer_state": True, "bf16": True}  # sharded parameters are in fp32 themselves
    shape = masters_of if has_masters else {"sharded_data_parallel_degree": 2, "fp16": True, **CLIPPING}
    run_ranks(save_sharded, 2, str(tmp_path), parameters={"ddp": True, **shape})
    full = torch.load(tmp_path / "full")
    found = merge(tmp_path, "t")
    assert found.keys() == full.keys()
    for name in full:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].to(full[name].dtype), full[name]), name
    if has_masters:
        masters = [values["fp32_master"] for values in torch.load(tmp_path / "optimizer_full")["state"].values()]
        assert any(torch.equal(found["positions"], master) for master in masters)
        assert not torch.equal(found["positions"], full["positions"].float())
    TiedGPT().load_state_dict(found)
    assert merge(tmp_path, "t", torch.float64)["positions"].dtype == torch.float64
    (tmp_path / "t_partial" / "model_0_0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not what was written"):
        merge(tmp_path, "t")
