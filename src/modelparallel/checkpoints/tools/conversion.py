"""A checkpoint in another form, made in one process: a partial one as a full one, either as safetensors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelparallel.checkpoints.huggingface.safetensors_files import (
    INDEX_NAME,
    MAX_SHARD_SIZE,
    WEIGHTS_NAME,
    TensorToWrite,
    check_free,
    write_folder,
)
from modelparallel.checkpoints.huggingface.weights import read_weights
from modelparallel.checkpoints.partial.torch_files import store_of_file
from modelparallel.checkpoints.partial.user_content import Allowed
from modelparallel.checkpoints.partial.writing import USER_CONTENT_NAME
from modelparallel.checkpoints.stores import completion
from modelparallel.checkpoints.stores.file_streams import shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.tools.catalogue import RECORDED_KINDS, ListedCheckpoint, find, normal_path
from modelparallel.checkpoints.tools.offline import (
    Scratch,
    StoredPartial,
    model_facts_of,
    model_state,
    optimizer_state,
)
from modelparallel.checkpoints.whole.full import check_tag, write_full
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from modelparallel.errors.foreign_text import parse_json
from modelparallel.nn.huggingface import translations_named
from modelparallel.parameters.table import PARTIAL_KEY

_CONFIG_NAME = "config.json"
#: How the names of other files begin that ``from_pretrained`` of models and tokenizers reads.
_TOKENIZER_NAMES = (
    "added_tokens", "chat_template", "generation_config", "merges", "preprocessor_config", "processor_config",
    "sentencepiece", "special_tokens_map", "spiece", "tokenizer", "vocab",
)  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        destination: where.
        num_tensors, num_bytes: of the model.
        has_optimizer: whether the optimizer's state was written, too.
        names: what the names of the model are, in words.
    """

    destination: str
    num_tensors: int
    num_bytes: int
    has_optimizer: bool
    names: str


def convert_to_full(
    path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    tag: str | None = None,
    overwrite: bool = False,
    model_only: bool = False,
    translate: bool = True,
    model_index: int | None = None,
    verify: bool = True,
    allowed_types: Sequence[Allowed] = (),
    trust_pickles: bool = False,
) -> Conversion:
    """Write a partial checkpoint as ``smp.save_checkpoint(partial=False, full_optimizer=True)`` would have. Local.

    Args:
        path, tag: of the checkpoint, see `catalogue.find`.
        destination: ``<folder>/<new tag>``: the file of the merged state dict; the optimizer's, the user content's and
            the completion record come beside it. ``newest`` is written if there is none.
        overwrite: replace what is there.
        model_only: leave the optimizer out.
        translate: to the names of transformers where families of it were replaced, as ``translate_if_full``.
        model_index: which of several models, in the order in which they were wrapped.
        verify: compare the files with their digests first.
        allowed_types, trust_pickles: as ``smp.resume_from_checkpoint`` has them.

    The destination is complete or untouched at every moment. Large tensors are on disk all the while, in the
    destination's folder if it is local (offline.py). Raises CheckpointNotFoundError, CheckpointCorruptError for
    a checkpoint that is not whole, CheckpointError for a destination that exists.
    """
    target, new_tag = store_of_file(normal_path(destination))
    check_tag(new_tag)
    checkpoint = checked(find(path, tag), "full", verify)
    if not overwrite and (target.exists(new_tag) or target.exists(completion.record_name(new_tag, True))):
        raise exists_error(f"{target.path_of()}/{new_tag}")
    stored = open_partial(checkpoint, target, allowed_types, trust_pickles)
    index = chosen_model(stored, model_index)
    state, names = named_state(stored, index, translate)
    optimizer = None if model_only else optimizer_state(stored, index)
    content = None
    if checkpoint.folder.exists(USER_CONTENT_NAME):
        content = checkpoint.folder.read(USER_CONTENT_NAME) or None
    write_full(target, new_tag, state, optimizer, content, {"world_size": 1, "converted_from": "partial"})
    if completion.read_newest(target) is None:
        completion.write_newest(target, new_tag)
    return Conversion(f"{shown(target.path_of())}/{new_tag}", *size_of(state), optimizer is not None, names)


