"""What a script keeps beside its model: any objects, read back without running code that they bring along.

[Note: allow-list] A pickle may name any callable. ``user_content`` is read by torch's restricted unpickler, which knows
tensors, numbers, strings and containers; this file adds what training scripts put there (parsed arguments, numpy
arrays, paths), and the caller may add classes of his own by name. Configurations of transformers are allowed by rule,
since they are plain data: an instance is made without its constructor, and its attributes go into its ``__dict__``.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import io
import pathlib
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

from modelparallel.checkpoints.partial.torch_files import read_torch_file
from modelparallel.checkpoints.stores.local import Store
from modelparallel.errors import CheckpointError, SMPConfigError

_CONFIGURATION_MODULE = re.compile(
    r"transformers\.(configuration_utils|generation\.configuration_utils|models(\.\w+)+\.configuration_\w+)"
)
# PretrainedConfig is called PreTrainedConfig in later versions.
_CONFIGURATION_BASES = ("PretrainedConfig", "PreTrainedConfig", "GenerationConfig")

#: A class or a function that a file may name; with the name that it has in the file where that is another.
Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]


@dataclass(frozen=True)
class Loading:
    """How a script wants a checkpoint to be loaded.

    Attributes:
        strict: the names in the checkpoint must be those of the model.
        masters_only: of optimizers only fp32 masters and the loss scale.
        allowed_types, trust_pickles: as in `read_user_content`.
    """

    strict: bool
    masters_only: bool
    allowed_types: Sequence[Allowed]
    trust_pickles: bool


def saved_bytes(value: Any, what: str, allowed_types: Sequence[Allowed] = (), trust_pickles: bool = False) -> bytes:
    """``torch.save`` to memory; warns of what could not be opened again with the same ``allowed_types`` and
    ``trust_pickles``. Local. Raises CheckpointError for what cannot be pickled.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:  # pickle raises what the object's own methods raise
        raise CheckpointError(
            f"{what} cannot be saved: {type(error).__name__}: {error}. Save what it is made from: state_dict() of "
            "objects that have one, vars(args), numbers, strings and tensors"
        ) from error
    if not trust_pickles and not _is_plain(value):
        _warn_of_foreign(buffer, what, allowed_types)
    return buffer.getvalue()


def _is_plain(value: Any) -> bool:
    """Whether it needs no look at its pickle: most objects of a checkpoint are numbers, or a dict of some."""
    if isinstance(value, list | tuple | dict):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return type(value) in (list, tuple, dict) and all(map(_is_plain, parts))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


def _warn_of_foreign(buffer: io.BytesIO, what: str, allowed_types: Sequence[Allowed]) -> None:
    buffer.seek(0)
    with torch.serialization.safe_globals([*_usual_types(), *allowed_types]):
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    foreign = sorted(name for name in unknown if configuration_class(name) is None)
    if foreign:
        names = ",".join(foreign)
        warnings.warn(
            f"{what} holds objects that smp.resume_from_checkpoint does not open by itself, since a pickle of them can "
            f"run code: {', '.join(foreign)}. Save plain data in their place (vars(args), dataclasses.asdict(...)), or "
            f'allow them when you resume: allowed_types=[...], or the parameter "allowed_types": "{names}"',
            stacklevel=4,
        )


def read_user_content(
    store: Store, name: str, allowed_types: Sequence[Allowed] = (), trust_pickles: bool = False
) -> Any:
    """The content of a file; None if there is no such file, or an empty one (Hugging Face's Trainer leaves one as a
    mark). Local.

    Args:
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

    def read(weights_only: bool) -> Any:
        return read_torch_file(store, name, map_location="cpu", weights_only=weights_only, **arguments)

    return read(False) if trust_pickles else _restricted(read, f"{what} in {store.path_of(name)}", allowed_types)


def open_object(data: IO[bytes], what: str, allowed_types: Sequence[Allowed] = (), trust_pickles: bool = False) -> Any:
    """What ``torch.save`` has written to ``data``; arguments and errors as of `read_restricted`."""
    start = data.tell()

    def read(weights_only: bool) -> Any:
        data.seek(start)
        return torch.load(data, map_location="cpu", weights_only=weights_only)

    return read(False) if trust_pickles else _restricted(read, what, allowed_types)


def _restricted(read: Callable[[bool], Any], what: str, allowed_types: Sequence[Allowed]) -> Any:
    """Let torch's restricted unpickler read; it knows the allowed types, gets to know configurations when it meets
    one, and what it refuses is said in our terms.
    """
    allowed: list[Any] = [*_usual_types(), *allowed_types]
    while True:
        try:
            with torch.serialization.safe_globals(allowed):
                return read(True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            named = re.search(r"(?:GLOBAL|[Uu]nsupported class) `?([\w.]+)", str(error))
            known = None if named is None else configuration_class(named[1])
            if known is not None and known not in allowed:
                allowed.append(known)
                continue
            culprit = f"names {named[1]}, which is not allowed" if named else f"is refused ({_first_line(error)})"
            raise CheckpointError(
                f"{what} {culprit}. If you know the file: allowed_types=[the class] allows it, trust_pickles=True "
                "allows everything, and lets the file run any code (unmodified scripts: the parameters of these names, "
                "or SMP_ALLOWED_TYPES=module.Class, SMP_TRUST_PICKLES=1)"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def configuration_class(name: str) -> type | None:
    """The class called ``module.Class`` if it is a configuration of transformers, or of the script, made from its; else
    None. Only modules of transformers that hold configurations are imported for it.
    """
    module_name, _, class_name = name.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None and _CONFIGURATION_MODULE.fullmatch(module_name):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return None
    member = getattr(module, class_name, None)
    if not isinstance(member, type):
        return None
    homes = {base.__module__ for base in member.__mro__ if base.__name__ in _CONFIGURATION_BASES}
    return member if any(_CONFIGURATION_MODULE.fullmatch(home) for home in homes) else None


def named_types(names: str) -> list[type]:
    """The classes of a parameter ``allowed_types``. Raises SMPConfigError for one that is not there."""
    types = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        module_name, _, class_name = name.rpartition(".")
        try:
            types.append(getattr(importlib.import_module(module_name), class_name))
        except (ImportError, AttributeError, ValueError) as error:
            raise SMPConfigError(
                f"allowed_types: there is no class {name!r} ({error}): write module.Class, of a module that can be "
                "imported here"
            ) from error
    return types


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
