"""Files of checkpoints: whole or not at all, whatever dies when; names and pickles from strangers."""

import copyreg
import errno
import io
import json
import os
import pickle
import resource
import shutil
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from crashing_disk import Crash, Disk
from modelparallel.checkpoints.partial.unpickling import DCP_METADATA_NAMES, load_pickle
from modelparallel.checkpoints.stores import completion, completion_record
from modelparallel.checkpoints.stores import local as storage
from modelparallel.checkpoints.stores.completion import (
    Draft,
    complete_names,
    file_of,
    folder_of,
    problems_of,
    prune,
    read_newest,
    read_record,
    recover,
    write_newest,
)
from modelparallel.checkpoints.stores.completion_record import CompletionRecord
from modelparallel.checkpoints.stores.file_streams import FileRecord
from modelparallel.checkpoints.stores.local import HashingFileSystem
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(autouse=True)
def fast_fsync(monkeypatch):
    """A thousand saves would wait for the disk for minutes; `Disk` checks that the calls are made."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


PARTIAL = ("model_0_0.pt", "optimizer_0_0.pt", "sub/plan.json")


def content_of(version, file):
    return f"{version} of {file} ".encode() * 20


def files_of(name, is_full):
    return (name, f"user_content_{name}") if is_full else PARTIAL


def save(store, name, version, is_full=False, token="", facts=None):
    """A whole save, as saving code does it."""
    draft = Draft(store, name, token, is_full)
    draft.start()
    records = {file: draft.store.write(file, content_of(version, file)) for file in files_of(name, is_full)}
    draft.commit(records, facts or {}, patience_s=0)
    write_newest(store, name)
    return records


def version_of(store, name, is_full=False):
    """Which version a reader finds; fails unless the checkpoint is whole and of one version."""
    assert problems_of(store, name, is_full=is_full) == []
    found = set()
    for file in files_of(name, is_full):
        data = store.read(file_of(store, name, file) if is_full else f"{folder_of(store, name)}/{file}")
        version = data.split(b" ")[0].decode()
        assert data == content_of(version, file)
        found.add(version)
    assert len(found) == 1
    return found.pop()


@contextmanager
def on(disk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "os", disk)
        yield


# ---------------------------------------------------------------- whole saves


@pytest.mark.parametrize("is_full", [False, True])
def test_a_committed_draft_is_the_checkpoint(tmp_path, is_full):
    store = open_store(tmp_path / "new" / "path")
    records = save(store, "a", "v1", is_full, facts={"step": 7, "shape": {"pp": 2}})
    assert version_of(store, "a", is_full) == "v1"
    assert read_newest(store) == "a"
    record = read_record(store, "a", is_full)
    assert record.files == records and record.facts == {"step": 7, "shape": {"pp": 2}}
    assert abs(record.time - time.time()) < 60
    assert complete_names(store, is_full=is_full) == ["a"] and complete_names(store, is_full=not is_full) == []
    assert not [name for name in os.listdir(store.root) if name.startswith(".")]
    values = json.loads(store.read("complete_a.json" if is_full else "a/complete.json"))
    assert values["format"] == 1
    name = "user_content_a" if is_full else "sub/plan.json"
    assert values["files"][name] == {"size": records[name].size, "xxh3_128": records[name].digest}


@pytest.mark.parametrize("is_full", [False, True])
def test_saving_again_under_the_same_name_replaces_it(tmp_path, is_full):
    store = open_store(tmp_path)
    save(store, "a", "v1", is_full)
    first = read_record(store, "a", is_full).time
    save(store, "a", "v2", is_full)
    assert version_of(store, "a", is_full) == "v2"
    assert read_record(store, "a", is_full).time > first
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_every_write_is_on_the_disk_before_its_name_changes(tmp_path):
    disk = Disk()
    with on(disk):
        for version in ("v1", "v2"):
            for is_full in (False, True):
                save(open_store(tmp_path / "path"), "full" if is_full else "part", version, is_full)
    assert disk.count > 60
    assert disk.complaints == []
    assert disk.unsynced == set()


def test_a_disk_that_was_not_synced_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.LocalStore, "_sync_path", lambda self, folder: None)
    disk = Disk()
    with on(disk):
        save(open_store(tmp_path / "path"), "a", "v1")
    assert disk.complaints and disk.unsynced


# ------------------------------------------------------------ crashes and errors at every operation


def scenarios():
    def same_name(store, is_full):
        save(store, "a", "v3", is_full)

    def other_name(store, is_full):
        save(store, "b", "v3", is_full)

    def first(store, is_full):
        save(store, "b", "v3", is_full)

    def prune_old(store, is_full):
        save(store, "b", "v3", is_full)
        prune(store, 1, "*")

    return {
        "same name": (same_name, False), "another name": (other_name, False), "pruning": (prune_old, False),
        "full, same name": (same_name, True), "full, another name": (other_name, True),
        "beside a full one": (lambda store, is_full: save(store, "x", "v3"), True),
    }  # fmt: skip


def failing_runs(tmp_path, action, is_full, error):
    """(path, what was raised) for a failure at every operation of `action`, each on a fresh copy of a path."""
    base = tmp_path / "base"
    save(open_store(base), "a", "v1", is_full)
    save(open_store(base), "a", "v2", is_full)
    for number in range(1, 1000):
        path = tmp_path / str(number)
        shutil.copytree(base, path)
        disk = Disk(number, error)
        raised = None
        try:
            with on(disk):
                action(open_store(path), is_full)
        except (Crash, CheckpointError) as caught:
            raised = caught
        assert (raised is None) or disk.count >= number
        yield path, raised
        shutil.rmtree(path)
        if disk.count < number:
            assert number > 10
            return
    raise AssertionError("the action never ended")


@pytest.mark.parametrize("scenario", scenarios())
def test_a_crash_at_any_operation_leaves_whole_checkpoints(tmp_path, scenario):
    action, is_full = scenarios()[scenario]
    names = {"a", "b", "x"}
    seen = set()
    for path, raised in failing_runs(tmp_path, action, is_full, None):
        store = open_store(path)

        def check(store=store, raised=raised):
            complete = {
                (name, kind): version_of(store, name, kind)
                for kind in (False, True)
                for name in complete_names(store, is_full=kind)
            }
            assert {name for name, _ in complete} <= names
            if scenario != "pruning":
                assert complete[("a", is_full)] in ("v2", "v3")
            assert complete, "nothing is left"
            visible = {entry.name for entry in os.scandir(store.root) if entry.is_dir() and entry.name[0] != "."}
            assert visible <= {name for name, kind in complete if not kind}, "what is removed is renamed first"
            newest = read_newest(store)
            assert newest in {name for name, _ in complete}
            return frozenset(complete.items())

        before = check()
        recover(store)
        assert check() == before, "putting right changes where files are, not what a reader finds"
        seen.add(before)
        # The next job saves, and what the dead one left is gone.
        action(store, is_full)
        prune(store, 5)
        check()
        hidden = [name for name in os.listdir(path) if name.startswith(".")]
        assert not [name for name in hidden if not name.endswith((".part", ".draft"))]
        assert not [name for name in hidden if name.endswith(".draft") and "b" in name]
    assert len(seen) == {"pruning": 3}.get(scenario, 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("scenario", ["same name", "full, same name", "another name"])
def test_an_error_at_any_operation_leaves_whole_checkpoints(tmp_path, scenario, number):
    action, is_full = scenarios()[scenario]
    num_errors = 0
    for path, raised in failing_runs(tmp_path, action, is_full, OSError(number, os.strerror(number))):
        store = open_store(path)
        assert not isinstance(raised, Crash)
        assert (path / "a").exists(), "after an error, unlike after a crash, all is in its place"
        version = version_of(store, "a", is_full)
        if raised is not None:
            num_errors += 1
            assert os.strerror(number) in str(raised) and "Remedy" in str(raised)
        else:
            assert version == ("v2" if "another" in scenario else "v3")
        name = "a" if "same" in scenario else "b"
        Draft(store, name, is_full=is_full).discard()
        recover(store)
        assert version_of(store, "a", is_full) == version
        action(store, is_full)
        assert version_of(store, name, is_full) == "v3"
    assert num_errors > 10


def test_an_old_one_without_a_successor_is_read_and_put_back(tmp_path):
    store = open_store(tmp_path)
    save(store, "a_partial", "v1")
    os.rename(tmp_path / "a_partial", tmp_path / ".a_partial.old")
    assert version_of(store, "a_partial") == "v1" and complete_names(store) == ["a_partial"]
    assert folder_of(store, "a_partial") == ".a_partial.old"
    assert recover(store) == ["a_partial"] and recover(store) == []
    assert (tmp_path / "a_partial").is_dir() and version_of(store, "a_partial") == "v1"


def test_an_old_one_that_is_not_whole_is_not_put_back(tmp_path):
    store = open_store(tmp_path)
    save(store, "a", "v1")
    os.rename(tmp_path / "a", tmp_path / ".a.old")
    (tmp_path / ".a.old" / PARTIAL[0]).unlink()
    assert recover(store) == [] and complete_names(store) == []


def test_a_spoilt_one_does_not_take_the_old_one_with_it(tmp_path):
    store = open_store(tmp_path)
    save(store, "a", "v1")
    shutil.copytree(tmp_path / "a", tmp_path / ".a.old")
    (tmp_path / "a" / "complete.json").unlink()
    path = tmp_path / "copy"
    for number in range(1, 500):
        disk = Disk(number)
        shutil.copytree(tmp_path, path, ignore=lambda folder, names: ["copy"])
        copy = open_store(path)
        with on(disk), suppress(Crash):
            save(copy, "a", "v2")
        whole = [name for name in ("a", ".a.old") if problems_of(copy, name) == []]
        assert whole, number
        shutil.rmtree(path)
        if disk.count < number:
            assert whole == ["a"]
            return
    raise AssertionError("the save never ended")


# ------------------------------------------------------------ full disks


class FullFile(io.RawIOBase):
    """Takes so many bytes and then says that the disk is full."""

    def __init__(self, room, number=errno.ENOSPC):
        super().__init__()
        self.room, self.number = room, number

    def writable(self):
        return True

    def write(self, data):
        size = memoryview(data).nbytes
        if size > self.room:
            raise OSError(self.number, os.strerror(self.number))
        self.room -= size
        return size


class FullDisk(Disk):
    def fdopen(self, descriptor, mode, buffering=-1):
        if mode == "rb":
            return os.fdopen(descriptor, mode)
        os.close(descriptor)
        return io.BufferedWriter(FullFile(3000), 1024)


def dcp_writer(store, **options):
    files = HashingFileSystem(store)
    writer = dcp.FileSystemWriter("unused", sync_files=False, **options)
    writer.fs, writer.path = files, ""
    return writer, files


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_is_named_even_through_torch_save(tmp_path, room):
    store = open_store(tmp_path)
    store.write("model.pt", b"before")
    with on(FullDisk()), pytest.raises(CheckpointError) as caught, store.open("model.pt", "wb") as stream:
        torch.save({"w": torch.zeros(5000 - room)}, stream)
    text = str(caught.value)
    assert "model.pt" in text and "No space left on device (ENOSPC)" in text and "num_kept" in text
    assert store.read("model.pt") == b"before" and os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("thread_count", [1, 2])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_dcp(tmp_path, thread_count):
    writer, files = dcp_writer(open_store(tmp_path), thread_count=thread_count)
    tensors = {"a": torch.zeros(4000), "b": torch.zeros(4000)}
    before = set(threading.enumerate())
    with on(FullDisk()):
        with pytest.raises(dcp.api.CheckpointException) as caught:
            dcp.save(tensors, storage_writer=writer, no_dist=True)
        for thread in set(threading.enumerate()) - before:
            thread.join(30)  # DCP does not wait for its other threads when one fails
    assert "ENOSPC" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"distcp' could not be written: No space left"):
        files.raise_failure()
    assert files.records == {} and os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_thread_of_dcp_is_not_lost(tmp_path):
    store = open_store(tmp_path)

    class OneFull(Disk):
        num_files = 0

        def fdopen(self, descriptor, mode, buffering=-1):
            self.num_files += 1
            if self.num_files > 1:
                return os.fdopen(descriptor, mode)
            os.close(descriptor)
            return io.BufferedWriter(FullFile(3000), 1024)

    writer, files = dcp_writer(store, thread_count=2)
    with on(OneFull()), pytest.raises(CheckpointError, match="ENOSPC"):
        with suppress(dcp.api.CheckpointException):  # if it was not the thread that met the full disk
            dcp.save({"a": torch.zeros(4000), "b": torch.zeros(4000)}, storage_writer=writer, no_dist=True)
        files.raise_failure()


def test_the_limit_of_a_files_size_is_named(tmp_path):
    store = open_store(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"\(EFBIG\) after \d+ bytes.*ulimit -f"):
            with store.open("model.pt", "wb") as stream:
                for _ in range(20):
                    stream.write(bytes(10_000_00))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_caller_stays_as_it_is_and_leaves_nothing(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.open("model.pt", "wb") as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------ damage


def damaged(tmp_path, damage):
    store = open_store(tmp_path)
    save(store, "a", "v1")
    save(store, "b", "v2")
    damage(tmp_path / "b")
    assert version_of(store, "a") == "v1"
    return store


def test_a_truncated_file_is_a_problem(tmp_path):
    store = damaged(tmp_path, lambda folder: os.truncate(folder / PARTIAL[0], 10))
    expected = len(content_of("v2", PARTIAL[0]))
    assert problems_of(store, "b", checks_digests=False) == [f"'{PARTIAL[0]}' has 10 bytes, written were {expected}"]
    assert complete_names(store) == ["a"]


@pytest.mark.parametrize("position", [0, 17, -1])
def test_a_flipped_bit_is_a_problem(tmp_path, position):
    def flip(folder):
        data = bytearray((folder / PARTIAL[1]).read_bytes())
        data[position] ^= 4
        (folder / PARTIAL[1]).write_bytes(data)

    store = damaged(tmp_path, flip)
    (problem,) = problems_of(store, "b")
    assert PARTIAL[1] in problem and "digest" in problem
    assert problems_of(store, "b", checks_digests=False) == []


def test_missing_files_are_problems(tmp_path):
    store = damaged(tmp_path, lambda folder: shutil.rmtree(folder / "sub"))
    assert problems_of(store, "b") == ["'sub/plan.json' is missing"]
    (tmp_path / "b" / PARTIAL[0]).unlink()
    assert len(problems_of(store, "b")) == 2


def test_added_files_are_no_problem_but_are_not_read(tmp_path):
    store = damaged(tmp_path, lambda folder: (folder / "more.pt").write_bytes(b"x"))
    assert problems_of(store, "b") == []
    files = HashingFileSystem(store.child("b"), read_record(store, "b").files)
    with files.create_stream(PARTIAL[0], "rb") as stream:
        assert stream.read() == content_of("v2", PARTIAL[0])
    with pytest.raises(CheckpointCorruptError, match=r"'more.pt' is not in the completion record"):
        with files.create_stream("more.pt", "rb"):
            pass


def test_a_file_that_became_a_folder_or_a_link_out_is_a_problem(tmp_path):
    def replace(folder):
        (folder / PARTIAL[0]).unlink()
        (folder / PARTIAL[0]).mkdir()
        (folder / PARTIAL[1]).rename(tmp_path.parent / f"{tmp_path.name}-outside")
        (folder / PARTIAL[1]).symlink_to(tmp_path.parent / f"{tmp_path.name}-outside")

    store = damaged(tmp_path, replace)
    folder, link = problems_of(store, "b", checks_digests=False)
    assert "missing" in folder and "link" in link


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not an ordinary file"):
        open_store(tmp_path).read("pipe")


def test_a_damaged_record_does_not_count(tmp_path):
    store = open_store(tmp_path)
    save(store, "a", "v1", facts={"step": 3})
    path = tmp_path / "a" / "complete.json"
    good = path.read_bytes()
    for bad in (b"", b"{}", b"[]", b"null", b"\xff\xfe", good[:-10], good.replace(b'"step": 3', b'"step": 4')):
        path.write_bytes(bad)
        with pytest.raises(CheckpointCorruptError, match="completion record"):
            read_record(store, "a")
        assert complete_names(store) == [] and len(problems_of(store, "a")) == 1
    path.write_bytes(good)
    assert problems_of(store, "a") == []
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match="is not a complete checkpoint: it has no record"):
        read_record(store, "a")


def test_a_record_cannot_name_files_outside(tmp_path):
    record = CompletionRecord({"../secret": FileRecord(1, "0")}, 1.0, {})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "complete.json").write_bytes(record.as_json())
    with pytest.raises(CheckpointError, match=r"'../secret' is not the name of a file below"):
        read_record(open_store(tmp_path), "a")


def test_a_record_of_a_later_format_says_so(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(completion_record, "FORMAT", 2)
        save(store, "a", "v1")
    with pytest.raises(CheckpointError, match="of format 2; this version reads format 1"):
        read_record(store, "a")


def test_ranks_divide_the_work_and_leave_nothing_out(tmp_path):
    store = open_store(tmp_path)
    draft = Draft(store, "a")
    draft.start()
    sizes = [5000, 3000, 2000, 1000, 900, 10, 0]
    records = {f"f{size}": draft.store.write(f"f{size}", bytes(size)) for size in sizes}
    draft.commit(records, {})
    for size in sizes:
        if size:
            (tmp_path / "a" / f"f{size}").write_bytes(b"x" * size)
    for count in (1, 2, 3, 9):
        parts = [problems_of(store, "a", share=(index, count)) for index in range(count)]
        assert sorted(problem for part in parts for problem in part) == sorted(problems_of(store, "a"))
        assert sum(len(part) for part in parts) == 6
    loads = [sum(file.size for file in completion._share_of(records, index, 2).values()) for index in range(2)]
    assert sorted(loads) == [5910, 6000]


# ------------------------------------------------------------ drafts of several jobs


def test_a_draft_of_the_same_name_that_was_left_is_removed_and_others_stay(tmp_path):
    store = open_store(tmp_path)
    for name, token in (("a", ""), ("a", "12ab"), ("a.b", "")):
        left = Draft(store, name, token)
        left.start()
        left.store.write("junk.pt", b"junk")
    save(store, "a", "v1", token="34cd")
    assert sorted(os.listdir(tmp_path)) == [".a.b.draft", "a", "newest"]
    assert sorted(os.listdir(tmp_path / "a")) == ["complete.json", "model_0_0.pt", "optimizer_0_0.pt", "sub"]


@pytest.mark.parametrize("tokens", [("", ""), ("aa", "bb")])
@pytest.mark.parametrize("is_full", [False, True])
def test_of_two_jobs_under_one_name_one_wins_whole(tmp_path, tokens, is_full):
    store = open_store(tmp_path)
    save(store, "a", "v1", is_full)
    drafts = [Draft(store, "a", token, is_full) for token in tokens]
    drafts[0].start()
    first = {file: drafts[0].store.write(file, content_of("v2", file)) for file in files_of("a", is_full)}
    drafts[1].start()
    second = {file: drafts[1].store.write(file, content_of("v3", file)) for file in files_of("a", is_full)}
    with pytest.raises(CheckpointError, match=r"another job|same name"):
        drafts[0].commit(first, {}, patience_s=0)
    if tokens[0]:
        drafts[0].discard()
    assert version_of(store, "a", is_full) == "v1"
    drafts[1].commit(second, {}, patience_s=0)
    assert version_of(store, "a", is_full) == "v3"


def test_a_commit_checks_what_lies_there(tmp_path):
    store = open_store(tmp_path)
    save(store, "a", "v1")
    draft = Draft(store, "a")
    with pytest.raises(CheckpointError, match="was not started"):
        draft.commit({}, {})
    draft.start()
    record = draft.store.write("x", b"123")
    with pytest.raises(CheckpointError, match="'y' has no bytes, written were 3"):
        draft.commit({"x": record, "y": record}, {}, patience_s=0)
    with pytest.raises(CheckpointError, match="'x' has 3 bytes, written were 4"):
        draft.commit({"x": FileRecord(4, record.digest)}, {}, patience_s=0)
    with pytest.raises(CheckpointError, match="files that no rank says it wrote: x"):
        draft.commit({}, {}, patience_s=0)
    with pytest.raises(CheckpointError, match=r"facts may not be called \['files'\]"):
        draft.commit({"x": record}, {"files": 3})
    assert version_of(store, "a") == "v1"
    draft.discard()
    assert sorted(os.listdir(tmp_path)) == ["a", "newest"]


def test_a_commit_waits_for_files_that_come_late(tmp_path):
    draft = Draft(open_store(tmp_path), "a")
    draft.start()
    record = draft.store.write("x", b"123")
    late = {"y": FileRecord(3, record.digest)}
    sizes = iter([None, 1, 3])
    real = draft.store.size_of
    draft.store.size_of = lambda name: next(sizes) if name == "y" else real(name)
    draft.store.sizes = lambda: {"x": 3, "y": 3}
    draft.commit({"x": record, **late}, {}, patience_s=5)
    assert next(sizes, "used up") == "used up"


def test_a_name_of_the_wrong_kind_is_refused_before_anything_is_written(tmp_path):
    store = open_store(tmp_path)
    store.write("file", b"x")
    store.write("folder/x", b"x")
    for name, is_full, kind in (("file", False, "file"), ("folder", True, "folder")):
        with pytest.raises(CheckpointError, match=f"is a {kind}: save under another tag"):
            Draft(store, name, is_full=is_full).start()


# ------------------------------------------------------------ newest and pruning


def test_newest_is_text_that_stays_inside(tmp_path):
    store = open_store(tmp_path)
    assert read_newest(store) is None
    write_newest(store, "a_partial")
    assert (tmp_path / "newest").read_text() == "a_partial"
    for text, expected in ((" b \n", "b"), ("", None), ("\n", None)):
        (tmp_path / "newest").write_text(text)
        assert read_newest(store) == expected
    for text in ("../x", "/etc", "a/../../b"):
        (tmp_path / "newest").write_text(text)
        with pytest.raises(CheckpointError, match="is not the name of a file below"):
            read_newest(store)
    (tmp_path / "newest").write_bytes(b"\xff")
    with pytest.raises(CheckpointCorruptError, match="is not text"):
        read_newest(store)


def test_the_oldest_go_by_their_records_not_by_their_names(tmp_path):
    store = open_store(tmp_path)
    for name in ("c_partial", "a_partial", "b_partial", "d_partial"):
        save(store, name, "v1")
    assert complete_names(store, "*_partial") == ["c_partial", "a_partial", "b_partial", "d_partial"]
    assert prune(store, 2) == ["c_partial", "a_partial"]
    assert prune(store, 2) == []
    assert sorted(os.listdir(tmp_path)) == ["b_partial", "d_partial", "newest"]


def test_a_clock_that_goes_back_does_not_make_the_newest_the_oldest(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    save(store, "a_partial", "v1")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    save(store, "b_partial", "v1")
    assert complete_names(store) == ["a_partial", "b_partial"]


def test_pruning_keeps_what_newest_names_and_what_is_not_ours(tmp_path):
    store = open_store(tmp_path)
    for name in ("a_partial", "b_partial", "c_partial", "d_partial"):
        save(store, name, "v1")
    save(store, "full", "v1", is_full=True)
    write_newest(store, "b_partial")
    store.write("foreign_partial/model_0_0.pt", b"no record")
    (tmp_path / "c_partial" / PARTIAL[0]).unlink()  # broken ones are neither counted nor removed
    assert prune(store, 1) == ["a_partial"]
    assert complete_names(store) == ["b_partial", "d_partial"]
    assert {"foreign_partial", "c_partial", "full", "complete_full.json"} <= set(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match="at least one checkpoint is kept"):
        prune(store, 0)


def test_pruning_removes_what_dead_jobs_left_after_a_day(tmp_path):
    store = open_store(tmp_path)
    save(store, "a_partial", "v1")
    Draft(store, "b_partial").start()
    store.write(".b_partial.0123abcd.gone/x", b"half removed")
    store.write(".theirs.draft/notes", b"not ours")
    (tmp_path / ".0123.part").write_bytes(b"killed while writing")
    prune(store, 1)
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith(".")) == [
        ".0123.part", ".b_partial.draft", ".theirs.draft",
    ]  # fmt: skip
    before = time.time() - 2 * completion.DAY_S
    for base, folders, files in os.walk(tmp_path):
        for name in [*folders, *files]:
            os.utime(os.path.join(base, name), (before, before))
    prune(store, 1)
    assert sorted(os.listdir(tmp_path)) == [".theirs.draft", "a_partial", "newest"]
    assert version_of(store, "a_partial") == "v1"


# ------------------------------------------------------------ names


WRONG_NAMES = ["/etc/passwd", "../x", "a/../../x", "a//b", "a/", "/", ".", "./a", "a\\b", "C:x", "a\0b", "s3://b/c", 3]


@pytest.mark.parametrize("name", WRONG_NAMES)
@pytest.mark.parametrize("root", ["local", "memory://names"])
def test_names_that_lead_out_are_refused_everywhere(tmp_path, root, name):
    store = open_store(tmp_path if root == "local" else root)
    calls = [
        lambda: store.read(name), lambda: store.write(name, b""), lambda: store.exists(name),
        lambda: store.remove(name),
        lambda: store.names(name), lambda: store.sizes(name), lambda: store.size_of(name), lambda: store.child(name),
        lambda: store.remove_folder(name), lambda: store.rename_file(name, "a"), lambda: store.rename_file("a", name),
        lambda: store.make_folder(name), lambda: store.path_of(name), lambda: store.is_folder(name),
        lambda: Draft(store, name), lambda: read_record(store, name), lambda: write_newest(store, name),
    ]  # fmt: skip
    for index, call in enumerate(calls):
        with pytest.raises(CheckpointError, match="is not the name of a file below"):
            call()
            raise AssertionError(index)
    assert os.listdir(tmp_path) == []


def test_links_out_of_the_root_are_refused_and_those_inside_are_not(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "x")
    (root / "to come").symlink_to(outside / "new")
    store = open_store(root)
    for call in (lambda: store.read("file"), lambda: store.read("folder/x"), lambda: store.write("to come", b"x"),
                 lambda: store.write("folder/y", b"x"), lambda: store.remove_folder("folder")):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"link to .*outside"):
            call()
    assert os.listdir(outside) == ["x"]
    store.write("real", b"inside")
    (root / "inner").symlink_to("real")
    assert store.read("inner") == b"inside"
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert open_store(linked).read("real") == b"inside"


def test_removing_a_folder_does_not_follow_links(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"keep")
    store = open_store(tmp_path / "root")
    store.write("folder/y", b"x")
    (tmp_path / "root" / "folder" / "link").symlink_to(tmp_path / "outside")
    store.remove_folder("folder")
    assert not store.exists("folder") and (tmp_path / "outside" / "x").exists()


def test_paths_of_all_kinds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("relative", tmp_path / "relative", f"file://{tmp_path}/relative"):
        assert open_store(path).root == str(tmp_path / "relative") and not open_store(path).is_remote
    with pytest.raises(TypeError, match="bytes"):
        open_store(b"x")
    with pytest.raises(TypeError):
        open_store(3)
    with pytest.raises(CheckpointError, match=r"cannot be opened.*nosuch"):
        open_store("nosuch://x")
    with pytest.raises(ValueError, match="'ab'"):
        open_store(tmp_path).open("x", "ab")
    with pytest.raises(CheckpointNotFoundError, match="check path and tag"):
        open_store(tmp_path).read("x")
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path).remove("x")
    assert open_store(tmp_path / "none").names() == [] and open_store(tmp_path / "none").sizes() == {}


# ------------------------------------------------------------ DCP


def test_dcp_writes_and_reads_through_a_store_and_other_tools_read_it(tmp_path):
    store = open_store(tmp_path)
    draft = Draft(store, "a")
    draft.start()
    writer, files = dcp_writer(draft.store, thread_count=2)
    values = {"model": {"w": torch.randn(8, 8), "b": torch.randn(8, dtype=torch.float64)}, "step": 3}
    dcp.save(values, storage_writer=writer, no_dist=True)
    files.raise_failure()
    assert set(files.records) == {".metadata", "__0_0.distcp", "__0_1.distcp"}
    draft.commit(files.records, {})
    assert problems_of(store, "a") == []

    reader = dcp.FileSystemReader("unused")
    reader.fs, reader.path = HashingFileSystem(store.child("a"), read_record(store, "a").files), ""
    found = {"model": {"w": torch.zeros(8, 8), "b": torch.zeros(8, dtype=torch.float64)}, "step": 0}
    dcp.load(found, storage_reader=reader, no_dist=True)
    dcp_to_torch_save(tmp_path / "a", tmp_path / "plain.pt")
    for other in (found, torch.load(tmp_path / "plain.pt")):
        assert other["step"] == 3
        assert all(torch.equal(other["model"][name], values["model"][name]) for name in ("w", "b"))
    with store.open("a/.metadata") as stream:
        index = load_pickle(stream, DCP_METADATA_NAMES)
    assert set(index.state_dict_metadata) == {"model.w", "model.b", "step"}
    assert index.storage_meta.checkpoint_id == "", "no path of the machine that wrote it"


# ------------------------------------------------------------ pickles


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def a_metadata(tmp_path):
    dcp.save({"w": torch.randn(2), "h": torch.zeros(1, dtype=torch.float8_e4m3fn), "o": {1}}, checkpoint_id=tmp_path,
             no_dist=True)  # fmt: skip
    return (tmp_path / ".metadata").read_bytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_metadata_of_stock_dcp_is_read(tmp_path, protocol):
    expected = pickle.loads(a_metadata(tmp_path))
    data = pickle.dumps(expected, protocol=protocol)
    assert load_pickle(io.BytesIO(data), DCP_METADATA_NAMES) == expected


@pytest.mark.parametrize(
    "function, arguments",
    [(os.system, ("touch {}",)), (eval, ("open('{}', 'w')",)), (open, ("{}", "w")), (os.mkdir, ("{}",)),
     (getattr, (dcp_metadata, "os")), (vars(copyreg)["_reconstructor"], (list, object, None)), (torch.load, ("{}",))],
)  # fmt: skip
def test_pickles_that_run_code_are_refused(tmp_path, function, arguments):
    target = tmp_path / "it ran"
    arguments = [part.format(target) if isinstance(part, str) else part for part in arguments]
    if function is getattr:
        arguments = ["text", "upper"]
    data = pickle.dumps(Calls(function, *arguments), protocol=4)
    name = f"{function.__module__}.{function.__name__}".replace("_io.", r"(_)?io\.")
    with pytest.raises(CheckpointError, match=f"names {name}.*allowed_types.*trust_pickles"):
        load_pickle(io.BytesIO(data), DCP_METADATA_NAMES)
    assert not target.exists()


def test_a_name_is_allowed_only_as_a_whole():
    """Protocol 4 may name attributes of attributes."""
    data = b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x94\x8c\x11Metadata.__init__\x94\x93."
    data = data.replace(b"\x8c\x29", b"\x8c" + bytes([len("torch.distributed.checkpoint.metadata")]))
    assert callable(pickle.loads(data))
    with pytest.raises(CheckpointError, match=r"names torch.distributed.checkpoint.metadata.Metadata.__init__"):
        load_pickle(io.BytesIO(data), DCP_METADATA_NAMES)


def test_nothing_in_the_list_runs_what_it_is_given(tmp_path):
    for module, name in DCP_METADATA_NAMES - {("pathlib._local", "PosixPath"), ("pathlib._local", "PurePosixPath")}:
        value = vars(pickle)["_getattribute"](__import__(module, fromlist=["x"]), name)
        value = value[0] if isinstance(value, tuple) else value
        is_data = isinstance(value, torch.dtype | type)
        assert is_data or name == "_get_layout", (module, name)
        assert value not in (type, object)


def test_a_pickle_cannot_change_the_classes_it_may_name():
    before = dcp_metadata.Metadata.__eq__
    data = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x06\x00\x00\x00__eq__ctorch\nSize\ns\x86b."
    try:
        pickle.loads(data)
        assert vars(dcp_metadata.Metadata)["__eq__"] is torch.Size, "or this test shows nothing"
    finally:
        dcp_metadata.Metadata.__eq__ = before
    with pytest.raises(CheckpointError, match=r"changes torch.distributed.checkpoint.metadata.Metadata"):
        load_pickle(io.BytesIO(data), DCP_METADATA_NAMES)
    assert dcp_metadata.Metadata.__eq__ is before


def test_damaged_pickles_are_said_to_be_so(tmp_path):
    data = a_metadata(tmp_path)
    for bad in (b"", data[:-1], data[:50], b"garbage", b"\x80\x02P1\n."):
        with pytest.raises(CheckpointCorruptError, match="the index is not a whole pickle"):
            load_pickle(io.BytesIO(bad), DCP_METADATA_NAMES, "the index")


def test_more_can_be_allowed_by_name():
    data = pickle.dumps({"version": FileRecord(3, "x")})
    with pytest.raises(CheckpointError, match=r"file_streams.FileRecord"):
        load_pickle(io.BytesIO(data), DCP_METADATA_NAMES)
    allowed = DCP_METADATA_NAMES | {(FileRecord.__module__, FileRecord.__qualname__)}
    assert load_pickle(io.BytesIO(data), allowed) == {"version": FileRecord(3, "x")}
    assert load_pickle(io.BytesIO(data), None) == {"version": FileRecord(3, "x")}
