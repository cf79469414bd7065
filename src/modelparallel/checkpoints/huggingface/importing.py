"""``smp.import_hf``: a folder of safetensors, as Hugging Face has them, straight into the shards of a model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from modelparallel.checkpoints.huggingface.names import FileTensor, TransformersModel, file_tensors
from modelparallel.checkpoints.huggingface.safetensors_reading import RectangleReader, StoredTensor, stored_tensors
from modelparallel.checkpoints.partial.agreement import agreed
from modelparallel.checkpoints.partial.contents import model_pieces, named_parameters, rows_of, target_pieces
from modelparallel.checkpoints.partial.pieces import Piece
from modelparallel.errors import CheckpointError, SMPConfigError
from modelparallel.model.wrapper import DistributedModel
from modelparallel.nn.huggingface import translations_of
from modelparallel.optimizer.wrapper import wrapped_optimizers
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.optimizer.wrapper import DistributedOptimizer

_HALF = (torch.float16, torch.bfloat16)
#: Buffers without weights that older versions of transformers kept in files: of the model, and of replaced layers.
_OLD_BUFFERS = r"rotary_emb\.inv_freq$"
_OLD_MASKS = r"(^|\.)(attn|attention|crossattention)\.(bias|masked_bias)$"


class Incompatible(NamedTuple):
    """The names that do not fit, as ``load_state_dict`` of torch returns them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def import_hf(path: str | os.PathLike[str], model: DistributedModel, *, strict: bool = True) -> Incompatible:
    """Load weights from safetensors, each rank only what it holds of them. Collective over the world. Ours, not the
    original's.

    Reads what ``smp.export_hf``, ``save_pretrained`` of transformers, or safetensors by themselves have written; names
    are translated where layers of a model of transformers were replaced, and tied weights are there once. Before the
    first step, too: a model that is not partitioned yet gets its weights at the partition. Masters of half precision
    are read as well, of optimizers that exist by then. transformers need not be installed.

    Args:
        path: a folder with ``model.safetensors`` or ``model.safetensors.index.json``, a single file, or the URL of
            either. Each rank reads its own; they must hold the same.
        model: the wrapped model.
        strict: names must be the same; False takes the names that both have.

    Returns:
        The missing and the unexpected names, as ``load_state_dict`` does.

    Raises:
        CheckpointError: on all ranks, names (if ``strict``) or shapes differ.
        CheckpointNotFoundError: on all ranks, there are no such files.
        CheckpointCorruptError: on all ranks, files are not whole.
        SMPConfigError: wrong arguments.
    """
    runtime = runtime_module.current()
    if runtime.background_save is not None:
        runtime.background_save.wait()
    with agreed():
        if not isinstance(model, DistributedModel):
            raise SMPConfigError(
                f"smp.import_hf: expected a smp.DistributedModel, got {type(model).__name__}: give the wrapped one"
            )
        match = _matched(model, stored_tensors(path))
        _check(match, strict)
    if model.partitioned:
        _load(model, match)
    else:
        model.load_when_partitioned(lambda: _load(model, match))
    return Incompatible(match.missing, match.unexpected)


@dataclass(frozen=True)
class _Match:
    """``sources``: each tensor of the files that the model wants, as a part of the model and where it lies."""

    sources: Sequence[tuple[FileTensor, StoredTensor]]
    missing: list[str]
    unexpected: list[str]

    def of_row(self) -> dict[str, list[tuple[FileTensor, StoredTensor]]]:
        """The sources by the name of the model's tensor."""
        result: dict[str, list[tuple[FileTensor, StoredTensor]]] = {}
        for tensor, stored in self.sources:
            result.setdefault(tensor.row, []).append((tensor, stored))
        return result


# What goes where


def _matched(model: DistributedModel, stored: Mapping[str, StoredTensor]) -> _Match:
    known = TransformersModel.of(model.module)
    expected = {tensor.name: tensor for tensor in file_tensors(model)}
    matched: dict[str, StoredTensor] = {}
    unexpected = []
    for name, value in stored.items():
        if name in expected:
            matched[name] = value
        else:
            unexpected.append(name)
    for name in list(unexpected):
        other = next((other for other in _other_names(name, known) if other in expected and other not in matched), None)
        if other is not None:
            matched[other] = stored[name]
            unexpected.remove(name)
    by_place: dict[tuple[object, ...], list[FileTensor]] = {}
    for tensor in expected.values():
        by_place.setdefault(tensor.place, []).append(tensor)
    sources: list[tuple[FileTensor, StoredTensor]] = []
    missing: list[str] = []
    for tensors in by_place.values():
        held = [tensor for tensor in tensors if tensor.name in matched]
        if held:
            sources.extend((tensor, matched[tensor.name]) for tensor in held[:1])
        else:
            missing.append(tensors[0].name)
    if known is not None:
        may_miss = known.patterns("_keys_to_ignore_on_load_missing") + known.patterns("_keys_to_ignore_on_save")
        may_come = [*known.patterns("_keys_to_ignore_on_load_unexpected"), _OLD_BUFFERS]
        may_come += [_OLD_MASKS] if translations_of(model.module) else []
        buffers = {name for name, _ in model.module.named_buffers()}
        unexpected = [name for name in unexpected if buffers.isdisjoint(_other_names(name, known))]
        missing = [name for name in missing if not any(re.search(pattern, name) for pattern in may_miss)]
        unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in may_come)]
    return _Match(sources, missing, unexpected)


