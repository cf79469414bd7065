"""``smp.export_hf``: a distributed model as a folder of safetensors that plain transformers loads.

[Note: rounds] Each file is written by one rank, tensor by tensor, as its parts arrive from the ranks that hold them
(whole_tensors.py): as many files at a time as there are ranks, in rounds. After each round the ranks hear of each
other's failures; a rank that cannot write still takes what the others send, so that nobody waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelparallel.checkpoints.huggingface.names import FileTensor, TransformersModel, file_tensors, names_to_write
from modelparallel.checkpoints.huggingface.safetensors_files import (
    DTYPE_NAMES,
    MAX_SHARD_SIZE,
    SafetensorsWriter,
    TensorToWrite,
    check_free,
    folder_draft,
    order_in_file,
    parse_size,
    safetensors_file,
    split_into_files,
    write_other_files,
)
from modelparallel.checkpoints.partial.agreement import agreed, agreed_token
from modelparallel.checkpoints.partial.contents import model_pieces, named_parameters, rows_of, target_pieces
from modelparallel.checkpoints.partial.pieces import Piece
from modelparallel.checkpoints.partial.whole_tensors import WholeTensors
from modelparallel.checkpoints.partial.writing import checkpoint_group
from modelparallel.checkpoints.stores.completion import Draft
from modelparallel.checkpoints.stores.file_streams import FileRecord
from modelparallel.checkpoints.stores.local import Store
from modelparallel.config.topology import CommGroup
from modelparallel.errors import SMPConfigError, StepUsageError
from modelparallel.job.messages import allgather
from modelparallel.model import creation
from modelparallel.model.wrapper import DistributedModel
from modelparallel.optimizer.wrapper import wrapped_optimizers
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.training.runtime import Runtime


def export_hf(
    path: str | os.PathLike[str],
    model: DistributedModel,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model as a folder of safetensors, as ``save_pretrained`` of transformers does. Collective over the
    world, with equal arguments. Ours, not the original's.

    A model of transformers, also one whose layers were replaced, is loaded by ``AutoModel....from_pretrained(path)``:
    the folder has its ``config.json``, and its weights under its own names, tied ones once. The weights of any other
    module have the names of its state dict. No rank holds the whole model: each file is written by one rank, tensor by
    tensor.

    Args:
        path: the folder, which is made, or a URL that fsspec knows; the same place on all ranks. It is there when it is
            complete, and not before (docs/checkpoints.md).
        model: the wrapped model; after the first step, unless its weights are in memory before.
        max_shard_size: where a file ends: bytes, or a text such as "5GB" (10^9) or "5GiB".
        dtype: of floating-point numbers in the files; None: as the model computes with them. ``torch.float32`` gives
            the masters of parameters in half precision, if there are some.
        overwrite: replace a folder of weights that is there, with all that is in it.

    Raises:
        CheckpointError: on all ranks, when the folder is there, a rank cannot write, or the state dict holds something
            else than tensors.
        SMPConfigError: wrong arguments.
        StepUsageError: the weights are not in memory yet.
        UnsupportedError: adapters, or quantised weights.
    """
    runtime = runtime_module.current()
    token = agreed_token(
        "smp.export_hf", path=os.fspath(path), max_shard_size=str(max_shard_size), dtype=str(dtype), overwrite=overwrite
    )
    if runtime.background_save is not None:
        runtime.background_save.wait()
    with agreed():
        _check(model, max_shard_size, dtype)
        draft = folder_draft(path, token)
        if runtime.session.groups.world.rank_in_group == 0:
            check_free(path, overwrite)
        known = TransformersModel.of(model.module)
        tensors, aliases = names_to_write(file_tensors(model), known)
        pieces = _pieces_to_write(runtime, model, uses_masters=dtype == torch.float32)
    export = _Export(runtime, model, draft, tensors, pieces, dtype)
    try:
        export.run(max_shard_size, known, aliases if known is None else {})
    except BaseException:
        if export.is_begun:
            draft.discard()
        raise


def _check(model: DistributedModel, max_shard_size: int | str, dtype: torch.dtype | None) -> None:
    if not isinstance(model, DistributedModel):
        raise SMPConfigError(
            f"smp.export_hf: expected a smp.DistributedModel, got {type(model).__name__}: give the wrapped one"
        )
    if dtype is not None and (dtype not in DTYPE_NAMES or not dtype.is_floating_point):
        raise SMPConfigError(f"smp.export_hf: dtype={dtype!r}: expected a floating-point dtype of torch, or None")
    parse_size(max_shard_size)
    if not model.partitioned and (model._loads or creation.has_deferred(model.module)):
        raise StepUsageError(
            "smp.export_hf: the weights of the model are read or made when it is partitioned, in the first step: "
            "export it after that"
        )


def _pieces_to_write(runtime: Runtime, model: DistributedModel, uses_masters: bool) -> list[Piece]:
    """What this rank offers: parameters under ``param.<row>``, masters under ``master.<row>``. Local."""
    stage = runtime.engine.stage
    result = []
    for row, tensor in rows_of(model):
        if row.home in (None, stage):
            result.extend(model_pieces(model, row, tensor, f"param.{row.name}"))
    for optimizer in wrapped_optimizers(runtime) if uses_masters else ():
        optimizer.targets.refresh_masters()
        for parameter, row in named_parameters(optimizer):
            if model.table.row_of(parameter) is row and row.home in (None, stage):
                for target in optimizer.targets.of_parameter(parameter):
                    if target.has_master:
                        master = target.tensor.detach()
                        result.extend(target_pieces(optimizer, f"master.{row.name}", row, target, master))
    return result


