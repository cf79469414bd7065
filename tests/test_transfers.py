"""Files between a node and a store: whole, under their names, with errors that say which, why and what helps."""

import os

import fsspec
import pytest

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters import transfers
from modelparallel.launch.clusters.transfers import fetch, files_below, names_at, send

ODD = ("a [b]*?.txt", "ä/ö.txt", "deep/er/x", "plain", "100%/y#1")


@pytest.fixture(autouse=True)
def memory():
    fsspec.filesystem("memory").store.clear()
    yield fsspec.filesystem("memory")
    fsspec.filesystem("memory").store.clear()


def filled(folder):
    for name in ODD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("scheme", ["memory://bucket/some where", "local://{}/store", "{}/store", "file://{}/store"])
def test_files_come_back_under_their_names(tmp_path, scheme, monkeypatch):
    monkeypatch.setattr(transfers, "_AT_ONCE", 2)
    location = scheme.format(tmp_path)
    source = filled(tmp_path / "source")
    assert send(source, ODD, location, "output") == len(ODD)
    assert names_at(location, "output") == {name: len(name.encode()) for name in ODD}
    if "://" in location and not location.startswith("file"):
        assert fetch(location, tmp_path / "back", "channel") == sum(len(name.encode()) for name in ODD)
        assert sorted(path.read_text() for path in files_below(tmp_path / "back")) == sorted(ODD)
        assert {path.relative_to(tmp_path / "back").as_posix() for path in files_below(tmp_path / "back")} == set(ODD)
    (source / "plain").write_text("changed")
    send(source, ["plain"], location, "output")
    assert names_at(location, "output")["plain"] == len("changed")
    assert not list(tmp_path.rglob("*.partial"))


def test_one_file_is_a_folder_with_it(tmp_path, memory):
    memory.pipe("/bucket/x [1].bin", b"12")
    assert fetch("memory://bucket/x [1].bin", tmp_path / "back", "channel") == 2
    assert os.listdir(tmp_path / "back") == ["x [1].bin"]


def test_a_prefix_of_a_name_is_no_folder(tmp_path, memory):
    memory.pipe({"/bucket/data/a": b"", "/bucket/database/b": b""})
    fetch("memory://bucket/data", tmp_path / "back", "channel")
    assert os.listdir(tmp_path / "back") == ["a"]
    fetch("memory://bucket/data/", tmp_path / "again", "channel")
    assert os.listdir(tmp_path / "again") == ["a"]


def test_names_that_lead_out_are_refused(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(
        memory.__class__, "find", lambda self, path, **_: {f"{path}/../../x": {"size": 1, "type": "file"}}
    )
    memory.pipe("/bucket/data/a", b"1")
    with pytest.raises(LaunchError, match=r"'\.\./\.\./x' in /bucket/data is no name that a file can have"):
        fetch("memory://bucket/data", tmp_path / "back", "channel 'train'")
    assert not os.listdir(tmp_path)


def test_what_is_not_whole_is_not_there(tmp_path, memory, monkeypatch):
    memory.pipe({"/bucket/data/a": b"1", "/bucket/data/b": b"2"})
    get_file = memory.__class__.get_file

    def broken(self, remote, local, **others):
        if remote.endswith("b"):
            raise ConnectionResetError("the line is dead")
        return get_file(self, remote, local, **others)

    monkeypatch.setattr(memory.__class__, "get_file", broken)
    with pytest.raises(
        LaunchError, match=r"channel 'train': fetching memory://bucket/data failed: .*line is dead; check"
    ):
        fetch("memory://bucket/data", tmp_path / "back", "channel 'train'")
    assert not os.listdir(tmp_path)

    def short(self, remote, local, **others):
        with open(local, "wb"):
            pass

    monkeypatch.setattr(memory.__class__, "get_file", short)
    with pytest.raises(LaunchError, match=r"a of memory://bucket/data has 1 bytes, and 0 have arrived"):
        fetch("memory://bucket/data", tmp_path / "back", "channel 'train'")
    assert not os.listdir(tmp_path)


def test_errors_name_the_place_and_the_remedy(tmp_path, monkeypatch):
    for url, words in (("memory://none/x", "there is no file at memory://none/x: check the address"),
                       ("nope://x", "nope://x cannot be opened: .*nope"),
                       ("ftp://me:secret@127.0.0.1:1/x", r"fetching ftp://me:\*\*\*@127")):  # fmt: skip
        with pytest.raises(LaunchError, match=f"channel 'a': {words}") as caught:
            fetch(url, tmp_path / "back", "channel 'a'")
        assert "secret" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=f"output: writing to {tmp_path}/file/sub failed: Not a directory"):
        send(tmp_path, ["file"], f"{tmp_path}/file/sub", "output")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(LaunchError, match=r"needs a package that is not installed: pip install 'modelparallel\[s3\]'"):
        fetch("s3://b/x", tmp_path / "back", "channel 'a'")
    with pytest.raises(LaunchError, match="Install s3fs"):
        fetch("gs://b/x", tmp_path / "back", "channel 'a'")