def _other_names(name: str, known: TransformersModel | None) -> Iterator[str]:
    """What transformers also takes a name for: of the body alone for the whole model or the other way round, and of
    the LayerNorms of old.
    """
    if known is None:
        return
    prefix = str(getattr(known.kind, "base_model_prefix", "") or "")
    newer = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))
    for each in dict.fromkeys((name, newer)):
        yield each
        if prefix:
            yield f"{prefix}.{each}"
            if each.startswith(f"{prefix}."):
                yield each.removeprefix(f"{prefix}.")


def _check(match: _Match, strict: bool) -> None:
    wrong = [
        f"'{tensor.name}' has shape {stored.shape} in the files and {tensor.shape} in the model"
        for tensor, stored in match.sources
        if tensor.shape != stored.shape
    ]
    if wrong:
        raise CheckpointError(
            f"smp.import_hf: {'; '.join(wrong[:5])}{_more(wrong)}: load the weights of a model of the same "
            "configuration"
        )
    if strict and (match.missing or match.unexpected):
        raise CheckpointError(
            f"smp.import_hf(strict=True): missing {_listed(match.missing)}; unexpected {_listed(match.unexpected)}: "
            "load the weights of the same model, or pass strict=False to take what both have"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + _more(names, 8) if names else "none"


def _more(things: Sequence[str], shown: int = 5) -> str:
    return f" and {len(things) - shown} more" if len(things) > shown else ""


# Reading


def _load(model: DistributedModel, match: _Match) -> None:
    """Fill what this rank holds of a partitioned model, and its masters. Collective over the world."""
    with agreed(), torch.no_grad(), RectangleReader() as reader:
        by_row = match.of_row()
        stage = model._runtime.engine.stage
        for row, tensor in rows_of(model):
            if row.name in by_row and model.table.is_local(row, stage):
                for piece in model_pieces(model, row, tensor, row.name):
                    _fill(piece, by_row[row.name], reader)
        for optimizer in wrapped_optimizers(model._runtime):
            optimizer.init_master_params()
            _fill_masters(model, optimizer, by_row, reader)


def _fill_masters(
    model: DistributedModel,
    optimizer: DistributedOptimizer,
    by_row: Mapping[str, Sequence[tuple[FileTensor, StoredTensor]]],
    reader: RectangleReader,
) -> None:
    """From files in full precision: the parameters are rounded, their masters need not be."""
    stage = model._runtime.engine.stage
    for parameter, row in named_parameters(optimizer):
        sources = by_row.get(row.name, ()) if model.table.row_of(parameter) is row else ()
        if not sources or not model.table.is_local(row, stage) or any(each.dtype in _HALF for _, each in sources):
            continue
        for target in optimizer.targets.of_parameter(parameter):
            if target.has_master:
                for piece in target_pieces(optimizer, row.name, row, target, target.tensor.detach()):
                    _fill(piece, sources, reader)


def _fill(piece: Piece, sources: Sequence[tuple[FileTensor, StoredTensor]], reader: RectangleReader) -> None:
    """Read what the piece and the tensors of the files have in common."""
    for tensor, stored in sources:
        part, starts, lengths = piece.tensor, [0] * len(tensor.dims), [0] * len(tensor.dims)
        for dim, offset in enumerate(piece.offsets):
            low = max(offset, tensor.offsets[dim])
            high = min(offset + piece.sizes[dim], tensor.offsets[dim] + tensor.sizes[dim])
            if low >= high:
                break
            part = part.narrow(dim, low - offset, high - low)
            position = tensor.dims.index(dim)
            starts[position], lengths[position] = low - tensor.offsets[dim], high - low
        else:
            part.permute(tensor.dims).copy_(reader.read(stored, starts, lengths))
