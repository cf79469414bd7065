"""When files are a checkpoint: the completion record, the draft that becomes one, and which ones are kept.

[Note: What makes a checkpoint count] A checkpoint is a folder with a completion record in it (`complete.json`: size
and digest of every file), or, for a full checkpoint, files beside each other with a record `complete_<tag>.json`. The
record is written when all files are on the disk, so a checkpoint with a record is whole, and one without does not
count. The names of a checkpoint X on a local disk, by their life:

    .X.draft      being written (.X.draft-<token> where a job gives itself a token). Killed here: left over, removed
                  by the next save of X or after a day.
    .X.old        the checkpoint that was X; it is moved aside when its successor is complete. Killed here: X is
                  missing, readers read .X.old, and `recover` moves it back.
    .X.ready      (full) complete, its files are being moved to their places. Killed here: readers find a file here or
                  in its place, and `recover` moves the rest.
    X             complete.
    .X.<hex>.gone being removed; renamed first, so that what is half removed never looks complete.

An object store has no renaming of folders. There the files are written in place, under a mark (`draft.json`) that says
that they are no checkpoint yet, and the record comes last. Saving over a checkpoint of the same name gives that one up
first; save under another tag to keep it.

Functions here are local: they are called by one rank, or by each for itself where they only read.
"""

import fnmatch
import json
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from modelparallel.checkpoints.stores.completion_record import RESERVED_FACTS, CompletionRecord, UnknownFormatError
from modelparallel.checkpoints.stores.file_streams import BUFFER_BYTES, FileRecord, checked_name, new_digest, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from modelparallel.errors.foreign_text import parse_json

RECORD_NAME = "complete.json"
MARK_NAME = "draft.json"
NEWEST_NAME = "newest"
#: How the folder of a partial checkpoint ends: `<tag>_partial`.
PARTIAL_ENDING = "_partial"
DAY_S = 24 * 3600.0
# A network file system may show files that another host has written only after its lists of names have aged: 30 s is
# usual.
PATIENCE_S = 35.0


def _split(name: str) -> tuple[str, str]:
    head, slash, tail = name.rpartition("/")
    return head + slash, tail


def _hidden(name: str, ending: str) -> str:
    """The name beside `name` under which it lives while it is not itself."""
    head, tail = _split(name)
    return f"{head}.{tail}.{ending}"


def record_name(name: str, is_full: bool = False) -> str:
    """Where the completion record of a checkpoint lies, below the path. Local."""
    head, tail = _split(name)
    return f"{head}complete_{tail}.json" if is_full else f"{name}/{RECORD_NAME}"


def _mark_name(name: str, is_full: bool) -> str:
    head, tail = _split(name)
    return f"{head}draft_{tail}.json" if is_full else f"{name}/{MARK_NAME}"


def folder_of(store: Store, name: str) -> str:
    """The folder to read a (partial) checkpoint from: its own, or that of its predecessor moved aside. Local."""
    aside = _hidden(name, "old")
    return aside if not store.is_remote and not store.exists(name) and store.is_folder(aside) else name


def file_of(store: Store, name: str, file: str) -> str:
    """Where to read a file of the full checkpoint `name`: in its place, or in the folder it is moved from. Local."""
    ready = f"{_hidden(name, 'ready')}/{file}"
    return ready if not store.is_remote and store.exists(ready) else file


def _place_of(store: Store, name: str, file: str, is_full: bool) -> str:
    return file_of(store, name, file) if is_full else f"{folder_of(store, name)}/{file}"


def read_record(store: Store, name: str, is_full: bool = False) -> CompletionRecord:
    """The completion record of a checkpoint. Local.

    Args:
        store: the checkpoints' path.
        name: a folder below it (`<tag>_partial`), or, with `is_full`, the tag of a full checkpoint.

    Raises:
        CheckpointNotFoundError: there is none, so the checkpoint is not there or does not count.
        CheckpointCorruptError: it is damaged.
    """
    checked_name(name, store.root)
    place = file_of(store, name, record_name(name, True)) if is_full else f"{folder_of(store, name)}/{RECORD_NAME}"
    try:
        data = store.read(place)
    except CheckpointNotFoundError as error:
        text = f"{shown(store.path_of(name))!r} is not a complete checkpoint: it has no record {place!r}"
        if is_unfinished(store, name, is_full):
            text += "; it is being saved, or its saving was broken off"
        raise CheckpointNotFoundError(f"{text}. Load another one") from error
    return CompletionRecord.parse(data, shown(store.path_of(place)))


