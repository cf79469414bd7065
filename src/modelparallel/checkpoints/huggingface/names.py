"""What the tensors of a distributed model are called in files of Hugging Face, and which part of the model each is.

[Note: places] A translator of names (`translations_of`) renames, transposes and cuts tensors and computes nothing, so
that each tensor of a file is a rectangle of one tensor of the model, with its dims in another order. Which one is read
off tensors without memory that were sent through the translators. So a rank that holds some rectangles of the model
knows where in the files they are, and the other way round, and neither needs whole tensors.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.checkpoints.partial.pieces import rectangle_of
from modelparallel.errors import CheckpointError, UnsupportedError
from modelparallel.job import registry
from modelparallel.nn.huggingface import translations_of
from modelparallel.torch_compat import storage_identity

if TYPE_CHECKING:
    from modelparallel.model.wrapper import DistributedModel


@dataclass(frozen=True)
class FileTensor:
    """The tensor ``name`` of a file: of the model's tensor ``row`` the rectangle of ``sizes`` that begins at
    ``offsets``; its i-th dim is the dim ``dims[i]`` there.
    """

    name: str
    row: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return tuple(self.sizes[dim] for dim in self.dims)

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for all names of the same numbers."""
        return self.row, self.offsets, self.sizes, self.dims

    def view_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The tensor of the file, given the tensor of the model."""
        return rectangle_of(whole, self.offsets, self.sizes).permute(self.dims)


def file_tensors(model: DistributedModel) -> list[FileTensor]:
    """All tensors of the model's state dict as transformers calls them, or as the user does; tied ones under each of
    their names. The same on all ranks. Local.

    Raises CheckpointError for entries that are no tensors, which no file of safetensors can hold.
    """
    known = {name: row for row in model.table.rows() for name in (row.name, *row.aliases)}
    standins: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, value in model.module.state_dict(keep_vars=True).items():
        row = known.get(name)
        if row is None or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"'{name}' of the model's state dict is no parameter or buffer but a {type(value).__name__} "
                "(get_extra_state?), and files of safetensors hold tensors alone: use smp.save_checkpoint"
            )
        if row.name not in standins:
            standins[row.name] = torch.empty(row.full_shape, dtype=torch.uint8, device="meta")
        state[name] = standins[row.name]
    for to_transformers, _ in translations_of(model.module):
        state = to_transformers(state)
    rows = {storage_identity(tensor): name for name, tensor in standins.items()}
    result = []
    for name, view in state.items():
        row_name = rows.get(storage_identity(view))
        place = None if row_name is None else _place_of(view, standins[row_name])
        if row_name is None or place is None:
            raise CheckpointError(f"'{name}' is computed from the model's parameters and is not a part of one of them")
        result.append(FileTensor(name, row_name, *place))
    return result


def _place_of(
    view: torch.Tensor, whole: torch.Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """(offsets, sizes, dims) of a view of a contiguous tensor, None if it is no rectangle of it."""
    if view.ndim != whole.ndim:
        return None
    free = list(range(whole.ndim))
    dims: dict[int, int] = {}
    # Dims of length 1 have any stride: they take what is left over.
    for is_long in (True, False):
        for position in [position for position in range(view.ndim) if (view.shape[position] > 1) == is_long]:
            length, stride = view.shape[position], view.stride(position)
            fitting = [dim for dim in free if whole.stride(dim) == stride and whole.shape[dim] >= length]
            fitting.sort(key=lambda dim: whole.shape[dim] == 1)
            if not fitting and is_long:
                return None
            dims[position] = fitting[0] if fitting else free[0]
            free.remove(dims[position])
    order = tuple(dims[position] for position in range(view.ndim))
    sizes = tuple(view.shape[order.index(dim)] for dim in range(whole.ndim))
    offsets, rest = [], view.storage_offset()
    for dim in range(whole.ndim):
        stride = whole.stride(dim)
        offsets.append(rest // stride if stride and whole.shape[dim] > sizes[dim] else 0)
        rest -= offsets[-1] * stride
    return None if rest and view.numel() else (tuple(offsets), sizes, order)


# Models of transformers


@dataclass(frozen=True)
class TransformersModel:
    """What is to be known of a ``PreTrainedModel``, also of one that a distributed module has replaced."""

    kind: type[nn.Module]
    config: Any
    generation_config: Any
    #: Regular expressions: names that are left out of files since they are tied to others.
    tied: tuple[str, ...]

    @staticmethod
    def of(module: nn.Module) -> TransformersModel | None:
        """The TransformersModel of the user's whole model; None if it is not one of transformers. Imports nothing.
        Local.

        Raises UnsupportedError for adapters and quantised weights, whose files transformers names otherwise.
        """
        modeling = sys.modules.get("transformers.modeling_utils")
        kind = registry.class_replaced_by(module) or type(module)
        if modeling is None or not issubclass(kind, modeling.PreTrainedModel):
            return None
        for attribute, what in (("_hf_peft_config_loaded", "adapters"), ("hf_quantizer", "quantised weights")):
            if getattr(module, attribute, None):
                raise UnsupportedError(
                    f"{kind.__name__} has {what}: files of these are not written or read by ranks; merge them into the "
                    "weights first, or use smp.save_checkpoint"
                )
        own: Any = module
        tied = [*_tied_patterns(kind, "")]
        for name, part in module.named_modules():
            tied.extend(_tied_patterns(part, f"{name}." if name else ""))
        return TransformersModel(kind, own.config, getattr(own, "generation_config", None), tuple(dict.fromkeys(tied)))

    def patterns(self, attribute: str) -> list[str]:
        """One of the lists of regular expressions that classes of transformers have."""
        return list(getattr(self.kind, attribute, None) or ())

    def files(self, dtype: torch.dtype) -> dict[str, bytes]:
        """``config.json`` and, for models that generate, ``generation_config.json``, as transformers writes them."""
        config, generation = copy.deepcopy(self.config), copy.deepcopy(self.generation_config)
        config.dtype = str(dtype).removeprefix("torch.")
        config.architectures = [self.kind.__name__.removeprefix("FSDP")]
        if generation is not None and hasattr(config, "_get_non_default_generation_parameters"):
            for name, value in config._get_non_default_generation_parameters().items():
                setattr(generation, name, value)
                setattr(config, name, None)
        with tempfile.TemporaryDirectory() as folder:
            for part in (config, generation):
                if part is not None:
                    part.save_pretrained(folder)
            contents = {}
            for name in sorted(os.listdir(folder)):
                with open(os.path.join(folder, name), "rb") as file:
                    contents[name] = file.read()
        return contents


def _tied_patterns(of: Any, prefix: str) -> Iterable[str]:
    # A list, or (transformers 5) a dict from a name to that which it is tied to.
    return [f"{prefix}{pattern}" for pattern in getattr(of, "_tied_weights_keys", None) or ()]


def names_to_write(
    tensors: Sequence[FileTensor], known: TransformersModel | None
) -> tuple[list[FileTensor], dict[str, str]]:
    """Which of the tensors go into files: of tied ones one; and under which name the others are found there. Local.

    For a model of transformers the names stay away that ``save_pretrained`` leaves out and ``from_pretrained`` ties
    again; a tensor that is shared otherwise is written under each name, since nothing would tie it.
    """
    by_place: dict[tuple[Any, ...], list[str]] = {}
    ignored = set() if known is None else set(known.patterns("_keys_to_ignore_on_save"))
    tensors = [tensor for tensor in tensors if tensor.name not in ignored]
    for tensor in tensors:
        by_place.setdefault(tensor.place, []).append(tensor.name)
    aliases: dict[str, str] = {}
    for names in by_place.values():
        aliases.update(_aliases_among(names, known))
    return [tensor for tensor in tensors if tensor.name not in aliases], aliases


def _aliases_among(names: Sequence[str], known: TransformersModel | None) -> Mapping[str, str]:
    if known is None:
        return dict.fromkeys(names[1:], names[0])
    # tie_word_embeddings=False: what is shared nevertheless is not shared by from_pretrained.
    if len(names) < 2 or getattr(known.config, "tie_word_embeddings", True) is False:
        return {}
    matching = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in known.tied)]
    left_out = matching[: len(names) - 1]
    kept = next(name for name in names if name not in left_out)
    return dict.fromkeys(left_out, kept)
