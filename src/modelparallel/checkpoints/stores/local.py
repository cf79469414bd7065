"""Files of checkpoints: under a local folder or a URL of fsspec, written whole or not at all, digested as written.

A `Store` is a root and the files below it, called by relative names with "/" in them. Names may come from a checkpoint,
that is from someone else, so each is checked: none leads out of the root, by its text or by a link.

[Note: What survives a crash] A local file is written beside its place, brought to the disk (fsync), renamed into place,
and then the folder is brought to the disk: at every moment its name leads to the whole old file or to the whole new
one. In a draft, which nobody reads, the folder waits until all files are there (`sync_names`). An object store does the
same with one put. Folders are renamed as one. What makes a folder of files a checkpoint is not here but in
`completion.py`.
"""

import errno
import os
import secrets
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystemBase

from modelparallel.checkpoints.stores.file_streams import (
    BUFFER_BYTES,
    PART_SUFFIX,
    REMEDIES,
    FileRecord,
    WriteStream,
    checked_name,
    shown,
    write_failure,
)
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError


class Store(ABC):
    """The files below one root. Every call is local to the calling process; nothing here is collective."""

    is_remote: bool = False
    root: str

    def path_of(self, name: str = "") -> str:
        """The path or URL of a file, or of the root. The name is checked.

        Raises:
            CheckpointError: the name leads out of the root.
        """
        raise NotImplementedError

    @abstractmethod
    def child(self, name: str, syncs_names: bool = True) -> "Store":
        """The store below the folder `name` of this one.

        `syncs_names=False`: of new files only the data are brought to the disk, one by one; `sync_names` does it for
        the names, all at once.
        """

    def open(self, name: str, mode: str = "rb") -> AbstractContextManager[Any]:
        """A binary file, as a context manager: "rb" gives a seekable file, "wb" a `WriteStream`.

        A file that is written appears under its name, whole, when the context ends without an error (local and object
        stores; other remote file systems may show it earlier), and not at all otherwise.

        Raises:
            CheckpointNotFoundError: no such file to read.
            CheckpointError: the name is wrong, or the file cannot be opened or written.
        """
        if mode not in ("rb", "wb"):
            raise ValueError(f"mode={mode!r}: a file of a checkpoint is opened with 'rb' or 'wb'")
        return self._reading(name) if mode == "rb" else self._writing(name)

    def read(self, name: str) -> bytes:
        """All bytes of a file.

        Raises:
            CheckpointNotFoundError: no such file.
            CheckpointError: it cannot be read.
        """
        with self.open(name) as stream:
            try:
                data: bytes = stream.read()
            except OSError as error:
                raise self._read_failure(name, error) from error
        return data

    def write(self, name: str, data: bytes) -> FileRecord:
        """Put a file there, whole or not at all; an old one of that name is replaced.

        Raises:
            CheckpointError: it could not be written; the text says why and what helps.
        """
        with self.open(name, "wb") as stream:
            stream.write(data)
        record: FileRecord = stream.record
        return record

    @abstractmethod
    def exists(self, name: str = "") -> bool:
        """Is there a file or a folder of that name?"""

    @abstractmethod
    def is_folder(self, name: str = "") -> bool:
        """Is there a folder of that name? (In an object store: a file below it.)"""

    @abstractmethod
    def size_of(self, name: str) -> int | None:
        """The length of a file in bytes; None where there is no such file."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, files and folders, sorted; empty where there is no such folder.

        Some object stores also show folders whose last file was removed; `exists` knows better.
        """

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Every file below a folder, at any depth: its name relative to the folder, and its length in bytes."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file, or anything in a folder, changed last, in seconds since 1970; 0.0 where that is not known."""

    def remove_parts(self, older_than_s: float) -> None:
        """Remove what killed writers left directly in the root, if it is that old (seconds); local stores only."""
        return

    @abstractmethod
    def make_folder(self, name: str = "") -> None:
        """Make a folder and those above it, unless they are there. Object stores need none."""

    @abstractmethod
    def remove(self, name: str, missing_ok: bool = False) -> None:
        """Remove a file.

        Raises:
            CheckpointNotFoundError: no such file, unless `missing_ok`.
        """

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Remove a folder and everything in it, file by file; links in it are removed, not followed."""

    @abstractmethod
    def rename_file(self, old: str, new: str) -> None:
        """Give a file another name; one that has that name is replaced."""

    @abstractmethod
    def rename_folder(self, old: str, new: str) -> None:
        """Give a folder another name, as one step; nothing may have that name. Local stores only.

        Raises:
            CheckpointError: the store is remote, or there is something of the new name.
        """

    @abstractmethod
    def sync_folder(self, name: str = "") -> None:
        """Bring a folder's list of names to the disk. Nothing to do for remote stores."""

    def sync_names(self) -> None:
        """Bring the names of all files to the disk. Nothing to do for remote stores.

        Raises:
            CheckpointError: the disk fails.
        """
        return

    @abstractmethod
    def _reading(self, name: str) -> AbstractContextManager[IO[bytes]]: ...

    @abstractmethod
    def _writing(self, name: str) -> AbstractContextManager[WriteStream]: ...

    def _read_failure(self, name: str, error: BaseException) -> CheckpointError:
        path = shown(self.path_of(name))
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return CheckpointNotFoundError(f"there is no file {path!r}: check path and tag")
        return CheckpointError(f"{path!r} cannot be read: {type(error).__name__}: {error}")


