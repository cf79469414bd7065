"""Files that are cut, changed or made to harm: checkpoints are damaged by name, `explain` tells the rest."""

import json
import os
import pickle
import random
import re
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from typer.testing import CliRunner

from modelparallel.checkpoints.huggingface.safetensors_reading import stored_tensors
from modelparallel.checkpoints.partial.dcp_storage import read_metadata
from modelparallel.checkpoints.stores import completion
from modelparallel.checkpoints.stores.completion_record import CompletionRecord, UnknownFormatError, digest_of_values
from modelparallel.checkpoints.stores.file_streams import FileRecord, new_digest
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError, CheckpointError, LaunchError
from modelparallel.errors.foreign_text import one_line, parse_json, printable
from modelparallel.launch.attempts import read_attempts
from modelparallel.launch.command_line import app
from modelparallel.launch.explain import explain
from modelparallel.launch.folder import JobFolder
from modelparallel.launch.memory_summary import memory_summary
from modelparallel.plan.partition import PartitionPlan

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000
MEDIUM = b"[" * 300 + b"]" * 300
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066\ud800-\udfff]")
ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e\ud800"
NUMBERS = st.sampled_from([-1, -(2**63), 2**63, 2**200, 1e308, float("inf"), float("nan"), True, None, "7", [], {}])
VALUES = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=5), st.integers(), st.just(ESCAPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def signed(values):
    return json.dumps({**values, "digest": digest_of_values(values)}).encode()


def good_values(moment=100.0):
    return {
        "format": 1, "time": moment, "kind": "partial", "num_steps": 3, "num_models": 1,
        "shape": {"pp": 1, "tp": 1, "rdp": 1},
        "models": [{}], "files": {"a": {"size": 1, "xxh3_128": new_digest().hexdigest()}},
    }  # fmt: skip


ABSURD = [
    {"time": float("nan")}, {"time": 1e308}, {"time": -5}, {"time": 10**400}, {"time": "1"}, {"time": True},
    {"files": {"a": {"size": -1, "xxh3_128": ""}}}, {"files": {"a": {"size": 2**70, "xxh3_128": ""}}},
    {"files": {"a": {"size": 1e999, "xxh3_128": ""}}}, {"files": {"a": {"size": 1.5, "xxh3_128": ""}}},
    {"files": {"../a": {"size": 1, "xxh3_128": ""}}}, {"files": {"/a": {"size": 1, "xxh3_128": ""}}},
    {"files": {"a": 3}}, {"files": [1]}, {"files": None}, {"num_steps": -1}, {"num_models": 2**80}, {"num_models": "x"},
    {"shape": [1]}, {"shape": {"pp": -1}}, {"shape": {"pp": 1e999}}, {"models": {}}, {"models": [3]}, {"kind": 3},
    {"deep": json.loads(MEDIUM)},
]  # fmt: skip


def stores(tmp_path):
    pytest.importorskip("fsspec")
    yield open_store(str(tmp_path / "local"))
    yield open_store(f"memory://{tmp_path.name}")


def test_absurd_records_are_damaged_by_name_and_passed_over(tmp_path):
    texts = [signed({**good_values(1e9), **absurd}) for absurd in ABSURD]
    texts += [
        DEEP,
        MEDIUM,
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"digest": 1}',
        signed(good_values())[:-20],
        b"9" * 10_000,
    ]
    for store in stores(tmp_path):
        for name in ("old", "good"):
            store.write(f"{name}_partial/a", b"x")
            good = CompletionRecord({"a": completion.digest_of(store, f"{name}_partial/a")}, 5.0 + (name == "good"), {})
            store.write(f"{name}_partial/complete.json", good.as_json())
        for number, text in enumerate(texts):
            store.write(f"bad{number}_partial/complete.json", text)
            with pytest.raises(CheckpointCorruptError, match=f"bad{number}_partial/complete.json"):
                completion.read_record(store, f"bad{number}_partial")
        store.write("newer_partial/complete.json", signed({**good_values(2e9), "format": 2}))
        with pytest.raises(UnknownFormatError, match="newer version"):
            completion.read_record(store, "newer_partial")
        found = completion.survey(store, "*_partial")
        assert [name for name, problems in found if not problems] == ["old_partial", "good_partial"]
        assert len(found) == len(texts) + 3
        result = CliRunner().invoke(app, ["checkpoint", "inspect", store.path_of()])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception


