"""Pickles of checkpoints, opened without running what they say: only what a list names can be in them.

A pickle is a program: it calls whatever it names. DCP's `.metadata` is one, read by DCP with no check. Here a pickle
may only name classes and functions of a list, each by its exact module and name. The list for DCP's metadata contains
classes that hold data, and nothing that opens, imports, evaluates or calls.
"""

import pickle
from collections.abc import Collection
from typing import IO, Any

import torch

from modelparallel.errors import CheckpointCorruptError, CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"

# What DCP of torch 2.11 to 2.13 writes into `.metadata`, with pickle protocols 2 to 5.
DCP_METADATA_NAMES: frozenset[tuple[str, str]] = frozenset(
    [
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        (_FILESYSTEM, "_StorageInfo"),
        (_FILESYSTEM, "_StoragePrefix"),
        ("torch", "Size"),
        # How torch pickles torch.strided: looks up a name among the layouts.
        ("torch.serialization", "_get_layout"),
        # The folder that the checkpoint was written to; a path is only a text until it is opened.
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),  # its module's name in Python 3.13
        ("pathlib._local", "PurePosixPath"),
        ("collections", "OrderedDict"),
        *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ]
)


class _ListedUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed: Collection[tuple[str, str]] | None, where: str) -> None:
        super().__init__(stream)
        self._allowed, self._where = allowed, where
        self._attributes: dict[Any, dict[str, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if self._allowed is None:
            return super().find_class(module, name)
        if (module, name) not in self._allowed:
            raise CheckpointError(
                f"{self._where} is a pickle that names {module}.{name}, which is not among what may be in it; to open "
                "it could run anything. If you know who wrote it: allow this type by name (allowed_types), or open "
                "all pickles of that checkpoint (trust_pickles=True)"
            )
        value = super().find_class(module, name)
        if hasattr(value, "__dict__") and value not in self._attributes:
            self._attributes[value] = dict(vars(value))
        return value

    def restore(self) -> list[str]:
        """Undo what the pickle has set on classes and functions of the list themselves, and say on which.

        The instruction that gives an instance its attributes can be pointed at a class as well.
        """
        changed = []
        for value, before in self._attributes.items():
            after = dict(vars(value))
            names = [name for name in {**before, **after} if before.get(name, self) is not after.get(name, self)]
            for name in names:
                if name in before:
                    setattr(value, name, before[name])
                else:
                    delattr(value, name)
            if names:
                changed.append(f"{value.__module__}.{value.__name__}")
        return changed

    def persistent_load(self, identifier: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of itself")


def load_pickle(stream: IO[bytes], allowed: Collection[tuple[str, str]] | None, where: str = "the file") -> Any:
    """Read one pickle in which only the classes and functions of a list may occur. Local.

    Args:
        stream: a binary file.
        allowed: (module, name) of each, exactly as the pickle names them; `DCP_METADATA_NAMES`, or more. None: anything
            may occur, for callers whose user has said that the pickle is to be trusted.
        where: what is read, for the error.

    Raises:
        CheckpointError: the pickle names something else; the text says what, and nothing of it was called.
        CheckpointCorruptError: it is not a whole pickle.
    """
    unpickler = _ListedUnpickler(stream, allowed, where)
    changed: list[str] = []
    try:
        result = unpickler.load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may fail with nearly any error
        raise CheckpointCorruptError(
            f"{where} is not a whole pickle ({type(error).__name__}: {error}). Load another checkpoint"
        ) from error
    finally:
        if allowed is not None:
            changed = unpickler.restore()
    if changed:
        raise CheckpointError(
            f"{where} is a pickle that changes {', '.join(changed)}, which no checkpoint does: do not trust it"
        )
    return result
