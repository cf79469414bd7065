"""``smp.save`` and ``smp.load``: names of parts, atomic writes, errors (smp-api sections 14 and 18)."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

import modelparallel as smp
from distributed_run import shared_folder
from logs import logged_lines
from modelparallel.checkpoints.stores.local import LocalStore
from modelparallel.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    NotInitializedError,
    SMPError,
)
from pool import run_ranks
from rank_tests import RankTests, on

PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
DP2 = RankTests(2, {})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
PP2_TP2_SPREAD = RankTests(
    4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "placement_strategy": "spread", "microbatches": 2}
)
TP2_DP2 = RankTests(4, {"tensor_parallel_degree": 2})


def names_in(folder: str) -> list[str]:
    smp.barrier()
    return sorted(os.listdir(folder))


def writes_parts() -> bool:
    return (smp.rdp_rank() if smp.tp_size() > 1 else smp.dp_rank()) == 0


@on(PP2, DP2, TP2, PP2_TP2_SPREAD, TP2_DP2)
def test_c086_names_of_parts():
    folder = shared_folder()
    path = f"{folder}/f.pt"
    own = {"rank": smp.mp_rank(), "args": argparse.Namespace(lr=0.1), "tensor": torch.full((3,), smp.mp_rank())}
    if writes_parts():
        smp.save(own, path)
    if smp.tp_size() > 1:
        expected = [f"f.pt_{pp}_{tp}" for pp in range(smp.pp_size()) for tp in range(smp.tp_size())]
    else:
        expected = [f"f.pt_{mp_rank}" for mp_rank in range(smp.mp_size())]
    assert names_in(folder) == expected
    for arguments in ({}, {"back_compat": True}):
        loaded = smp.load(path, **arguments)
        assert loaded["rank"] == smp.mp_rank() and loaded["args"].lr == 0.1
        assert torch.equal(loaded["tensor"], own["tensor"])
    smp.barrier()
    if smp.tp_size() == 1 and writes_parts():
        os.remove(f"{path}_{smp.mp_rank()}")  # as BERT's script removes what it wrote
    smp.barrier()
    if smp.tp_size() == 1:
        with pytest.raises(CheckpointNotFoundError, match=rf"{path}_{smp.pp_rank()}_0_{smp.rdp_rank()}, "):
            smp.load(path)


@on(PP2, DP2, TP2_DP2)
def test_parts_of_every_rank_with_v3():
    folder = shared_folder()
    smp.save(smp.rank(), f"{folder}/f.pt", v3=True)
    own = f"f.pt_{smp.pp_rank()}_{smp.tp_rank()}_{smp.rdp_rank()}"
    assert own in names_in(folder) and len(os.listdir(folder)) == smp.size()
    assert torch.load(f"{folder}/{own}", weights_only=False) == smp.rank()  # scripts read them so
    assert smp.load(f"{folder}/f.pt") == smp.rank()


@on(PP2, TP2)
def test_parts_are_looked_for_under_each_name_in_turn():
    folder = shared_folder()
    path = f"{folder}/f.pt"
    ways = [f"_{smp.mp_rank()}", f"_{smp.pp_rank()}_{smp.tp_rank()}", f"_{smp.pp_rank()}_{smp.tp_rank()}_0"]
    with logged_lines() as records:
        for number, way in enumerate(ways):
            torch.save(number, path + way)
            assert smp.load(path) == number and smp.load(path, back_compat=True) == 0
    assert len(records) == 4 and "parts of several saves are mixed here" in records[0]


def test_c086_whole_objects_need_no_ranks(tmp_path):
    path = str(tmp_path / "f.pt")
    smp.save({"a": torch.ones(2)}, path, partial=False)
    assert os.listdir(tmp_path) == ["f.pt"]
    assert torch.equal(torch.load(path)["a"], torch.ones(2))
    for arguments in ({}, {"weights_only": True}, {"mmap": True}, {"map_location": "cpu"}, {"pickle_module": pickle}):
        assert torch.equal(smp.load(path, partial=False, **arguments)["a"], torch.ones(2))
    torch.save([1, 2], path)
    assert smp.load(path, partial=False) == [1, 2]
    smp.save(3, path, False, pickel_module=pickle, pickle_protocol=4)
    assert smp.load(path, partial=False) == 3
    with pytest.raises(NotInitializedError):
        smp.save(1, path)


@pytest.mark.parametrize(
    "call", [lambda f: smp.save(1, f), lambda f: smp.load(f), lambda f: smp.load(f, partial=False)]
)
@pytest.mark.parametrize("f", [Path("f.pt"), b"f.pt", 3, None])
def test_c086_names_that_are_no_strings(call, f):
    with pytest.raises(TypeError, match="f must be a string, got") as caught:
        call(f)
    assert isinstance(caught.value, SMPError)


def test_errors_of_loading(tmp_path):
    path = str(tmp_path / "f.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no .*f\.pt, and nothing else"):
        smp.load(path, partial=False)
    (tmp_path / "f.pt_0").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"but f\.pt_0: load parts with partial=True"):
        smp.load(path, partial=False)
    with pytest.raises(CheckpointCorruptError, match="is not a whole file"):
        smp.load(path + "_0", partial=False)
    smp.save(torch.ones(1000), path, partial=False)
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointCorruptError, match="is not a whole file"):
        smp.load(path, partial=False)
    with pytest.raises(CheckpointError, match="names a folder"):
        smp.save(1, f"{tmp_path}/", partial=False)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "f.pt")
    smp.save("old", path, partial=False)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        smp.save(lambda: 0, path, partial=False)
    monkeypatch.setattr(LocalStore, "_put_in_place", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="No space left on device"):
        smp.save("new", path, partial=False)
    assert smp.load(path, partial=False) == "old" and os.listdir(tmp_path) == ["f.pt"]


def test_links_and_urls(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "elsewhere" / "f.pt")
    smp.save(5, str(tmp_path / "link.pt"), partial=False)
    assert smp.load(str(tmp_path / "elsewhere" / "f.pt"), partial=False) == 5
    smp.save({"a": torch.ones(2)}, "memory://objects/f.pt", partial=False)
    assert torch.equal(smp.load("memory://objects/f.pt", partial=False, mmap=True)["a"], torch.ones(2))
    with pytest.raises(CheckpointNotFoundError):
        smp.load("memory://objects/g.pt", partial=False)


def report_of_missing(folder):
    with pytest.raises(CheckpointNotFoundError) as caught:
        smp.load(f"{folder}/f.pt")
    return str(caught.value)


def test_errors_say_what_is_there_instead(tmp_path):
    for name in ("f.pt_2_0", "f.pt_3_0"):
        (tmp_path / name).touch()
    texts = run_ranks(report_of_missing, 2, str(tmp_path), parameters={"tensor_parallel_degree": 2, "ddp": True})
    assert all("but f.pt_2_0, f.pt_3_0: they were saved with other degrees" in text for text in texts)
    assert "f.pt_0_1_0" in texts[1] and "f.pt_0_1," in texts[1] and "f.pt_1" in texts[1]
    json.dumps(texts)
    (tmp_path / "f.pt").touch()
    texts = run_ranks(report_of_missing, 1, str(tmp_path), parameters={})
    assert "but a file of the whole object, f.pt: load it with partial=False" in texts[0]
