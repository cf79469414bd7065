"""``smp.save`` and ``smp.load``: one object in a file of this rank (smp-api sections 14 and 18).

[Note: names of parts] An object that each rank has a part of is in one file per part, and the name says whose it is.
The original has had three ways to say that, and scripts build all three by hand:

    <f>_<mp_rank>                               without tensor parallelism
    <f>_<pp_rank>_<tp_rank>                     with it
    <f>_<pp_rank>_<tp_rank>_<rdp_rank>          with v3=True, where also ranks of one RDP_GROUP have different parts

``save`` writes one of them, so that a script which removes, or lists, or reads the file under the documented name finds
it, and no second copy stays behind. ``load`` takes the first that is there, from the last to the first.
"""

from __future__ import annotations

import logging
import os
import pickle
from types import ModuleType
from typing import Any

from torch.distributed.tensor import DTensor

from modelparallel.checkpoints.partial.torch_files import read_torch_file, store_of_file, write_torch_file
from modelparallel.errors import CheckpointError, CheckpointNotFoundError
from modelparallel.job.messages import mp_rank, pp_rank, rdp_rank, tp_rank, tp_size

logger = logging.getLogger("modelparallel")


class FileNameError(CheckpointError, TypeError):
    """A file is named by something that is not a string."""


def save(
    obj: Any,
    f: str,
    partial: bool = True,
    pickle_module: ModuleType = pickle,
    pickle_protocol: int = 2,
    v3: bool = False,
    *,
    pickel_module: ModuleType | None = None,
) -> None:
    """Write an object with ``torch.save``: this rank's part, or with ``partial=False`` a whole object. Local.

    A part is called ``<f>_<mp_rank>``, with tensor parallelism ``<f>_<pp_rank>_<tp_rank>``, with ``v3=True``
    ``<f>_<pp_rank>_<tp_rank>_<rdp_rank>``; a whole object is called ``f``. Ranks of other copies hold the same parts
    and must not write them too: guard the call by ``smp.dp_rank() == 0``, with tensor parallelism by ``smp.rdp_rank()
    == 0``; not with ``v3``. A file that is there already is replaced at once when the new one is complete.

    Args:
        obj: any object that can be pickled.
        f: a path, or a URL of fsspec.
        partial, v3: see above.
        pickle_module, pickle_protocol: as ``torch.save`` has them. ``pickel_module``: the same under the name that the
            original's documents have.

    Raises:
        FileNameError: ``f`` is not a string; a TypeError.
        CheckpointError: the file cannot be written, or the object holds shards of parameters.
        NotInitializedError: a part, before ``smp.init()``.

    Source: smp-api sections 14 and 18.
    """
    _check_name("smp.save", f)
    _check_whole(obj)
    arguments = {"pickle_module": pickel_module or pickle_module, "pickle_protocol": pickle_protocol}
    store, name = store_of_file(f + (_suffixes(v3)[0] if partial else ""))
    write_torch_file(store, name, obj, **arguments)


def load(
    f: str,
    map_location: Any = None,
    pickle_module: ModuleType = pickle,
    partial: bool = True,
    back_compat: bool = False,
    **pickle_load_args: Any,
) -> Any:
    """Read what `save` has written, or with ``partial=False`` any file of ``torch.save``. Local.

    For a part these names are tried in turn: ``<f>_<pp_rank>_<tp_rank>_<rdp_rank>``, ``<f>_<pp_rank>_<tp_rank>``,
    ``<f>_<mp_rank>``; with ``back_compat=True`` from the last to the first.

    **The file is trusted**: as in the original, any object may be in it, and reading one can run any code. Pass
    ``weights_only=True`` for a file of tensors that you did not write.

    Args:
        f: as it was given to `save`.
        map_location, pickle_module, pickle_load_args: as ``torch.load`` has them (``mmap=True`` only for local files).
        partial, back_compat: see above.

    Raises:
        FileNameError: ``f`` is not a string; a TypeError.
        CheckpointNotFoundError: no such file; lists the names that were tried; a FileNotFoundError.

    Source: smp-api sections 14 and 18.
    """
    _check_name("smp.load", f)
    paths = [f]
    if partial:
        paths = [f + suffix for suffix in dict.fromkeys(_suffixes(is_v3=True))]
        paths = paths[::-1] if back_compat else paths
    places = [store_of_file(path) for path in paths]
    existing = [(store, name) for store, name in places if store.exists(name)]
    if not existing:
        raise CheckpointNotFoundError(_not_found(f, paths, partial))
    (store, name), *others = existing
    if others:
        logger.warning(
            "smp.load(%r): %s is read, and %s passed over: parts of several saves are mixed here; remove the older",
            f, name, ", ".join(other for _, other in others),
        )  # fmt: skip
    arguments = {"weights_only": False, **pickle_load_args}
    if not arguments["weights_only"]:  # torch takes no other unpickler with it
        arguments["pickle_module"] = pickle_module
    return read_torch_file(store, name, map_location=map_location, **arguments)


def _check_whole(obj: Any) -> None:
    """A part of a model, saved by one rank of those that share its parameters, would be lost without the others."""
    if _has_shards(obj):
        raise CheckpointError(
            "smp.save: the object holds shards of parameters (local_state_dict() under sharded data parallelism), of "
            "which this rank has its rows alone: save model.local_state_dict(gather_if_shard=True), which all ranks of "
            "the sharding group call, or use smp.save_checkpoint"
        )


def _has_shards(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_has_shards, value.values() if isinstance(value, dict) else value))
    return isinstance(value, DTensor)


def _check_name(call: str, f: Any) -> None:
    if not isinstance(f, str):
        raise FileNameError(f"{call}: f must be a string, got {type(f).__name__} {f!r}: pass str(path)")
    if not f or f.endswith(("/", os.sep)):
        raise CheckpointError(f"{call}: {f!r} names a folder: give the name of a file in it")


def _suffixes(is_v3: bool) -> list[str]:
    """What is appended to the name of this rank's part: the ways in which it may be called, the one to write first."""
    ways = [f"_{pp_rank()}_{tp_rank()}", f"_{mp_rank()}"]
    if is_v3:
        return [f"{ways[0]}_{rdp_rank()}", *ways]
    return ways if tp_size() > 1 else ways[::-1]


def _not_found(f: str, paths: list[str], is_partial: bool) -> str:
    store, name = store_of_file(f)
    beside = [other for other in store.names() if other == name or other.startswith(f"{name}_")]
    text = f"smp.load({f!r}, partial={is_partial}): there is no {', '.join(paths)}"
    if not beside:
        return f"{text}, and nothing else of this name"
    if is_partial and name in beside:
        return f"{text}, but a file of the whole object, {name}: load it with partial=False"
    return f"{text}, but {', '.join(beside[:8])}{', ...' if len(beside) > 8 else ''}: " + (
        "they were saved with other degrees of parallelism" if is_partial else "load parts with partial=True"
    )