def is_unfinished(store: Store, name: str, is_full: bool = False) -> bool:
    """Does a mark say that it is being written in place (object stores), or was when its job died? Local."""
    return store.is_remote and store.exists(_mark_name(name, is_full))


def digest_of(store: Store, name: str) -> FileRecord:
    """Read a file and say what it is. Local.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest, size = new_digest(), 0
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with store.open(name) as stream:
        try:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                size += count
        except OSError as error:
            raise CheckpointError(f"{shown(store.path_of(name))!r} cannot be read: {error}") from error
    return FileRecord(size, digest.hexdigest())


def problems_of(
    store: Store, name: str, share: tuple[int, int] = (0, 1), checks_digests: bool = True, is_full: bool = False
) -> list[str]:
    """What keeps a checkpoint from being whole; empty where it is whole. Local; reads only.

    Files that no record names are no problem: nothing reads them.

    Args:
        store: the checkpoints' path.
        name: a folder below it, or, with `is_full`, the tag of a full checkpoint.
        share: (index, count): only the index-th of count parts of the files, of about equal size, so that ranks
            divide the work.
        checks_digests: read every file; False looks at the sizes only.
        is_full: see `name`.

    Raises:
        CheckpointError: the store cannot be asked (network, permissions).
    """
    try:
        record = read_record(store, name, is_full)
    except (CheckpointNotFoundError, CheckpointCorruptError, UnknownFormatError) as error:
        return [str(error)]
    files = _share_of(record.files, *share)
    problems = []
    for file, expected in sorted(files.items()):
        place = _place_of(store, name, file, is_full)
        try:
            size = store.size_of(place)
            if size is None:
                problems.append(f"{file!r} is missing")
            elif size != expected.size:
                problems.append(f"{file!r} has {size} bytes, written were {expected.size}")
            elif checks_digests and digest_of(store, place) != expected:
                problems.append(f"{file!r} is not what was written: its digest is another one than {expected.digest}")
        except CheckpointError as error:
            if store.is_remote and not isinstance(error, CheckpointNotFoundError):
                raise
            problems.append(str(error))
    return problems


def _share_of(files: Mapping[str, FileRecord], index: int, count: int) -> dict[str, FileRecord]:
    """The largest file first, each to the part that has least; every caller comes to the same parts."""
    parts: list[dict[str, FileRecord]] = [{} for _ in range(count)]
    loads = [0] * count
    for name, file in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
        lightest = loads.index(min(loads))
        parts[lightest][name] = file
        loads[lightest] += file.size + 1
    return parts[index]


class Draft:
    """A checkpoint under construction.

    All ranks make one with the same arguments. One rank calls `start`, then, after a barrier, all write their files
    through `store` and call its `sync_names`, and then the first rank calls `commit` with the records of all. See
    [Note: What makes a checkpoint count].

    Attributes:
        store: where the files are written, under their final names below the checkpoint's folder (full checkpoints:
            below the path).
        path: the path or URL of that store.
        parent: the checkpoints' path, in which the draft becomes ``name``.
    """

    def __init__(self, store: Store, name: str, token: str = "", is_full: bool = False) -> None:
        """A draft of the checkpoint `name`. Nothing is made yet. Local.

        Args:
            store: the checkpoints' path.
            name: the folder it will be (`<tag>_partial`), or, with `is_full`, the tag of a full checkpoint.
            token: the same short text on all ranks of the job and another one in another job (`new_token` of one
                rank): keeps the drafts of two jobs apart that save under the same name. Without it they mix; the
                commit sees that as far as sizes show it, and readers by the digests.
            is_full: see `name`.
        """
        checked_name(name, store.root)
        self.name, self.is_full = name, is_full
        self.parent = store
        self._folder = _hidden(name, f"draft-{token}" if token else "draft")
        self._owner = ""
        if not store.is_remote:
            self.store = store.child(self._folder, syncs_names=False)
        else:
            self.store = store if is_full else store.child(name)
        self.path = self.store.path_of()

    @property
    def _mark(self) -> str:
        """The mark's name below `self.store`."""
        return _mark_name(self.name, True) if self.parent.is_remote and self.is_full else MARK_NAME

    def start(self) -> None:
        """Make the draft, empty. One rank, before any other writes.

        What a broken save of the same name left is put right or removed. On an object store this gives up a complete
        checkpoint of the same name.

        Raises:
            CheckpointError: the path cannot be written to.
        """
        target = self.parent
        if target.is_remote:
            target.remove(record_name(self.name, self.is_full), missing_ok=True)
            if not self.is_full:
                target.remove_folder(self.name)
        else:
            _recover_one(target, self.name)
            if target.exists(self.name) and target.is_folder(self.name) == self.is_full:
                kind = "folder" if self.is_full else "file"
                raise CheckpointError(f"{target.path_of(self.name)!r} is a {kind}: save under another tag or path")
            head, tail = _split(self.name)
            pattern = re.compile(re.escape(f".{tail}.draft") + r"(-\w+)?")
            for left_over in target.names(head.rstrip("/")):
                if pattern.fullmatch(left_over):
                    _remove_checkpoint(target, head + left_over)
        owner = secrets.token_hex(8)
        self.store.write(self._mark, json.dumps({"owner": owner, "time": time.time()}).encode())
        self._owner = owner

    def commit(
        self, records: Mapping[str, FileRecord], facts: Mapping[str, Any], patience_s: float = PATIENCE_S
    ) -> CompletionRecord:
        """Make the draft the checkpoint. The rank that called `start`, when every rank has closed its files.

        Args:
            records: of every file that any rank has written.
            facts: what else the record shall say; values of JSON. "time" (seconds since 1970) replaces the clock's.
            patience_s: how many seconds a file that another host wrote may take to be seen here.

        Raises:
            CheckpointError: a file is missing or has another size, a file has no record, another job has taken the
                draft, or the disk fails. The checkpoints that were there are untouched; `discard` removes the draft.
        """
        if not self._owner:
            raise CheckpointError(
                f"the draft of {self.name!r} was not started: call start() before its files are written"
            )
        if RESERVED_FACTS & facts.keys():
            raise CheckpointError(f"facts may not be called {sorted(RESERVED_FACTS & facts.keys())}: use other names")
        for name in records:
            checked_name(name, self.path)
        self._check_files(records, patience_s)
        self._check_owner()
        noted = json.loads(json.dumps({**facts}))
        moment = noted.pop("time", None)
        record = CompletionRecord(dict(records), moment or self._time_after_newest(), noted)
        if self.parent.is_remote:
            self.parent.write(record_name(self.name, self.is_full), record.as_json())
            self.store.remove(self._mark, missing_ok=True)
        else:
            self.store.write(record_name(self.name, True) if self.is_full else RECORD_NAME, record.as_json())
            self.store.remove(self._mark)
            self.store.sync_names()
            self._move_into_place()
        self._owner = ""
        return record

    def discard(self) -> None:
        """Give the draft up and remove its files. One rank, when none writes any more.

        On an object store, the files of a full checkpoint stay, with the mark that they do not count.
        """
        self._owner = ""
        if not self.parent.is_remote:
            if self.parent.exists(self._folder):
                _remove_checkpoint(self.parent, self._folder)
        elif not self.is_full:
            self.parent.remove_folder(self.name)

    def _check_files(self, records: Mapping[str, FileRecord], patience_s: float) -> None:
        deadline, delay = time.monotonic() + patience_s, 0.05
        while True:
            sizes = {name: self.store.size_of(name) for name in records}
            wrong = [
                f"{name!r} has {'no' if sizes[name] is None else sizes[name]} bytes, written were {file.size}"
                for name, file in records.items()
                if sizes[name] != file.size
            ]
            if not wrong or time.monotonic() + delay > deadline:
                break
            time.sleep(delay)
            delay = min(2 * delay, 5.0)
        if wrong:
            raise CheckpointError(
                f"{shown(self.path)!r} does not hold what was written: {'; '.join(wrong[:5])}. Is another job saving "
                "under the same name, or do the hosts not share this path? The checkpoints before it are untouched"
            )
        if not (self.parent.is_remote and self.is_full):
            known = {*records, self._mark}
            # A network file system keeps a file that was removed while open as .nfs...
            unknown = [
                name for name in self.store.sizes() if name not in known and not _split(name)[1].startswith(".nfs")
            ]
            if unknown:
                raise CheckpointError(
                    f"{shown(self.path)!r} holds files that no rank says it wrote: {', '.join(sorted(unknown)[:5])}. "
                    "Is another job saving under the same name? The checkpoints before it are untouched"
                )

    def _check_owner(self) -> None:
        owner = None
        with suppress(CheckpointNotFoundError, ValueError, TypeError, KeyError):
            owner = parse_json(self.store.read(self._mark))["owner"]
        if owner != self._owner:
            raise CheckpointError(
                f"another job has begun to save {self.name!r} under {shown(self.parent.path_of())!r}; this save is "
                "given up. Let jobs save under different paths or tags"
            )

    def _time_after_newest(self) -> float:
        """The clock's time, or a little after the newest checkpoint's where another host's clock was ahead."""
        now = time.time()
        with suppress(CheckpointError):
            newest = read_newest(self.parent)
            for is_full in (False, True) if newest else ():
                with suppress(CheckpointError):
                    now = max(now, read_record(self.parent, str(newest), is_full).time + 0.001)
        return now

    def _move_into_place(self) -> None:
        target, name = self.parent, self.name
        if self.is_full:
            target.rename_folder(self._folder, _hidden(name, "ready"))
            _recover_one(target, name)
            return
        aside = _hidden(name, "old")
        if target.exists(name) and target.exists(aside):
            # Both are there if a job died while it removed the one aside, or if somebody has spoilt the one in place.
            _remove_checkpoint(target, name if problems_of(target, name, checks_digests=False) else aside)
        try:
            if target.exists(name):
                target.rename_folder(name, aside)
            target.rename_folder(self._folder, name)
        except CheckpointError:
            with suppress(CheckpointError):
                _recover_one(target, name)
            raise
        with suppress(CheckpointError):  # it does no harm there, and the next save or `prune` removes it
            if target.exists(aside):
                _remove_checkpoint(target, aside)


