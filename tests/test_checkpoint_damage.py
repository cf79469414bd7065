"""Damaged checkpoints, and disks without room, in whole jobs: all ranks hear of it, and nothing wrong is loaded."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import modelparallel as smp
from checkpoint_jobs import make_job, train
from distributed_run import shared_folder
from logs import logged_lines
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from rank_tests import RankTests, on

PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
PP2_DP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})


@contextmanager
def on_first_rank(change: Callable[[], None]) -> Iterator[None]:
    """All ranks enter when rank 0 has made the change, and leave together."""
    if smp.rank() == 0:
        change()
    smp.barrier()
    yield
    smp.barrier()


def saved_job() -> tuple[Path, Any]:
    """A folder with a checkpoint of a job after one step, and the model and optimizer, which live as long."""
    folder = Path(shared_folder())
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    smp.save_checkpoint(folder, "t", model=model, optimizer=optimizer, user_content="t")
    return folder, (model, optimizer)


def flip(path: Path, rng: random.Random) -> None:
    """One bit, anywhere."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


DAMAGES = {"flip": flip, "cut": cut, "remove": remove}
#: Each damage of each file, or each file once, by turns.
EVERY, IN_TURNS = "every", "in turns"


def damages_of(names: list[str], which: str) -> list[tuple[str, str]]:
    pairs = [(name, kind) for name in names for kind in DAMAGES]
    return pairs if which == EVERY else [pairs[(3 * index + index % 3)] for index in range(len(names))]


@on(PP2)
def test_damage_to_any_file_is_named_and_passed_over():
    check_damage_to_any_file(IN_TURNS)


@pytest.mark.slow
@on(RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2, "seed": 1}))
def test_any_damage_to_any_file_is_named_and_passed_over():
    check_damage_to_any_file(EVERY)


def check_damage_to_any_file(which: str) -> None:
    folder = Path(shared_folder())
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    for tag in ("old", "new"):
        smp.save_checkpoint(folder, tag, model=model, optimizer=optimizer, user_content=tag)
    newest, whole = folder / "new_partial", folder / "new_partial.whole"
    names = sorted(path.name for path in newest.iterdir())
    assert {".metadata", "complete.json", "plan.json", "user_content.pt", "job_1_0.pt", "optimizer_1_0.pt"} <= {*names}
    with on_first_rank(lambda: shutil.copytree(newest, whole)):
        pass
    for number, (name, kind) in enumerate(damages_of(names, which)):
        rng = random.Random(number)
        with on_first_rank(lambda name=name, kind=kind, rng=rng: DAMAGES[kind](newest / name, rng)):
            for tag in (None, "new")[: 2 if which == EVERY else 1]:
                with pytest.raises((CheckpointCorruptError, CheckpointNotFoundError)) as caught:
                    smp.resume_from_checkpoint(folder, tag)
                assert name in str(caught.value), (name, kind)
            with logged_lines(logging.WARNING) as texts:
                assert smp.resume_from_checkpoint(folder, "newest-complete") == "old", (name, kind)
            if smp.rank() == 0:
                assert len(texts) == 1 and "new_partial" in texts[0] and "passed over" in texts[0], (name, kind, texts)
                assert name in texts[0]
        with on_first_rank(lambda name=name: shutil.copy(whole / name, newest / name)):
            pass
    with logged_lines(logging.WARNING) as texts:
        assert smp.resume_from_checkpoint(folder, "newest-complete") == "new"
    assert texts == []


@on(PP2)
def test_damage_to_any_file_of_a_full_checkpoint_is_named():
    folder = Path(shared_folder())
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    arguments = {"partial": False, "model": model, "optimizer": optimizer, "full_optimizer": True}
    smp.save_checkpoint(folder, "t", user_content="t", **arguments)
    with on_first_rank(lambda: shutil.copytree(folder, folder / "whole")):
        pass
    for number, (name, kind) in enumerate(damages_of(["t", "optimizer_t", "user_content_t", "complete_t.json"], EVERY)):
        if (name, kind) == ("complete_t.json", "remove"):
            continue  # a state dict without a record is somebody else's, and is read
        rng = random.Random(number)
        with on_first_rank(lambda name=name, kind=kind, rng=rng: DAMAGES[kind](folder / name, rng)):
            with pytest.raises(CheckpointCorruptError) as caught:
                smp.resume_from_checkpoint(folder, partial=False)
            assert name in str(caught.value), (name, kind)
        with on_first_rank(lambda name=name: shutil.copy(folder / "whole" / name, folder / name)):
            pass
    assert smp.resume_from_checkpoint(folder, partial=False) == "t"


