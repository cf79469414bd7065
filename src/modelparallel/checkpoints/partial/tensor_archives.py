"""Tensors in files of archives that ``torch.save`` has written, read as runs of bytes.

[Note: archives that begin alike] To open an archive takes torch about a quarter of a millisecond, for a count of steps
as for a matrix. What says dtype, shape and order of the bytes lies in front of the bytes of the tensor. So of archives
of one file that are equal up to there, only the first is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from modelparallel.torch_compat import tensor_in_archive


@dataclass(frozen=True)
class ArchiveHead:
    """What is known of an archive, the form in which ``torch.save`` writes a tensor.

    Attributes:
        beginning: its bytes before the bytes of the tensor's storage.
        tensor: one like the tensor in it, on the meta device.
    """

    beginning: bytes
    tensor: torch.Tensor

    @property
    def start(self) -> int:
        """Where the bytes of the storage begin, counted from the beginning of the archive."""
        return len(self.beginning)


class TensorArchives:
    """What is known of the archives of one file."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[ArchiveHead]] = {}

    def head(self, archive: Any, length: int) -> ArchiveHead | None:
        """The head of an archive of ``length`` bytes, which the stream ``archive`` holds; leaves the stream anywhere.

        None for what is to be opened by ``torch.load``. Local.
        """
        known = self._by_length.setdefault(length, [])
        if known and (beginning := _beginning(archive, max(head.start for head in known))) is not None:
            for head in known:
                if beginning.startswith(head.beginning):
                    return head
        archive.seek(0)
        tensor_and_start = tensor_in_archive(archive)
        if tensor_and_start is None:
            return None
        tensor, start = tensor_and_start
        beginning = _beginning(archive, start)
        if beginning is None:
            return None
        known.append(ArchiveHead(beginning, tensor))
        return known[-1]


def _beginning(archive: Any, count: int) -> bytes | None:
    """The first ``count`` bytes; None where there are fewer."""
    data = bytearray(count)
    archive.seek(0)
    return bytes(data) if fill(memoryview(data), archive) else None


def fill(room: memoryview, stream: Any) -> bool:
    """Read as many bytes from a stream as there is room for; False where it ends before. Local."""
    while room.nbytes:
        count = stream.readinto(room)
        if not count:
            return False
        room = room[count:]
    return True