def new_token() -> str:
    """A text that tells this save's draft from any other's; one rank makes it and sends it to the others. Local."""
    return secrets.token_hex(4)


def _remove_checkpoint(store: Store, folder: str) -> None:
    """Remove a folder; at no moment does a part of it look complete."""
    if store.is_remote:
        store.remove(f"{folder}/{RECORD_NAME}", missing_ok=True)
        store.remove_folder(folder)
        return
    head, tail = _split(folder)
    gone = f"{head}.{tail.lstrip('.')}.{secrets.token_hex(4)}.gone"
    store.rename_folder(folder, gone)
    store.remove_folder(gone)


def recover(store: Store) -> list[str]:
    """Put right what a job left that died while it moved checkpoints into place. One rank, with leave to write.

    Returns:
        The names of the checkpoints that were moved back (partial) or whose move was finished (full).
    """
    if store.is_remote:
        return []
    recovered = []
    for entry in store.names():
        match = re.fullmatch(r"\.(.+)\.(old|ready)", entry)
        if match and _recover_one(store, match.group(1)):
            recovered.append(match.group(1))
    return recovered


def _recover_one(store: Store, name: str) -> bool:
    aside, ready = _hidden(name, "old"), _hidden(name, "ready")
    has_moved = False
    if store.is_folder(aside) and not problems_of(store, name, checks_digests=False):
        if store.exists(name):
            _remove_checkpoint(store, aside)
        else:
            store.rename_folder(aside, name)
            has_moved = True
    if store.is_folder(ready):
        record = read_record(store, name, is_full=True)
        for file in [*sorted(record.files), record_name(name, True)]:
            if store.exists(f"{ready}/{file}"):
                store.make_folder(_split(file)[0].rstrip("/"))
                store.rename_file(f"{ready}/{file}", file)
        store.remove_folder(ready)
        has_moved = True
    return has_moved


