"""Partial checkpoints in the layout of the original library: one pickle per rank (smp-api sections 14 and 18)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

import modelparallel as smp
from checkpoint_jobs import Dropping, make_job, train
from modelparallel.errors import CheckpointError, CheckpointNotFoundError, SMPError
from pool import run_ranks
from rank_tests import RankTests, on

CLIPPING = {"sdp_gradient_clipping": 1e6, "sdp_param_persistence_threshold": 0}
ONE = RankTests(1, {})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
PP2_TP2 = RankTests(4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2})
PP2_DP2_BF16 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2, "bf16": True})
SHARDS = RankTests(2, {"shard_optimizer_state": True})
FP16 = RankTests(1, {"fp16": True})


@pytest.fixture(scope="module", autouse=True)
def _in_one_folder(tmp_path_factory):
    """What the ranks make goes with the test's folders."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("ranks"))
    yield
    tempfile.tempdir = before


def shared_folder() -> str:
    return smp.allgather(tempfile.mkdtemp() if smp.rank() == 0 else "", smp.WORLD)[0]


def write_original(folder: str, model, optimizer, *, by_mp_rank: bool = False, content=None) -> None:
    """The files as the documents list them: those of the ranks with rdp_rank 0, shards of the optimizer of all."""
    place = f"{folder}/t_partial"
    os.makedirs(place, exist_ok=True)
    rank = f"{smp.mp_rank()}" if by_mp_rank else f"{smp.pp_rank()}_{smp.tp_rank()}"
    is_sharded = smp.state.cfg.shard_optimizer_state
    state, optimizer_state = model.local_state_dict(), optimizer.local_state_dict(gather_if_shard=not is_sharded)
    if smp.rdp_rank() == 0:
        torch.save(state, f"{place}/model_{rank}.pt")
    if smp.rdp_rank() == 0 or is_sharded:
        torch.save(optimizer_state, f"{place}/optimizer_{rank}{f'_{smp.rdp_rank()}' if is_sharded else ''}.pt")
    if smp.rank() == 0:
        torch.save(content, f"{place}/user_content.pt")
        Path(f"{folder}/newest").write_text("t_partial\n")
    smp.barrier()


@on(ONE, PP2, TP2, PP2_TP2, PP2_DP2_BF16, SHARDS, FP16)
def test_a_job_of_the_same_shape_goes_on_to_the_bit():
    """Before and after the first step; masters and loss scale included."""
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(2))
    write_original(folder, model, optimizer, content={"epoch": 3})
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
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(2))
    write_original(folder, model, optimizer, by_mp_rank=True)
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
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(2))
    write_original(folder, model, optimizer)
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
    folder = shared_folder()
    model, optimizer = make_job(0, make_net=Dropping)
    train(model, optimizer, range(2))
    write_original(folder, model, optimizer)
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
    folder = shared_folder()
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    write_original(folder, model, optimizer)
    state = torch.load(f"{folder}/t_partial/optimizer_1_0.pt")
    if smp.rank() == 1:
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