@dataclass
class _Export:
    """One export; ``run`` is collective over the world."""

    runtime: Runtime
    model: DistributedModel
    draft: Draft
    tensors: Sequence[FileTensor]
    pieces: Sequence[Piece]
    dtype: torch.dtype | None
    #: On the first rank: whether there is a draft.
    is_begun: bool = False

    def run(self, max_shard_size: int | str, known: TransformersModel | None, metadata: Mapping[str, str]) -> None:
        world = self.runtime.session.groups.world
        whole = WholeTensors(self.pieces, checkpoint_group(self.runtime))
        keys = self._sources(whole)
        specs = {tensor.name: self._spec(tensor, whole, keys) for tensor in self.tensors}
        files = split_into_files(specs, max_shard_size)
        with agreed():
            if world.rank_in_group == 0:
                self.is_begun = True
                self.draft.start()
        records: dict[str, FileRecord] = {}
        names = list(files)
        for start in range(0, len(names), world.size):
            chosen = names[start : start + world.size]
            parts = [{name: specs[name] for name in files[file]} for file in chosen]
            records.update(self._write_round(whole, keys, chosen, parts, metadata))
        with agreed():
            if world.rank_in_group == 0:
                other_files = {} if known is None else known.files(_dtype_of(specs.values()))
                records.update(write_other_files(self.draft.store, files, specs, other_files))
                self.draft.commit(records, {"kind": "safetensors"})

    def _sources(self, whole: WholeTensors) -> dict[str, str]:
        """The key of each row that has elements. The same on all ranks. Local."""
        result = {}
        for tensor in self.tensors:
            master = f"master.{tensor.row}"
            if prod(tensor.sizes):
                result[tensor.row] = master if master in whole.described else f"param.{tensor.row}"
                whole.check(result[tensor.row])
        return result

    def _spec(self, tensor: FileTensor, whole: WholeTensors, keys: Mapping[str, str]) -> TensorToWrite:
        key = keys.get(tensor.row)
        parameter = self.model.table.tensor(tensor.row)
        dtype = parameter.dtype if key is None else whole.described[key].dtype
        wanted, sharding = self.dtype, self.model.gradients.sharding
        if wanted is None and sharding is not None and isinstance(parameter, nn.Parameter) and sharding.has(parameter):
            wanted = self.runtime.decisions.half  # shards are in full precision, the model computes in half
        if wanted is not None and dtype.is_floating_point:
            dtype = wanted
        return TensorToWrite(dtype, tensor.shape)

    def _write_round(
        self,
        whole: WholeTensors,
        keys: Mapping[str, str],
        files: Sequence[str],
        parts: Sequence[Mapping[str, TensorToWrite]],
        metadata: Mapping[str, str],
    ) -> dict[str, FileRecord]:
        """The i-th file by rank i. Returns the records of all. Collective over the world."""
        rank = self.runtime.session.groups.world.rank_in_group
        by_name = {tensor.name: tensor for tensor in self.tensors}
        steps = [_steps([by_name[name] for name in order_in_file(part)]) for part in parts]
        own = _OpenFile(self.draft.store, files[rank], parts[rank], metadata) if rank < len(files) else None
        for number in range(max(map(len, steps))):
            wanted = {
                receiver: keys[todo[number][0].row]
                for receiver, todo in enumerate(steps)
                if number < len(todo) and todo[number][0].row in keys
            }
            tensor = whole.put_together(wanted)
            if own is not None and number < len(steps[rank]):
                own.add(steps[rank][number], tensor)
            del tensor  # before the next one comes
        with agreed():
            if own is not None:
                own.close()
        record = None if own is None else own.record
        return dict(zip(files, allgather(record, CommGroup.WORLD), strict=False))


def _dtype_of(specs: Iterable[TensorToWrite]) -> torch.dtype:
    return next((spec.dtype for spec in specs if spec.dtype.is_floating_point), torch.get_default_dtype())


def _steps(tensors: Sequence[FileTensor]) -> list[list[FileTensor]]:
    """The tensors, those together that follow each other and are parts of one tensor of the model."""
    steps: list[list[FileTensor]] = []
    for tensor in tensors:
        if steps and steps[-1][0].row == tensor.row:
            steps[-1].append(tensor)
        else:
            steps.append([tensor])
    return steps


class _OpenFile:
    """The file that this rank writes in a round. After a failure it takes no more, and says so when it is closed."""

    def __init__(
        self, store: Store, name: str, specs: Mapping[str, TensorToWrite], metadata: Mapping[str, str]
    ) -> None:
        self._stack = ExitStack()
        self._specs = specs
        self._writer: SafetensorsWriter | None = None
        self._failure: Exception | None = None
        self.record: FileRecord | None = None

        def open_it() -> None:
            self._writer = self._stack.enter_context(safetensors_file(store, name, specs, metadata))

        self._guarded(open_it)

    def add(self, tensors: Sequence[FileTensor], whole: torch.Tensor | None) -> None:
        """Write the tensors, which are parts of ``whole`` (None: they have no elements)."""

        def write() -> None:
            assert self._writer is not None
            for tensor in tensors:
                spec = self._specs[tensor.name]
                part = torch.empty(spec.shape) if whole is None else tensor.view_of(whole)
                self._writer.write(tensor.name, part.to(spec.dtype))

        self._guarded(write)

    def close(self) -> None:
        """Raises what went wrong; the file is not there then."""
        self._guarded(self._stack.close)
        if self._failure is not None:
            raise self._failure
        assert self._writer is not None
        self.record = self._writer.record

    def _guarded(self, operation: Callable[[], Any]) -> None:
        if self._failure is None:
            try:
                operation()
            except Exception as error:
                self._failure = error
                try:
                    self._stack.__exit__(type(error), error, error.__traceback__)
                except Exception as explained:
                    self._failure = explained