def complete_names(store: Store, pattern: str = "*", is_full: bool = False) -> list[str]:
    """The complete checkpoints directly below a path, oldest first by their records. Local; reads only.

    Complete means: a whole record, and every file there with its size. Digests are not checked.

    Args:
        store: the checkpoints' path.
        pattern: names with "*" and "?", such as "*_partial".
        is_full: the tags of full checkpoints instead of the folders of partial ones.
    """
    return [name for name, problems in survey(store, pattern, is_full) if not problems]


def survey(store: Store, pattern: str = "*", is_full: bool = False) -> list[tuple[str, list[str]]]:
    """(name, what is wrong, of which the digests are no part) of all that may be checkpoints, oldest first, and last
    those whose record does not say. Local; reads only. Arguments as of `complete_names`.

    A partial one without a record has lost it, is being written on an object store, or is another program's folder.
    """
    entries = set(store.names())
    if is_full:
        names = {match.group(1) for entry in entries if (match := re.fullmatch(r"complete_(.+)\.json", entry))}
        names |= {match.group(1) for entry in entries if (match := re.fullmatch(r"\.(.+)\.ready", entry))}
    else:
        names = {entry for entry in entries if not entry.startswith(".")}
        names |= {match.group(1) for entry in entries if (match := re.fullmatch(r"\.(.+)\.old", entry))}
    dated = []
    for name in fnmatch.filter(names, pattern):
        moment = float("inf")
        with suppress(CheckpointNotFoundError, CheckpointCorruptError, UnknownFormatError):
            moment = read_record(store, name, is_full).time
        dated.append((moment, name, problems_of(store, name, checks_digests=False, is_full=is_full)))
    return [(name, problems) for _, name, problems in sorted(dated)]


