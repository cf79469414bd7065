"""Names of files of a checkpoint, what a file was when it was written, and the stream that counts and digests it."""

import errno
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash

from modelparallel.errors import CheckpointError

# Files under construction end so; they are no part of any checkpoint.
PART_SUFFIX = ".part"
BUFFER_BYTES = 1 << 20

CHECK_ADDRESS = "check the address, the credentials and their permissions, and the network"
REMEDIES = {
    errno.ENOSPC: "free space there, or keep fewer checkpoints (num_kept_partial_checkpoints), and save again",
    errno.EDQUOT: "the disk quota is used up: free space or raise it, and save again",
    errno.EFBIG: "a file may not be that large here: raise `ulimit -f`, or use a file system without the limit",
    errno.EIO: "the device or the network share failed: look at the system's log before you rely on it again",
    errno.EROFS: "the file system is mounted read-only: save to another path",
    errno.EACCES: "this user may not write there: change the permissions or save to another path",
    errno.EPERM: "this user may not write there: change the permissions or save to another path",
    errno.ENAMETOOLONG: "use a shorter tag or path",
}


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written.

    Attributes:
        size: its length in bytes.
        digest: its xxh3_128 digest, in hexadecimal.
    """

    size: int
    digest: str


def new_digest() -> xxhash.xxh3_128:
    """An empty xxh3_128 digest, to be updated with bytes. Local."""
    return xxhash.xxh3_128()


def checked_name(name: str, root: str, may_be_empty: bool = False) -> str:
    """The name of a file below `root`, if it is one that cannot lead out of it by its text. Local.

    Raises:
        CheckpointError: the name is absolute, has a drive, "..", ".", an empty part, a backslash or a zero byte.
    """
    if name == "" and may_be_empty:
        return name
    is_wrong = (
        not isinstance(name, str)
        or "\0" in name
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or any(part in ("", ".", "..") for part in name.split("/"))
    )
    if is_wrong:
        raise CheckpointError(
            f"{name!r} is not the name of a file below {shown(root)!r}: names are relative, with '/' between their "
            "parts and without '..', '.', backslashes, drives and zero bytes. If it stands in a checkpoint, do not "
            "trust that checkpoint"
        )
    return name


def shown(path: str) -> str:
    """A path or URL as it may stand in messages: without the password that a URL may carry. Local."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", path)


def write_failure(path: str, written: int, error: BaseException) -> CheckpointError:
    """The error for a file that could not be written: which, how far it came, why, and what helps. Local."""
    number = (error.errno if isinstance(error, OSError) else None) or 0
    code = f" ({errno.errorcode[number]})" if number in errno.errorcode else ""
    cause = (os.strerror(number) if number else "") or f"{type(error).__name__}: {error}"
    is_remote = "://" in path
    remedy = REMEDIES.get(number, CHECK_ADDRESS if is_remote and not number else "see the cause above")
    return CheckpointError(
        f"{shown(path)!r} could not be written: {cause}{code} after {written} bytes. Nothing that was there before is "
        f"changed. Remedy: {remedy}"
    )


class WriteStream(io.BufferedIOBase):
    """A binary file that is being written from front to back; it counts and digests what passes.

    It remembers its first failure: writers such as `torch.save` replace it by an error of their own on the way out.
    """

    def __init__(self, raw: Any) -> None:
        super().__init__()
        self._raw = raw
        self._digest = new_digest()
        self.size = 0
        self.failure: Exception | None = None

    def write(self, data: Any) -> int:
        """Append bytes (anything with a contiguous buffer). Local."""
        if self.failure is not None:
            raise self.failure
        view = memoryview(data)
        self._guarded(lambda: self._raw.write(view))
        self._digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Hand what is buffered to the system. Local."""
        if not self._raw.closed and self.failure is None:
            self._guarded(self._raw.flush)

    def tell(self) -> int:
        """The number of bytes written so far. Local."""
        return self.size

    def writable(self) -> bool:
        """Yes. Local."""
        return True

    def fileno(self) -> int:
        """The descriptor of a local file. Local.

        Raises:
            io.UnsupportedOperation: the file is not local.
        """
        if isinstance(self._raw, io.BytesIO):
            raise io.UnsupportedOperation("fileno")
        try:
            descriptor: int = self._raw.fileno()
            return descriptor
        except (AttributeError, OSError) as error:
            raise io.UnsupportedOperation("fileno") from error

    @property
    def record(self) -> FileRecord:
        """Size and digest of what was written so far."""
        return FileRecord(self.size, self._digest.hexdigest())

    def _guarded(self, operation: Callable[[], Any]) -> None:
        try:
            operation()
        except Exception as error:
            self.failure = error
            raise