@FUZZ
@given(key=st.sampled_from([*good_values(), "extra"]), value=VALUES)
def test_any_value_in_a_record_is_read_or_damage(key, value):
    try:
        data = signed({**good_values(), key: value})
    except (ValueError, RecursionError, UnicodeEncodeError):
        return
    try:
        record = CompletionRecord.parse(data, "here")
    except (CheckpointCorruptError, UnknownFormatError) as error:
        assert "here" in str(error)
    else:
        assert 0 <= record.time < 1e12 and all(isinstance(file, FileRecord) for file in record.files.values())


def safetensors_bytes(header, num_bytes=32):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * num_bytes


GOOD_HEAD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "I64", "shape": [2], "data_offsets": [16, 32]},
}
BAD_HEADS = [
    {"shape": [-2, -2]}, {"shape": [2**62, 4]}, {"shape": 4}, {"shape": [2.0, 2]}, {"shape": ["2", 2]},
    {"shape": [True, 4]},
    {"data_offsets": [16, 32]}, {"data_offsets": [-16, 0]}, {"data_offsets": [0, 2**70]},
    {"data_offsets": [16, 0]}, {"data_offsets": [0]}, {"data_offsets": [0, 8]}, {"data_offsets": None}, {"dtype": 3},
    {"dtype": [1]},
    {"shape": None},
]  # fmt: skip


def test_absurd_heads_of_safetensors_are_damaged_by_name(tmp_path):
    files = [safetensors_bytes({**GOOD_HEAD, "a": {**GOOD_HEAD["a"], **bad}}) for bad in BAD_HEADS]
    files += [
        safetensors_bytes(DEEP),
        safetensors_bytes(MEDIUM),
        safetensors_bytes(b"[]"),
        safetensors_bytes(b"\xff" * 8),
    ]
    files += [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{}",
        b"",
        b"\1",
        safetensors_bytes(GOOD_HEAD)[:-1],
    ]
    files += [safetensors_bytes({"a": 3}), safetensors_bytes({"a": GOOD_HEAD["a"]}), safetensors_bytes({}, 1)]
    for store in stores(tmp_path):
        store.write("good.safetensors", safetensors_bytes(GOOD_HEAD))
        assert set(stored_tensors(store.path_of("good.safetensors"))) == {"a", "b"}
        for number, data in enumerate(files):
            store.write(f"{number}.safetensors", data)
            with pytest.raises(CheckpointCorruptError, match=rf"\b{number}\.safetensors"):
                stored_tensors(store.path_of(f"{number}.safetensors"))
        for number, index in enumerate((DEEP, b'{"weight_map": {"a": 3}}', b'{"weight_map": []}', b"[]", b"\xff", b"")):
            store.write(f"index{number}/model.safetensors.index.json", index)
            with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors\.index\.json"):
                stored_tensors(store.path_of(f"index{number}"))
        store.write("index9/model.safetensors.index.json", b'{"weight_map": {"a": "../good.safetensors"}}')
        with pytest.raises(CheckpointError, match="do not trust"):
            stored_tensors(store.path_of("index9"))


def metadata(**changes):
    settings_of = {
        "size": (4, 2),
        "offsets": ((0, 0), (2, 0)),
        "sizes": ((2, 2), (2, 2)),
        "dtype": torch.float32,
        **changes,
    }
    chunks = [
        ChunkStorageMetadata(offsets, sizes)
        for offsets, sizes in zip(settings_of["offsets"], settings_of["sizes"], strict=True)
    ]
    tensor = TensorStorageMetadata(TensorProperties(settings_of["dtype"]), settings_of["size"], chunks)
    place = _StorageInfo(
        settings_of.get("path", "model_0.pt"), settings_of.get("place", 0), settings_of.get("length", 16)
    )
    entries = changes.get("entries", {changes.get("key", "model.w"): tensor})
    return Metadata(entries, None, {MetadataIndex("model.w", (0, 0)): place})


