"""Which checkpoints lie under a path, and of what kind each is: for tools that run outside of a job.

    partial        <tag>_partial/ with DCP's index and a completion record, as smp.save_checkpoint writes it
    dcp            another folder with DCP's index
    original       <tag>_partial/ of the original library: one pickle per rank, no index (original.py)
    full           <tag> with complete_<tag>.json beside it
    exported       a folder of safetensors with a completion record, as transformers reads it
    huggingface    what transformers writes: one file of a fixed name, or an index and its parts
    torch, safetensors    any other single file

Everything here is local, and only reads names, sizes and small text files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from modelparallel.checkpoints.huggingface.weights import INDEX_ENDING, TORCH_NAME, weight_map
from modelparallel.checkpoints.partial.dcp_storage import METADATA_NAME
from modelparallel.checkpoints.partial.torch_files import store_of_file
from modelparallel.checkpoints.stores.completion import (
    MARK_NAME,
    PARTIAL_ENDING,
    RECORD_NAME,
    folder_of,
    problems_of,
    read_newest,
    read_record,
)
from modelparallel.checkpoints.stores.completion_record import CompletionRecord, UnknownFormatError
from modelparallel.checkpoints.stores.file_streams import FileRecord, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError

HUGGINGFACE_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    f"{TORCH_NAME}{INDEX_ENDING}",
    TORCH_NAME,
)
#: The kinds whose completion record says whether they are whole.
RECORDED_KINDS = ("partial", "full", "exported")
_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_RANK_FILE = re.compile(r"(model|optimizer|fp16_states)_(\d+(?:_\d+){0,2})\.pt")


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint, or what looks like one.

    Attributes:
        path: the folder, or URL, that it lies in.
        name: of its folder, or of its file, there.
        kind: see the top of the file.
        record: its completion record, if it has a whole one.
        problem: what keeps it from being complete as far as sizes show it; "" for a complete one, and for the kinds
            that have no record.
    """

    path: str
    name: str
    kind: str
    record: CompletionRecord | None = None
    problem: str = ""

    @property
    def is_complete(self) -> bool | None:
        """None: its kind has no record that could say so."""
        return None if self.kind not in RECORDED_KINDS else not self.problem

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its record says beside the files; nothing without one."""
        return {} if self.record is None else self.record.facts

    @property
    def files(self) -> Mapping[str, FileRecord] | None:
        """The files of its record; None without one."""
        return None if self.record is None else self.record.files

    @property
    def store(self) -> Store:
        """The store of ``path``."""
        return open_store(self.path)

    @property
    def folder(self) -> Store:
        """The store of the checkpoint's own folder, of the kinds that have one."""
        return self.store.child(folder_of(self.store, self.name))

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return shown(f"{self.path.rstrip('/')}/{self.name}")


def rank_file(name: str) -> tuple[str, tuple[int, ...]] | None:
    """(noun, ranks) of a file such as ``model_0_1.pt``; None for other names. Local."""
    match = _RANK_FILE.fullmatch(name)
    return None if match is None else (match[1], tuple(map(int, match[2].split("_"))))


def kind_of_folder(store: Store) -> str | None:
    """Whether the folder is a checkpoint of several files: "partial", "dcp", "original" or None. Local."""
    names = set(store.names())
    if RECORD_NAME in names:
        return "partial"
    if MARK_NAME in names:  # being written, or broken off
        return None
    has_rank_files = any(noun_and_ranks[0] == "model" for name in names if (noun_and_ranks := rank_file(name)))
    if METADATA_NAME in names:
        return "partial" if has_rank_files else "dcp"  # ours, which has lost its record
    return "original" if has_rank_files else None


def checkpoints_in(path: str) -> tuple[list[ListedCheckpoint], list[str]]:
    """All checkpoints directly in a folder, those with a record first and oldest first; and the names of what is being
    written there, or was when its job died. Local.
    """
    store = open_store(path)
    entries = store.names()
    checkpoints: list[ListedCheckpoint] = []
    taken: set[str] = set()
    for name in _tags(entries):
        checkpoints.append(_described(path, store, name, "full"))
        record = checkpoints[-1].record
        taken.update({name, f"optimizer_{name}", f"user_content_{name}"} if record is None else record.files)
    unfinished = [entry for entry in entries if re.fullmatch(r"\..+\.draft(-\w+)?", entry)]
    moved_aside = {match[1] for entry in entries if (match := re.fullmatch(r"\.(.+)\.old", entry))}
    for name in sorted({entry for entry in entries if not entry.startswith(".")} | moved_aside):
        kind = None if name in taken else _folder_kind(store, name)
        if kind is not None:
            checkpoints.append(_described(path, store, name, kind))
        elif store.is_remote and store.exists(f"{name}/{MARK_NAME}"):
            unfinished.append(name)
    for name in HUGGINGFACE_NAMES:
        if name in entries and name not in taken:
            checkpoints.append(ListedCheckpoint(path, name, "huggingface"))
            taken.add(name)
            if name.endswith(INDEX_ENDING):
                with suppress(CheckpointError):
                    taken.update(weight_map(path, name).values())
    for name in entries:
        if name not in taken and name.endswith(_FILE_ENDINGS) and not name.startswith("."):
            checkpoints.append(ListedCheckpoint(path, name, _kind_of_file(name)))
    checkpoints.sort(key=lambda one: (one.record is None, one.record.time if one.record else 0.0, one.name))
    return checkpoints, unfinished


