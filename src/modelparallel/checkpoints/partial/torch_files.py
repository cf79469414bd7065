"""Single files of ``torch.save`` in a store."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import torch

from modelparallel.checkpoints.stores.file_streams import FileRecord, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError, CheckpointNotFoundError


def store_of_file(path: str) -> tuple[Store, str]:
    """The store and the name of a file that a caller has named by its path or URL. Local.

    A local link is followed: the caller has named it, not a checkpoint.
    """
    if "://" in path:
        folder, _, name = path.rpartition("/")
        return open_store(folder), name
    if os.path.islink(path):
        path = os.path.realpath(path)
    folder, name = os.path.split(path)
    return open_store(folder or os.curdir), name


def write_torch_file(store: Store, name: str, obj: Any, **arguments: Any) -> FileRecord:
    """``torch.save`` of ``obj``, whole or not at all; the file's size and digest. Local.

    Raises CheckpointError when the file cannot be written, and what ``torch.save`` raises for an object that cannot be.
    """
    with store.open(name, "wb") as stream:
        torch.save(obj, stream, **arguments)
    record: FileRecord = stream.record
    return record


def read_torch_file(store: Store, name: str, **arguments: Any) -> Any:
    """``torch.load`` of a file; with ``mmap=True`` a local file is mapped into memory, a remote one read whole. Local.

    Raises CheckpointNotFoundError, CheckpointCorruptError for a file that ends too early or is none of ``torch.save``,
    and ``pickle.UnpicklingError`` for what ``weights_only=True`` refuses.
    """
    source: Any
    if store.is_remote:
        arguments.pop("mmap", None)
        source = io.BytesIO(store.read(name))
    else:
        source = store.path_of(name)
        arguments["mmap"] = arguments.get("mmap") and _can_be_mapped(source)
    try:
        return torch.load(source, **arguments)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no file {store.path_of(name)!r}: check path and tag") from error
    except (EOFError, OSError) as error:
        raise _corrupt(store, name, error) from error
    except pickle.UnpicklingError as error:
        if "invalid load key" in str(error) or "truncated" in str(error):
            raise _corrupt(store, name, error) from error
        raise
    except RuntimeError as error:
        if "PytorchStreamReader" in str(error) or "zip archive" in str(error):
            raise _corrupt(store, name, error) from error
        raise
    except Exception as error:
        if arguments.get("weights_only"):  # its unpickler knows no others; what it meets in a damaged file is endless
            raise _corrupt(store, name, error) from error
        raise


def _can_be_mapped(path: str) -> bool:
    """Whether the file is of the zip format that ``torch.save`` has had since torch 1.6; older ones are read whole."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def _corrupt(store: Store, name: str, error: Exception) -> CheckpointCorruptError:
    first = (str(error).splitlines() or [""])[0]
    return CheckpointCorruptError(
        f"{shown(store.path_of(name))!r} is not a whole file of torch.save ({type(error).__name__}: {first}): take "
        "another checkpoint, or another copy of the file"
    )
