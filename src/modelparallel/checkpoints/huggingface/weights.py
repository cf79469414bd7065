"""The weights of a whole model in a folder: one file of ``torch.save``, or safetensors, or several with an index.

What a model was saved by Hugging Face is called as there: ``pytorch_model.bin``, ``model.safetensors``, and with shards
``<name>.index.json`` beside. Tensors are mapped, not read: a rank touches only what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors

from modelparallel.checkpoints.partial.torch_files import store_of_file
from modelparallel.checkpoints.partial.user_content import read_restricted
from modelparallel.checkpoints.stores.file_streams import checked_name, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError, CheckpointNotFoundError
from modelparallel.errors.foreign_text import parse_json
from modelparallel.parameters.table import PARTIAL_KEY

#: What Hugging Face's Trainer asks for, whatever it has saved.
TORCH_NAME = "pytorch_model.bin"
_BESIDE_IT = ("model.safetensors", "model.safetensors.index.json", f"{TORCH_NAME}.index.json")
INDEX_ENDING = ".index.json"


def find_weights(path: str, tag: str) -> str:
    """The name in the folder of the weights with this tag; for ``pytorch_model.bin`` also what transformers may have
    written instead. Local.

    Raises CheckpointNotFoundError that lists what was looked for.
    """
    names = (tag, *_BESIDE_IT) if tag == TORCH_NAME else (tag,)
    for name in names:
        store, file = _place(path, name)
        if store.exists(file) and not store.is_folder(file):
            return name
    beside = open_store(path).names()
    raise CheckpointNotFoundError(
        f"there is no full checkpoint {tag!r} in {shown(path)!r}: looked for {', '.join(names)}; there "
        f"{f'are {chr(44).join(beside[:8])}' if beside else 'is nothing'}. Check path and tag; a checkpoint of "
        "partial=True is loaded with partial=True"
    )


def read_weights(path: str, name: str, trust_pickles: bool = False) -> dict[str, Any]:
    """The state dict in a file, or in the files of an index, on the CPU. Local.

    Raises CheckpointCorruptError for files that are missing, damaged, or hold something else, CheckpointError for a
    pickle that names classes, unless it is trusted.
    """
    if not name.endswith(INDEX_ENDING):
        return _read_file(path, name, trust_pickles)
    by_file: dict[str, list[str]] = {}
    for tensor, file in weight_map(path, name).items():
        by_file.setdefault(file, []).append(tensor)
    state: dict[str, Any] = {}
    for file, tensors in by_file.items():
        stored = _read_file(path, checked_name(file, path), trust_pickles)
        _check_names(path, name, file, tensors, stored)
        state.update((tensor, stored[tensor]) for tensor in tensors)
    return state


def _read_file(path: str, name: str, trust_pickles: bool) -> dict[str, Any]:
    store, file = _place(path, name)
    if not store.exists(file):
        raise CheckpointCorruptError(
            f"{shown(store.path_of(file))!r} is missing: the checkpoint is not whole; take another, or another copy"
        )
    if name.endswith(".safetensors"):
        return _read_safetensors(store, file)
    state = read_restricted(store, file, "the state dict", trust_pickles=trust_pickles, mmap=True)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointCorruptError(
            f"{shown(store.path_of(file))!r} holds a {type(state).__name__} and not a state dict: save "
            "model.state_dict(), or read the file with torch.load"
        )
    if state.get(PARTIAL_KEY) is True:
        raise CheckpointCorruptError(
            f"{shown(store.path_of(file))!r} holds a part of a model (local_state_dict): load it with smp.load and "
            "model.load_state_dict"
        )
    return dict(state)


def _read_safetensors(store: Store, name: str) -> dict[str, torch.Tensor]:
    try:
        if store.is_remote:
            return dict(load_safetensors(store.read(name)))
        with safe_open(store.path_of(name), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise CheckpointCorruptError(
            f"{shown(store.path_of(name))!r} is not a whole file of safetensors ({error}): take another copy"
        ) from error


def weight_map(path: str, name: str) -> dict[str, str]:
    """The file of each tensor, as an index says it. Local. Raises CheckpointCorruptError for what is no index."""
    store, file = _place(path, name)
    try:
        by_tensor = parse_json(store.read(file))["weight_map"]
        if not all(isinstance(value, str) for value in by_tensor.values()):
            raise TypeError("its weight_map has something else than names of files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(
            f"{shown(store.path_of(file))!r} is not an index of weights ({type(error).__name__}: {error}): take "
            "another copy"
        ) from error
    return dict(by_tensor)


def _check_names(path: str, index: str, file: str, tensors: Iterable[str], stored: Mapping[str, Any]) -> None:
    missing = [tensor for tensor in tensors if tensor not in stored]
    if missing:
        raise CheckpointCorruptError(
            f"{index} in {shown(path)!r} says that {file} holds {', '.join(missing[:5])}, and it does not: the files "
            "are not of one checkpoint; take another copy"
        )


def _place(path: str, name: str) -> tuple[Store, str]:
    """Where the file is: a link in the folder is followed, as the caches of Hugging Face have them."""
    checked_name(name, path)
    return store_of_file(f"{path.rstrip('/')}/{name}")