BAD_INDEXES = [
    {"size": (-4, 2)}, {"size": (4,)}, {"size": (2**70, 2)}, {"size": ("4", 2)}, {"size": None}, {"dtype": 3},
    {"offsets": ((0, 0), (1, 0))}, {"offsets": ((0, 0), (-2, 0))}, {"offsets": ((0, 0), (3, 0))},
    {"sizes": ((2, 2), (2, -2))},
    {"sizes": ((2, 2), (2,))}, {"path": "../x"}, {"path": 3}, {"place": -1},
    {"length": -1}, {"length": 2**70}, {"key": 3},
    {"entries": [1]}, {"entries": {"a": 3}},
]  # fmt: skip


def test_absurd_indexes_of_dcp_are_damaged_by_name(tmp_path):
    for store in stores(tmp_path):
        store.write("good/.metadata", pickle.dumps(metadata()))
        assert read_metadata(store.child("good")).state_dict_metadata["model.w"].size == (4, 2)
        bad = [pickle.dumps(metadata(**changes)) for changes in BAD_INDEXES]
        bad += [
            pickle.dumps(metadata())[:-30],
            b"",
            b"\x80\x05",
            pickle.dumps([1]),
            pickle.dumps("x" * 100),
            b"(" * 10_000,
        ]
        bad += [b"\x80\x05\x8e" + struct.pack("<Q", 2**62), b"\x80\x05" + b"]" * 100_000 + b"a" * 99_999 + b"."]
        for number, data in enumerate(bad):
            store.write(f"{number}/.metadata", data)
            with pytest.raises(CheckpointError, match=rf"{number}/\.metadata"):
                read_metadata(store.child(str(number)))