@on(PP2)
def test_a_damaged_name_of_the_newest_is_an_error_on_all_ranks():
    folder, _job = saved_job()
    for data, text in ((b"\xff\xfe", "is not text"), (b"../t_partial", "is not the name of a file below")):
        with on_first_rank(lambda data=data: (folder / "newest").write_bytes(data)):
            for partial in (True, False):
                with pytest.raises(CheckpointError, match=text):
                    smp.resume_from_checkpoint(folder, partial=partial)
            assert smp.resume_from_checkpoint(folder, "newest-complete") == "t"


@on(PP2)
def test_without_comparing_digests_sizes_are_compared_and_broken_files_are_errors():
    folder, _job = saved_job()
    newest = folder / "t_partial"
    with on_first_rank(lambda: shutil.copytree(newest, folder / "whole")):
        pass
    for name in sorted(path.name for path in newest.iterdir()):
        with on_first_rank(lambda name=name: os.truncate(newest / name, (newest / name).stat().st_size - 1)):
            with pytest.raises(CheckpointCorruptError) as caught:
                smp.resume_from_checkpoint(folder, verify=False)
            assert name in str(caught.value)
        spoil = lambda name=name: (newest / name).write_bytes(b"\0" * (folder / "whole" / name).stat().st_size)  # noqa: E731
        with on_first_rank(spoil), pytest.raises(CheckpointError):
            smp.resume_from_checkpoint(folder, verify=False)
        with on_first_rank(lambda name=name: shutil.copy(folder / "whole" / name, newest / name)):
            pass
    assert smp.resume_from_checkpoint(folder, verify=False) == "t"


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """On this rank."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@on(PP2, PP2_DP2)
def test_a_limit_of_the_files_sizes_fails_every_kind_of_save_and_spoils_nothing():
    """On one rank, or on all."""
    folder = Path(shared_folder())
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    smp.save_checkpoint(folder, "a", model=model, optimizer=optimizer, user_content="partial")
    smp.save_checkpoint(folder, "b", partial=False, model=model, optimizer=optimizer, user_content="full")
    before = sorted(path.name for path in folder.iterdir())
    smp.barrier()
    weights = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    train(model, optimizer, range(1, 2))
    limits = {"all": 400, "last": 400 if smp.rank() == smp.size() - 1 else 10**9}
    for ranks, kind in [("all", "partial"), ("last", "partial"), ("all", "background"), ("last", "background"),
                        ("all", "full")]:  # fmt: skip
        arguments = {"partial": False} if kind == "full" else {"async_save": kind == "background"}
        with files_of_at_most(limits[ranks]), pytest.raises(CheckpointError, match="EFBIG") as caught:
            for tag in ("b" if kind == "full" else "a",):
                pending = smp.save_checkpoint(folder, tag, model=model, optimizer=optimizer, **arguments)
                if pending is not None:
                    pending.wait()
        assert "ulimit -f" in str(caught.value)
        smp.barrier()
        assert sorted(path.name for path in folder.iterdir()) == before, (ranks, kind)
        smp.barrier()
    for arguments, content in (({"tag": "newest-complete"}, "partial"), ({"tag": "b", "partial": False}, "full")):
        assert smp.resume_from_checkpoint(folder, **arguments) == content
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in weights.items())
        train(model, optimizer, range(1, 2))


@on(PP2)
def test_a_changed_number_of_the_format_is_damage_and_not_a_newer_version():
    folder = Path(shared_folder())
    model, optimizer = make_job(0)
    train(model, optimizer, range(1))
    for tag in ("old", "new"):
        smp.save_checkpoint(folder, tag, model=model, optimizer=optimizer, user_content=tag)
    record = folder / "new_partial" / "complete.json"
    with on_first_rank(lambda: record.write_text(json.dumps({**json.loads(record.read_text()), "format": 3}))):
        assert smp.resume_from_checkpoint(folder, "newest-complete") == "old"
        smp.save_checkpoint(folder, "next", model=model, optimizer=optimizer, num_kept_partial_checkpoints=1)