def read_newest(store: Store) -> str | None:
    """What the file `newest` names: a folder `<tag>_partial` or a tag; None where there is no such file. Local.

    Raises:
        CheckpointCorruptError: it is not text.
        CheckpointError: it names something outside of the path.
    """
    try:
        name = store.read(NEWEST_NAME).decode().strip()
    except CheckpointNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointCorruptError(
            f"{shown(store.path_of(NEWEST_NAME))!r} is not text: give the tag by name"
        ) from error
    return checked_name(name, store.root) if name else None


def write_newest(store: Store, name: str) -> None:
    """Let `newest` name a checkpoint. One rank, after its commit.

    Raises:
        CheckpointError: it could not be written; the checkpoint itself is complete.
    """
    store.write(NEWEST_NAME, checked_name(name, store.root).encode())


def prune(store: Store, keep: int, pattern: str = f"*{PARTIAL_ENDING}") -> list[str]:
    """Remove old partial checkpoints, and what dead jobs left. One rank, after `write_newest`.

    The oldest complete folders beyond `keep` go, except the one that `newest` names. Folders without a completion
    record are not counted and not touched: they may be another program's.

    Args:
        store: the checkpoints' path.
        keep: how many complete ones stay, at least 1.
        pattern: which folders are meant, with "*" and "?".

    Returns:
        The names that were removed, oldest first.

    Raises:
        CheckpointError: `keep` is less than 1, or a file cannot be removed.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least one checkpoint is kept; use a number from 1")
    recover(store)
    newest = read_newest(store)
    removed = [name for name in complete_names(store, pattern)[:-keep] if name != newest]
    for name in removed:
        _remove_checkpoint(store, name)
    store.remove_parts(DAY_S)
    for entry in store.names():
        if store.is_remote:
            if fnmatch.fnmatch(entry, pattern) and _is_abandoned(store, entry):
                store.remove_folder(entry)
        elif re.fullmatch(r"\..+\.[0-9a-f]{8}\.gone", entry):
            store.remove_folder(entry)
        elif re.fullmatch(r"\..+\.draft(-\w+)?", entry) and _is_dead_draft(store, entry):
            _remove_checkpoint(store, entry)
    return removed


def _is_abandoned(store: Store, name: str) -> bool:
    """Was the folder being written on an object store, and not touched for a day?"""
    return (
        is_unfinished(store, name)
        and not store.exists(f"{name}/{RECORD_NAME}")
        and 0 < store.modified(name) < time.time() - DAY_S
    )


def _is_dead_draft(store: Store, folder: str) -> bool:
    """Is the folder a draft of ours, and not touched for a day?"""
    names = store.names(folder)
    is_ours = not names or MARK_NAME in names or any(re.fullmatch(r"complete(_.+)?\.json", name) for name in names)
    return is_ours and time.time() - store.modified(folder) > DAY_S