def convert_to_safetensors(
    path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    tag: str | None = None,
    config: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    translate: bool = True,
    model_index: int | None = None,
    verify: bool = True,
    trust_pickles: bool = False,
) -> Conversion:
    """Write the model of a checkpoint as a folder of safetensors, with an index if there are several. Local.

    Args:
        destination: the folder.
        config: a ``config.json`` of transformers, or a folder with one, of which the files of the tokenizer are taken,
            too: then ``from_pretrained(destination)`` loads the result.
        dtype: of the floating-point tensors; from a job in half precision, the fp32 masters are converted.
        max_shard_size: bytes of a file, or a text such as "5GB".
        path, tag, overwrite, translate, model_index, verify, trust_pickles: as of `convert_to_full`; of a file of
            weights the names stay what they are.

    A tensor with several names is written under the first; the other names are in the header of the files, as
    ``safetensors.torch.save_model`` has it. (All are written if the configuration says ``tie_word_embeddings: false``,
    since transformers would not tie them.) Entries that are no tensors are left out. Errors as of `convert_to_full`.
    """
    destination = os.fspath(destination)
    check_free(destination, overwrite)
    others = {} if config is None else _files_beside(os.fspath(config))
    checkpoint = checked(find(path, tag), "safetensors", verify)
    if checkpoint.kind in ("partial", "dcp"):
        stored = open_partial(checkpoint, store_of_file(normal_path(destination))[0], (), trust_pickles)
        state, names = named_state(stored, chosen_model(stored, model_index), translate, dtype)
    else:
        state, names = _weights(checkpoint, trust_pickles), "those of the file"
    state.pop(PARTIAL_KEY, None)
    left_out = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    written = {name: value for name, value in state.items() if name not in left_out}
    tensors, tied = (written, {}) if _unties(others) else _each_once(written)
    specs = {name: TensorToWrite(_dtype_of(tensor, dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_folder(
        destination,
        specs,
        lambda name: tensors[name].to(specs[name].dtype),
        other_files=others,
        max_shard_size=max_shard_size,
        metadata=tied,
        overwrite=overwrite,
        facts={"converted_from": checkpoint.kind},
    )
    if tied:
        names += f"; {len(tied)} tied tensors are left out: {', '.join(sorted(tied)[:5])}"
    if left_out:
        names += f"; {len(left_out)} entries that are no tensors are left out: {', '.join(left_out[:5])}"
    return Conversion(shown(destination), *size_of(tensors), False, names)


def _weights(checkpoint: ListedCheckpoint, trust_pickles: bool) -> dict[str, Any]:
    """The state dict of a checkpoint that has files of weights, mapped into memory where that can be."""
    if checkpoint.kind == "full":
        file = completion.file_of(checkpoint.store, checkpoint.name, checkpoint.name)
        return read_weights(checkpoint.path, file, trust_pickles)
    if checkpoint.kind == "exported":
        names = set(checkpoint.folder.names())
        return read_weights(checkpoint.folder.path_of(), INDEX_NAME if INDEX_NAME in names else WEIGHTS_NAME)
    return read_weights(checkpoint.path, checkpoint.name, trust_pickles)


def _unties(others: Mapping[str, bytes]) -> bool:
    """Whether transformers will not tie what is left out, so that shared tensors have to be there under each name."""
    try:
        return parse_json(others.get(_CONFIG_NAME, b"{}")).get("tie_word_embeddings", True) is False
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"--config: {_CONFIG_NAME} is not JSON of an object ({error}): give another") from error


def _each_once(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors under the first of their names, and which other name stands for which."""
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else name
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return {name: tensor for name, tensor in state.items() if name not in tied}, tied


def _dtype_of(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _files_beside(config: str) -> dict[str, bytes]:
    """``config.json``, and from a folder also what tokenizers keep beside it. Raises CheckpointNotFoundError."""
    store, name = store_of_file(normal_path(config))
    if not store.is_folder(name):
        return {_CONFIG_NAME: store.read(name)}
    files = {}
    for file in (folder := store.child(name)).names():
        if file == _CONFIG_NAME or file.startswith(_TOKENIZER_NAMES):
            place, own = store_of_file(f"{folder.path_of()}/{file}")
            files[file] = place.read(own)
    if _CONFIG_NAME not in files:
        raise CheckpointNotFoundError(f"there is no {_CONFIG_NAME} in {shown(config)!r}: give the file itself")
    return files


def checked(checkpoint: ListedCheckpoint, form: str, verify: bool) -> ListedCheckpoint:
    """The checkpoint, if it can be converted and is whole. Local."""
    if checkpoint.kind == "original" or (checkpoint.kind not in ("partial", "dcp") and form == "full"):
        raise CheckpointError(
            f"{checkpoint.place!r} is of kind {checkpoint.kind!r}: a full checkpoint is made from a partial one of "
            "smp.save_checkpoint, safetensors also from full ones and from other files of weights"
        )
    if checkpoint.kind in RECORDED_KINDS:
        is_full = checkpoint.kind == "full"
        problems = completion.problems_of(checkpoint.store, checkpoint.name, checks_digests=verify, is_full=is_full)
        if problems:
            raise CheckpointCorruptError(f"{checkpoint.place!r} is not what was written: {'; '.join(problems[:5])}")
    return checkpoint


def exists_error(place: str) -> CheckpointError:
    """For a destination that is there."""
    return CheckpointError(f"{shown(place)!r} exists: give another destination, or --overwrite to replace it")


def open_partial(
    checkpoint: ListedCheckpoint, target: Store, allowed_types: Sequence[Allowed], trust_pickles: bool
) -> StoredPartial:
    """The checkpoint, to be read tensor by tensor; scratch lies where the result will be. Local."""
    folder = None
    if not target.is_remote:
        target.make_folder()
        folder = target.path_of()
    scratch = Scratch(folder if folder is not None else tempfile.gettempdir())
    return StoredPartial(
        checkpoint.folder,
        checkpoint.files,
        checkpoint.facts,
        scratch,
        allowed=allowed_types,
        trusts_pickles=trust_pickles,
    )


def chosen_model(stored: StoredPartial, index: int | None) -> int:
    """Which model of the checkpoint is meant. Raises CheckpointError where that is not clear, or there is none."""
    firsts = {key.partition(".")[0] for key in stored.entries}
    numbers = sorted(
        0 if first == "model" else int(first.removeprefix("model_"))
        for first in firsts
        if first == "model" or (first.startswith("model_") and first.removeprefix("model_").isdigit())
    )
    if not numbers:
        raise CheckpointError(
            "the checkpoint has no entries 'model.<name>', so it is none of smp.save_checkpoint: "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save converts any checkpoint of DCP"
        )
    if index is None and len(numbers) > 1:
        raise CheckpointError(
            f"the checkpoint holds {len(numbers)} models: say which, --model-index 0 to {numbers[-1]}"
        )
    if index is not None and index not in numbers:
        raise CheckpointError(f"--model-index {index}: the checkpoint holds the models {', '.join(map(str, numbers))}")
    return numbers[0] if index is None else index


def named_state(
    stored: StoredPartial,
    index: int,
    translate: bool,
    dtype: torch.dtype | None = None,
    takes_masters: bool = False,
) -> tuple[dict[str, Any], str]:
    """The state dict of a model, and in words what its names are. Local. ``dtype``, ``takes_masters``: see
    `model_state`.
    """
    state = model_state(stored, index, dtype, takes_masters or dtype is not None)
    facts = model_facts_of(stored, index)
    families = facts.get("families", [])
    if not families:
        known = (
            "" if "families" in facts else "; an older version has saved it, and layers may have been replaced in it"
        )
        return state, f"those of the user's model{known}"
    classes = ", ".join(dict.fromkeys(class_name for _, class_name in families))
    if not translate:
        return state, f"those of the distributed layers that took the place of {classes}"
    try:
        pairs = translations_named([(prefix, class_name) for prefix, class_name in families])
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint has layers in place of {error.args[0]}, which this version cannot translate: use the "
            "version that saved it, or keep the names of the distributed layers (--keep-names)"
        ) from error
    for to_transformers, _ in pairs:
        state = to_transformers(state)
    return state, f"those of transformers ({classes})"


def size_of(state: Mapping[str, Any]) -> tuple[int, int]:
    """(number of tensors, bytes of their elements, each memory once). Local."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    by_place = {(tensor.data_ptr(), tuple(tensor.shape)): tensor for tensor in tensors}
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in by_place.values())
