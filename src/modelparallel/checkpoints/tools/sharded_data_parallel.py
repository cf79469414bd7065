"""The whole model from a partial checkpoint of sharded data parallelism, in one process (smp-api section 18).

[Note: layout of the original] ``model_0.pt`` holds the module's state dict under ``module``, with the buffers;
``optimizer_<i>.pt`` of each rank i of the sharding group its shard of the fp32 parameters: ``fp32_flat_groups``, a list
of flat tensors, one per group, and ``partition_count``, the number of shards. A group is its shards one behind the
other, cut off at the end, and holds the parameters that ``param_shapes[group]`` of ``user_content.pt`` lists, in that
order; ``buffer_names`` there names the buffers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from modelparallel.checkpoints.partial.user_content import read_restricted
from modelparallel.checkpoints.partial.writing import USER_CONTENT_NAME
from modelparallel.checkpoints.stores.file_streams import shown
from modelparallel.checkpoints.tools.catalogue import find
from modelparallel.checkpoints.tools.conversion import checked, chosen_model, named_state
from modelparallel.checkpoints.tools.offline import StoredPartial
from modelparallel.checkpoints.tools.original import MODULE_PREFIX
from modelparallel.errors import CheckpointCorruptError, CheckpointError

#: How far a parameter in the module may be from its fp32 master: it was rounded to bfloat16 at most.
_ROUNDING = 2.0**-7


def get_full_state_dict_from_sharded_data_parallel_checkpoint(
    dir: str | os.PathLike[str],
    tag: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    trust_pickles: bool = False,
) -> dict[str, torch.Tensor]:
    """The state dict of the whole model, for ``load_state_dict`` of the plain model. Local; needs no process group.

    Args:
        dir: the folder, or URL, given to ``smp.save_checkpoint`` as its path.
        tag: as given there, or the name of the folder; None: the one that ``<dir>/newest`` names.
        dtype: of the floating-point tensors. None: parameters in fp32 where the checkpoint has fp32 masters of them,
            and all else as it was saved.
        trust_pickles: open any pickle in it, which can run any code.

    Reads partial checkpoints of this library, of any shape, after comparing their digests, and those of the original
    (see the note above), whose names lose ``module.`` if all have it. Raises CheckpointNotFoundError,
    CheckpointCorruptError for one that is not whole, CheckpointError for other layouts. Source: smp-api section 18.
    """
    checkpoint = find(dir, tag)
    if checkpoint.kind == "original":
        state = _state_of_original(checkpoint.folder, trust_pickles)
        return {name: _cast(value, dtype) for name, value in state.items()}
    checked(checkpoint, "full", verify=True)
    stored = StoredPartial(checkpoint.folder, checkpoint.files, checkpoint.facts, trusts_pickles=trust_pickles)
    state, _ = named_state(stored, chosen_model(stored, None), True, dtype, takes_masters=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _cast(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


# The layout of the original


def _state_of_original(folder: Any, trust_pickles: bool) -> dict[str, torch.Tensor]:
    def read(name: str) -> Any:
        if folder.size_of(name) is None:
            raise CheckpointCorruptError(
                f"{shown(folder.path_of())!r} has no file {name!r}: it is not whole, or was not saved with sharded "
                "data parallelism (sharded_data_parallel_degree > 1), and then smp.resume_from_checkpoint reads it"
            )
        return read_restricted(folder, name, name, (), trust_pickles, mmap=True)

    content = read(USER_CONTENT_NAME) if folder.size_of(USER_CONTENT_NAME) else None
    module = _entry(read("model_0.pt"), "module", "model_0.pt", Mapping)
    shapes = _entry(content, "param_shapes", USER_CONTENT_NAME, Sequence)
    buffer_names = set(_entry(content, "buffer_names", USER_CONTENT_NAME, Sequence))
    first = read("optimizer_0.pt")
    count = first.get("partition_count") if isinstance(first, Mapping) else None
    count = max(count) if isinstance(count, Sequence) and count else count
    if not isinstance(count, int) or count < 1:
        raise CheckpointCorruptError(f"'optimizer_0.pt' has partition_count={count!r}: expected the number of shards")
    files = [first, *(read(f"optimizer_{index}.pt") for index in range(1, count))]
    shards = [_entry(file, "fp32_flat_groups", f"optimizer_{index}.pt", Sequence) for index, file in enumerate(files)]
    state = {
        name: value
        for name, value in module.items()
        if isinstance(value, torch.Tensor) and (value.numel() or name in buffer_names)
    }
    for group, of_group in enumerate(shapes):
        parts = [rank_shards[group].reshape(-1) for rank_shards in shards if group < len(rank_shards)]
        if len(parts) < count:
            raise CheckpointCorruptError(f"group {group} of param_shapes is in {len(parts)} of {count} files")
        state.update(_parameters(torch.cat(parts), of_group, group, state))
    if all(name.startswith(MODULE_PREFIX) for name in state):
        state = {name.removeprefix(MODULE_PREFIX): value for name, value in state.items()}
    return state


def _parameters(
    flat: torch.Tensor, shapes: Mapping[str, Sequence[int]], group: int, saved: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parameters of a group, cut from its elements. Raises CheckpointCorruptError if they do not fit."""
    needed = sum(prod(shape) for shape in shapes.values())
    if flat.numel() < needed:
        raise CheckpointCorruptError(
            f"the shards of group {group} have {flat.numel()} elements, and its parameters {needed}: files are "
            "missing, or are of another checkpoint"
        )
    result: dict[str, torch.Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + prod(shape)
        result[name] = flat[start:stop].view(tuple(shape)).clone()
        start = stop
        rounded = saved.get(name)
        is_same = (
            rounded is None
            or rounded.shape != result[name].shape
            or torch.allclose(rounded.float(), result[name].float(), rtol=_ROUNDING, atol=1e-6)
        )
        if not is_same:
            raise CheckpointError(
                f"'{name}' cut from the shards is not '{name}' in model_0.pt: the shards are laid out in another way "
                "than documented, and cannot be merged"
            )
    return result


def _entry(value: Any, key: str, file: str, kind: type) -> Any:
    entry = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(entry, kind):
        raise CheckpointCorruptError(
            f"{file!r} has no entry {key!r} of a checkpoint of sharded data parallelism: smp.resume_from_checkpoint "
            "reads other checkpoints"
        )
    return entry
