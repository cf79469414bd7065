"""What a script keeps beside its model: any objects, read back without running code that they bring along.

[Note: allow-list] A pickle may name any callable. ``user_content`` is read by torch's restricted unpickler, which knows
tensors, numbers, strings and containers; this file adds what training scripts put there (parsed arguments, numpy
arrays, paths), and the caller may add classes of his own by name.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch

from modelparallel.checkpoints.storage import Store
from modelparallel.checkpoints.torch_files import read_torch_file
from modelparallel.errors import CheckpointError

#: A class or a function that a file may name; with the name that it has in the file where that is another.
Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]


def saved_bytes(value: Any, what: str) -> bytes:
    """``torch.save`` to memory. Local. Raises CheckpointError for what cannot be pickled."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:  # pickle raises what the object's own methods raise
        raise CheckpointError(
            f"{what} cannot be saved: {type(error).__name__}: {error}. Save what it is made from: state_dict() of "
            "objects that have one, vars(args), numbers, strings and tensors"
        ) from error
    return buffer.getvalue()


def read_user_content(
    store: Store, name: str, allowed_types: Sequence[Allowed] = (), trust_pickles: bool = False
) -> Any:
    """The content of a file; None if there is no such file, or an empty one (Hugging Face's Trainer leaves one as a
    mark). Local.

    Arguments:
        allowed_types: classes and functions that the file may name, beside those of [Note: allow-list].
        trust_pickles: open the file whatever it names; it can then run any code.

    Raises CheckpointError that names a class which is not allowed, CheckpointCorruptError for a damaged file.
    """
    if not store.size_of(name):
        return None
    return read_restricted(store, name, "user_content", allowed_types, trust_pickles)


def read_restricted(
    store: Store,
    name: str,
    what: str,
    allowed_types: Sequence[Allowed] = (),
    trust_pickles: bool = False,
    **arguments: Any,
) -> Any:
    """A file of ``torch.save``, on the CPU, that may name what [Note: allow-list] says; fails as `read_user_content`.
    Local.
    """
    if trust_pickles:
        return read_torch_file(store, name, map_location="cpu", weights_only=False, **arguments)
    with _explaining(f"{what} in {store.path_of(name)}", allowed_types):
        return read_torch_file(store, name, map_location="cpu", weights_only=True, **arguments)


def open_object(data: IO[bytes], what: str, allowed_types: Sequence[Allowed] = (), trust_pickles: bool = False) -> Any:
    """What ``torch.save`` has written to ``data``; arguments and errors as of `read_restricted`."""
    if trust_pickles:
        return torch.load(data, map_location="cpu", weights_only=False)
    with _explaining(what, allowed_types):
        return torch.load(data, map_location="cpu", weights_only=True)


@contextmanager
def _explaining(what: str, allowed_types: Sequence[Allowed]) -> Iterator[None]:
    """Inside, torch's restricted unpickler knows the allowed types, and says in our terms what it refuses."""
    try:
        with torch.serialization.safe_globals([*_usual_types(), *allowed_types]):
            yield
    except (pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        named = re.search(r"(?:GLOBAL|[Uu]nsupported class) `?([\w.]+)", str(error))
        culprit = f"names {named[1]}, which is not allowed" if named else f"is refused ({str(error).splitlines()[0]})"
        raise CheckpointError(
            f"{what} {culprit}. If you know the file: allowed_types=[the class] allows it, trust_pickles=True allows "
            "everything, and lets the file run any code"
        ) from error


def _usual_types() -> list[Any]:
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(1).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFDGSUOmM"}
    places = (pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath)
    times = (datetime.datetime, datetime.date, datetime.timedelta)
    containers = (collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque)
    numbers = (complex, set, frozenset, slice, bytearray)
    return [
        argparse.Namespace, *places, *times, *containers, *numbers,
        reconstruct, scalar, np.ndarray, np.dtype, *sorted(dtypes, key=lambda dtype: dtype.__name__),
        *_old_names(reconstruct, scalar),
    ]  # fmt: skip


def _old_names(reconstruct: Any, scalar: Any) -> list[tuple[Any, str]]:
    """numpy 1 and 2 call the module of these functions differently."""
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [(function, f"{module}.{function.__name__}") for function in (reconstruct, scalar) for module in modules]