def find(path: str | os.PathLike[str], tag: str | None = None) -> ListedCheckpoint:
    """The checkpoint that a caller means. Local.

    Args:
        path: a folder of checkpoints, the folder or the file of one checkpoint, or a URL of one of these.
        tag: as given to ``smp.save_checkpoint``, or the name of a folder or file in ``path``. None: the checkpoint that
            ``path`` is; else the one that ``newest`` names; else the only one there, or the weights of transformers.

    Raises CheckpointNotFoundError, which lists the checkpoints that are there.
    """
    path = normal_path(path)
    if tag is not None:
        return _tagged(path, tag)
    itself = _itself(path)
    if itself is not None:
        return itself
    store = open_store(path)
    checkpoints, _ = checkpoints_in(path)
    newest = read_newest(store)
    if newest is not None:
        return _tagged(path, newest)
    weights = [one for one in checkpoints if one.kind == "huggingface"]
    if len(checkpoints) == 1 or weights:
        return (weights or checkpoints)[0]
    if not checkpoints:
        state = "is empty" if store.exists() else "does not exist"
        state = "holds none" if store.names() else state
        raise CheckpointNotFoundError(f"{shown(path)!r} is no checkpoint, and {state}: check the path")
    raise CheckpointNotFoundError(
        f"{shown(path)!r} has no file 'newest' and holds {len(checkpoints)} checkpoints: say which by its tag: "
        f"{_names(checkpoints)}"
    )


def _tagged(path: str, tag: str) -> ListedCheckpoint:
    store = open_store(path)
    names = [tag] if tag.endswith(PARTIAL_ENDING) else [tag + PARTIAL_ENDING, tag]
    for name in names:
        kind = _folder_kind(store, name)
        if kind is not None:
            return _described(path, store, name, kind)
    entries = store.names()
    if tag in _tags(entries):
        return _described(path, store, tag, "full")
    if tag in entries:
        return ListedCheckpoint(path, tag, _kind_of_file(tag))
    there, unfinished = checkpoints_in(path)
    text = f"there is no checkpoint {tag!r} in {shown(path)!r}"
    if any(tag in name for name in unfinished):
        text += "; it is being saved, or its saving was broken off"
    raise CheckpointNotFoundError(
        f"{text}; there {f'are: {_names(there)}' if there else 'is none'}. Check path and tag"
    )


def _itself(path: str) -> ListedCheckpoint | None:
    """The checkpoint whose folder or file ``path`` is."""
    if path.count("/") < 3 and "://" in path:  # a bucket, which lies in nothing
        return None
    parent, name = store_of_file(path)
    folder = parent.path_of()
    kind = _folder_kind(parent, name)
    if kind is not None:
        return _described(folder, parent, name, kind)
    if parent.size_of(name) is None:
        return None
    if name in _tags(parent.names()):
        return _described(folder, parent, name, "full")
    folder, _, name = path.rpartition("/")  # under the name that a link has, not that of what it leads to
    return ListedCheckpoint(folder, name, _kind_of_file(name))


def _folder_kind(store: Store, name: str) -> str | None:
    with suppress(CheckpointError):  # a link that leads elsewhere
        place = folder_of(store, name)
        if store.is_folder(place):
            return kind_of_folder(store.child(place))
    return None


def _kind_of_file(name: str) -> str:
    if name in HUGGINGFACE_NAMES or name.endswith(INDEX_ENDING):
        return "huggingface"
    return "safetensors" if name.endswith(".safetensors") else "torch"


def _tags(entries: Sequence[str]) -> set[str]:
    """The tags of full checkpoints, also where files are still being moved to their places."""
    patterns = (r"complete_(.+)\.json", r"\.(.+)\.ready")
    return {match[1] for entry in entries for pattern in patterns if (match := re.fullmatch(pattern, entry))}


def _described(path: str, store: Store, name: str, kind: str) -> ListedCheckpoint:
    if kind not in RECORDED_KINDS:
        return ListedCheckpoint(path, name, kind)
    is_full = kind == "full"
    record = None
    with suppress(CheckpointNotFoundError, CheckpointCorruptError, UnknownFormatError):
        record = read_record(store, name, is_full)
    problems = problems_of(store, name, checks_digests=False, is_full=is_full)
    if kind == "partial" and record is not None and record.facts.get("kind") == "safetensors":
        kind = "exported"
    return ListedCheckpoint(path, name, kind, record, "; ".join(problems))


def normal_path(path: str | os.PathLike[str]) -> str:
    """An absolute path, or a URL, without a slash at its end. Local."""
    text = os.fspath(path)
    return text.rstrip("/") if "://" in text else os.path.abspath(text)


def _names(checkpoints: Sequence[ListedCheckpoint]) -> str:
    return ", ".join(one.name for one in checkpoints[:8]) + (", ..." if len(checkpoints) > 8 else "")