def changed_bytes(data, seed):
    rng, result = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 4)):
        how = rng.choice("cut flip insert repeat".split())
        at = rng.randrange(len(result) + 1)
        if how == "cut":
            del result[at : at + rng.randint(1, 50)]
        elif how == "insert":
            result[at:at] = rng.choice([b"\x1b[2J", b"\xff", b"-1", b"[" * 2000, b"1e999", b"null", b"9" * 5000])
        elif how == "repeat":
            result[at:at] = result[max(0, at - 40) : at]
        elif result:
            result[min(at, len(result) - 1)] ^= 1 << rng.randrange(8)
    return bytes(result)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Small files of all kinds, by name."""
    folder = tmp_path_factory.mktemp("kinds")
    save_file({"a": torch.ones(2, 2), "b": torch.zeros(3)}, folder / "model.safetensors")
    torch.save({"a": torch.ones(2, 2), "n": {"m": [1, "x"]}}, folder / "weights.pt")
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "weights.pt")}
    files["model.safetensors.index.json"] = b'{"weight_map": {"a": "m1.safetensors", "b": "m1.safetensors"}}'
    files["t_partial/.metadata"] = pickle.dumps(metadata())
    files["t_partial/complete.json"] = signed(good_values())
    files["complete_t.json"] = signed(good_values())
    return files


def check_commands(files, folder, seed):
    name = random.Random(seed).choice(sorted(files))
    path = folder / f"case{seed}" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(changed_bytes(files[name], seed))
    for other in ("m1.safetensors", "t_partial/a", "t"):
        if name.startswith(("model.safetensors.index", "t_partial/complete", "complete_t")):
            (folder / f"case{seed}" / other).parent.mkdir(exist_ok=True)
            (folder / f"case{seed}" / other).write_bytes(files["model.safetensors"])
    for command in ("inspect", "verify"):
        for target in (path, folder / f"case{seed}"):
            result = CliRunner().invoke(app, ["checkpoint", command, str(target)])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise AssertionError(f"{command} of {name}, seed {seed}") from result.exception
            assert result.exit_code in (0, 1, 2)
            assert not HARMFUL.search(result.output)


@pytest.mark.filterwarnings("ignore")  # torch's, of pickles of other protocols
def test_commands_survive_changed_checkpoints(checkpoints, tmp_path):
    for seed in range(60):
        check_commands(checkpoints, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_commands_survive_many_changed_checkpoints(checkpoints, tmp_path):
    for seed in range(60, 3000):
        check_commands(checkpoints, tmp_path, seed)


def test_names_with_commands_for_the_terminal_are_written_out(tmp_path):
    name = "w\x1b[2J\n\u202ex"
    save_file({name: torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "other\x1b[31m.pt").write_bytes(b"x")
    result = CliRunner().invoke(app, ["checkpoint", "inspect", str(tmp_path)])
    assert result.exit_code == 0
    assert r"w\x1b[2J\n\u202ex" in result.output and r"other\x1b[31m.pt" in result.output
    assert not HARMFUL.search(result.output)
    result = CliRunner().invoke(app, ["checkpoint", "inspect", str(tmp_path), "--tag", "other\x1b[31m.pt"])
    assert result.exit_code == 2 and not HARMFUL.search(result.output + result.stderr)


# explain


def job_with(root, num_ranks=2):
    """A failed job, as its ranks write it down: rank 0 raised and rank 1 waits for it."""
    folder = JobFolder(root)
    for directory in (folder.events, folder.status, folder.attempts):
        directory.mkdir(parents=True)
    folder.description.write_text(json.dumps({"num_devices": num_ranks}))
    for rank in range(num_ranks):
        head = {"kind": "rank", "global_rank": rank, "pp_rank": rank, "pipeline": [0, 1], "call": 3, "time": 5.0}
        event = {"kind": "event", "microbatch": 0, "number": 1, "text": "a input", "line": "train.py:3", "time": 4.0}
        wait = {"kind": "wait", "source": 0, "microbatch": 1, "what": "d input", "line": "train.py:9", "seconds": 2.0}
        peer = {"kind": "peer", "pp_rank": 0, "text": "pp_rank 0 is alive, at train.py:95"}
        error = {"kind": "error", "type": "KeyError", "text": "'only here'", "line": "train.py:7", "time": 5.0 + rank}
        records = [head, event, error] if rank == 0 else [head, event, wait, peer, error]
        folder.event_file(rank).write_text("".join(json.dumps(record) + "\n" for record in records))
        folder.started_file(rank).write_text(json.dumps({"pid": 1, "time": 1.0}))
        status = {
            "time": 6.0,
            "exit_code": 1,
            "summary": "KeyError: 'x'",
            "traceback": 'File "a.py", line 3',
            "is_interrupt": False,
        }
        folder.error_file(rank).write_text(json.dumps(status))
    attempt = {
        "number": 1,
        "num_processes": 2,
        "started": 1.0,
        "seconds": 2.0,
        "exit_code": 1,
        "reason": "x",
        "devices": ["0"],
    }
    folder.attempts_file.write_text(json.dumps([attempt]))
    folder.attempt(1).root.mkdir()
    return folder


def test_explain_tells_what_it_can_of_spoilt_files(tmp_path):
    folder = job_with(tmp_path / "job")
    assert "first: rank 0 (pp_rank 0) failed in call 3" in explain(folder)
    with folder.event_file(1).open("ab") as file:
        file.write(
            b'{"kind": "event"\n\xff\xfe\n\n[1]\n{"kind": "wait", "source": 99}\n' + DEEP + b"\n" + MEDIUM + b"\n"
        )
    text = explain(folder)
    assert "first: rank 0 (pp_rank 0) failed in call 3 of a step function, at train.py:7: KeyError: 'only here'" in text
    assert (
        "2.0 s for d input from rank 0" in text and "records that cannot be read, and are left out:\n  rank 1" in text
    )
    # Names, numbers and texts made to harm.
    (folder.events / "rank999999999999999999.jsonl").write_text("{}")
    (folder.events / "rank3\x1b[2J.jsonl").write_text("{}")
    os.mkfifo(folder.event_file(4))
    folder.event_file(5).mkdir()
    folder.event_file(6).symlink_to("/dev/zero")
    folder.description.write_text('{"num_devices": 1000000000000}')
    line = {
        "kind": "error",
        "type": f"E{ESCAPES}\nrank 7: forged",
        "text": f"t{ESCAPES}",
        "line": f"l{ESCAPES}",
        "time": 1.0,
    }
    head = {"kind": "rank", "global_rank": 0, "pp_rank": 0, "pipeline": [0, 10**12], "call": 1}
    folder.event_file(0).write_text("".join(json.dumps(record) + "\n" for record in (head, line)))
    text = explain(folder)
    assert not HARMFUL.search(text) and r"E\x1b[2J" in text
    assert "\nrank 7: forged" not in text
    for path in (folder.description, folder.attempts_file, folder.error_file(0), folder.event_file(0)):
        path.write_bytes(b"\xff\x00[")
    assert "first: rank 1" in explain(folder)
    with pytest.raises(LaunchError, match="holds no job"):
        explain(JobFolder(tmp_path / "nothing"))


def check_explain(folder, seed):
    """One file of the job changed in its bytes or in one value of a record."""
    rng = random.Random(seed)
    names = [path for path in sorted(folder.root.rglob("*")) if path.is_file()]
    path = rng.choice(names)
    before = path.read_bytes()
    try:
        if rng.random() < 0.5:
            path.write_bytes(changed_bytes(before, seed))
        else:
            lines = [json.loads(line) for line in before.splitlines()]
            record = rng.choice(lines)
            record = record[0] if isinstance(record, list) else record
            absurd = [
                -1,
                2**80,
                1e999,
                float("nan"),
                None,
                True,
                [],
                [1] * 5,
                {},
                ESCAPES,
                "\n" * 5,
                [[0]],
                ["x"],
                {"a": 1},
            ]
            record[rng.choice(sorted(record))] = rng.choice(absurd)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            assert not HARMFUL.search(explain(folder))
        except LaunchError:
            assert path == folder.description
        read_attempts(folder)
    finally:
        path.write_bytes(before)


def test_explain_reads_anything(tmp_path):
    folder = job_with(tmp_path / "job")
    for seed in range(300):
        check_explain(folder, seed)


@pytest.mark.slow
def test_explain_reads_anything_at_length(tmp_path):
    folder = job_with(tmp_path / "job")
    for seed in range(300, 20_000):
        check_explain(folder, seed)


# Small parts


@FUZZ
@given(text=st.text())
def test_what_is_printable_harms_nobody(text):
    assert not HARMFUL.search(printable(text)) and "\n" not in one_line(text)


def test_json_of_strangers():
    for data in (DEEP, MEDIUM, b"", b"\xff", b"nul"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(data)
    assert parse_json(b'[{"a": [1]}]') == [{"a": [1]}]
    for plan in (DEEP.decode(), "[]", "3", '{"version": 1, "num_stages": 1e999}'):
        with pytest.raises(Exception, match="partition plan"):
            PartitionPlan.from_json(plan)


def test_memory_of_ranks_that_cannot_be_read_is_left_out(tmp_path):
    folder = JobFolder(tmp_path)
    folder.events.mkdir()
    good = {"global_rank": 0, "stage": 0, "held": 10, "predicted": 9, "device_peak": None, "resident_peak": 5}
    for number, record in enumerate(
        [good, {**good, "held": "x"}, {**good, "held": -1}, {**good, "stage": 1e999}, [], None]
    ):
        (folder.events / f"rank{number}.memory.json").write_text(json.dumps(record))
    (folder.events / "rank9.memory.json").write_bytes(DEEP)
    assert len(memory_summary(folder)) == 1