class LocalStore(Store):
    """Files below a local folder."""

    def __init__(self, root: str, syncs_names: bool = True) -> None:
        self.root = os.path.abspath(root)
        self._syncs_names = syncs_names

    def __repr__(self) -> str:
        return f"LocalStore({self.root!r})"

    def path_of(self, name: str = "") -> str:
        checked_name(name, self.root, may_be_empty=True)
        if not name:
            return self.root
        path = os.path.join(self.root, *name.split("/"))
        real_root, real = os.path.realpath(self.root), os.path.realpath(path)
        if not real.startswith(real_root.rstrip(os.sep) + os.sep):
            raise CheckpointError(
                f"{path!r} is, or lies behind, a link to {real!r}, outside of {self.root!r}: files of a checkpoint "
                "stay in its folder. Put the file itself there, or give the path that the link leads to"
            )
        return path

    def child(self, name: str, syncs_names: bool = True) -> Store:
        return LocalStore(self.path_of(name), syncs_names)

    def exists(self, name: str = "") -> bool:
        return os.path.exists(self.path_of(name))

    def is_folder(self, name: str = "") -> bool:
        return os.path.isdir(self.path_of(name))

    def size_of(self, name: str) -> int | None:
        try:
            status = os.stat(self.path_of(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._read_failure(name, error) from error
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def remove_parts(self, older_than_s: float) -> None:
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.root):
                with suppress(OSError):
                    if entry.name.endswith(PART_SUFFIX) and time.time() - entry.stat().st_mtime > older_than_s:
                        os.unlink(entry.path)

    def names(self, folder: str = "") -> list[str]:
        try:
            entries = os.listdir(self.path_of(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._read_failure(folder, error) from error
        return sorted(name for name in entries if not name.endswith(PART_SUFFIX))

    def sizes(self, folder: str = "") -> dict[str, int]:
        root = self.path_of(folder)
        lengths = {}
        for base, _, files in os.walk(root):
            for file in files:
                path = os.path.join(base, file)
                if not file.endswith(PART_SUFFIX):
                    # A file may be renamed by another process between the two calls.
                    with suppress(FileNotFoundError):
                        lengths[os.path.relpath(path, root).replace(os.sep, "/")] = os.stat(path).st_size
        return lengths

    def modified(self, name: str) -> float:
        path = self.path_of(name)
        newest = 0.0
        for base, _, files in os.walk(path):
            for entry in [base, *(os.path.join(base, file) for file in files)]:
                with suppress(FileNotFoundError):
                    newest = max(newest, os.lstat(entry).st_mtime)
        if not newest:
            with suppress(FileNotFoundError):
                newest = os.lstat(path).st_mtime
        return newest

    def make_folder(self, name: str = "") -> None:
        self._make_folders(self.path_of(name))

    def remove(self, name: str, missing_ok: bool = False) -> None:
        path = self.path_of(name)
        try:
            os.unlink(path)
        except FileNotFoundError as error:
            if not missing_ok:
                raise self._read_failure(name, error) from error
        except OSError as error:
            raise self._change_failure("remove", path, error) from error

    def remove_folder(self, name: str) -> None:
        path = self.path_of(name)
        try:
            _remove_tree(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._change_failure("remove", path, error) from error

    def rename_file(self, old: str, new: str) -> None:
        source, target = self.path_of(old), self.path_of(new)
        try:
            os.replace(source, target)
            if self._syncs_names:
                self._sync_path(os.path.dirname(target))
        except FileNotFoundError as error:
            raise self._read_failure(old, error) from error
        except OSError as error:
            raise self._change_failure("rename", source, error) from error

    def rename_folder(self, old: str, new: str) -> None:
        source, target = self.path_of(old), self.path_of(new)
        if os.path.lexists(target):
            raise CheckpointError(f"{source!r} cannot be renamed to {target!r}: that exists. Move it away")
        try:
            os.rename(source, target)
            for folder in {os.path.dirname(source), os.path.dirname(target)}:
                self._sync_path(folder)
        except FileNotFoundError as error:
            raise self._read_failure(old, error) from error
        except OSError as error:
            raise self._change_failure("rename", source, error) from error

    def sync_folder(self, name: str = "") -> None:
        path = self.path_of(name)
        try:
            self._sync_path(path)
        except OSError as error:
            raise self._change_failure("bring to the disk", path, error) from error

    def sync_names(self) -> None:
        for base, _, _ in os.walk(self.root, topdown=False):
            try:
                self._sync_path(base)
            except OSError as error:
                raise self._change_failure("bring to the disk", base, error) from error

    @contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes]]:
        path = self.path_of(name)
        try:
            # Not blocking: a pipe of that name, which nobody writes to, would be waited for without end.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, "not an ordinary file")
        except OSError as error:
            raise self._read_failure(name, error) from error
        with os.fdopen(descriptor, "rb") as stream:
            yield stream

    @contextmanager
    def _writing(self, name: str) -> Iterator[WriteStream]:
        path = self.path_of(name)
        folder = os.path.dirname(path)
        part = os.path.join(folder, f".{secrets.token_hex(8)}{PART_SUFFIX}")
        try:
            self._make_folders(folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            raw = os.fdopen(os.open(part, flags, 0o666), "wb", buffering=BUFFER_BYTES)
        except OSError as error:
            raise write_failure(path, 0, error) from error
        stream = WriteStream(raw)
        try:
            yield stream
            if stream.failure is not None:
                raise stream.failure
            stream._guarded(lambda: self._put_in_place(raw, part, path))
        except BaseException:
            for clean_up in (raw.close, lambda: os.unlink(part)):
                with suppress(OSError):
                    clean_up()
            if stream.failure is not None:
                raise write_failure(path, stream.size, stream.failure) from stream.failure
            raise

    def _put_in_place(self, raw: IO[bytes], part: str, path: str) -> None:
        raw.flush()
        os.fsync(raw.fileno())
        raw.close()
        os.replace(part, path)
        if self._syncs_names:
            self._sync_path(os.path.dirname(path))

    def _make_folders(self, path: str) -> None:
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for folder in reversed(missing):
            with suppress(FileExistsError):  # another rank makes it as well
                os.mkdir(folder)
            self._sync_path(os.path.dirname(folder))

    def _sync_path(self, folder: str) -> None:
        if os.name == "nt":
            return  # folders cannot be opened there
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems do this by themselves and refuse the call.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(descriptor)

    def _change_failure(self, action: str, path: str, error: OSError) -> CheckpointError:
        remedy = REMEDIES.get(error.errno or 0, "see the cause above")
        return CheckpointError(f"{action} {path!r} failed: {error}. Remedy: {remedy}")


def _remove_tree(path: str) -> None:
    """Remove a folder, its files first; links are removed and not followed."""
    with os.scandir(path) as entries:
        there = list(entries)
    for entry in there:
        if entry.is_dir(follow_symlinks=False):
            _remove_tree(entry.path)
        else:
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
    os.rmdir(path)


class HashingFileSystem(FileSystemBase):
    """What DCP's `FileSystemWriter` and `FileSystemReader` see of a store: names instead of paths, and digests.

        writer = FileSystemWriter("unused", sync_files=False)
        writer.fs, writer.path = HashingFileSystem(store), ""

    Files are brought to the disk when they are closed; `sync_files=False` spares DCP's own attempt, which for remote
    files syncs the whole machine. DCP loses errors of its writing threads when it has several (thread_count > 1):
    call `raise_failure` when the save is over.

    Attributes:
        records: size and digest of each file written through this object and closed without error, by name.
    """

    def __init__(self, store: Store, expected: Mapping[str, FileRecord] | None = None) -> None:
        """`expected`: when reading, the files of the completion record; others are refused. None: all are read."""
        self.store = store
        self.records: dict[str, FileRecord] = {}
        self._expected = expected
        self._failures: list[BaseException] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file; see `Store.open`. Local."""
        name = os.fspath(path)
        if mode == "rb":
            if self._expected is not None and name not in self._expected:
                raise CheckpointCorruptError(
                    f"{name!r} is not in the completion record of {shown(self.store.path_of())!r}, but the checkpoint "
                    "refers to it: it was changed after it was written. Load another one"
                )
            with self.store.open(name, mode) as stream:
                yield stream
            return
        self.records.pop(name, None)
        try:
            with self.store.open(name, mode) as stream:
                yield stream
        except BaseException as error:
            self._failures.append(error)
            raise
        self.records[name] = stream.record

    def raise_failure(self) -> None:
        """Raise the first error of a file that was written through this object, if there was one. Local."""
        if self._failures:
            raise self._failures[0]

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """The name `suffix` below the name `path`. Local."""
        base = os.fspath(path)
        return f"{base}/{suffix}" if base else suffix

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """The name itself; "" is the store's root. Local."""
        return os.fspath(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file another name, and its record with it. Local."""
        old, new = os.fspath(path), os.fspath(new_path)
        self.store.rename_file(old, new)
        if old in self.records:
            self.records[new] = self.records.pop(old)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make a folder. Local."""
        self.store.make_folder(os.fspath(path))

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Is there a file of that name? Local."""
        return self.store.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Remove a file, and its record. Local."""
        self.store.remove(os.fspath(path))
        self.records.pop(os.fspath(path), None)

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """The names directly below a folder. Local."""
        folder = os.fspath(path)
        return [self.concat_path(folder, name) for name in self.store.names(folder)]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this class opens the path by itself: no, it needs a store. Local."""
        return False
