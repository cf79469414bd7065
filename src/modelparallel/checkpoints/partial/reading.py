"""Reading a partial checkpoint into models and optimizers of any shape."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from traceback import StackSummary
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from modelparallel.checkpoints.partial.agreement import error_class
from modelparallel.checkpoints.partial.contents import (
    MASTER_KEY,
    model_pieces,
    named_parameters,
    own_key,
    rows_of,
    state_keys,
    target_pieces,
)
from modelparallel.checkpoints.partial.dcp_storage import RecordedReader, read_metadata
from modelparallel.checkpoints.partial.pieces import Piece, whole_piece
from modelparallel.checkpoints.partial.planners import PieceLoadPlanner, is_object, tensor_entry
from modelparallel.checkpoints.partial.user_content import open_object
from modelparallel.checkpoints.partial.writing import checkpoint_group, explained
from modelparallel.checkpoints.stores.file_streams import FileRecord
from modelparallel.comm.authentication import gather_json
from modelparallel.errors import CheckpointError, WaitTimeoutError
from modelparallel.optimizer import states as optimizer_states
from modelparallel.optimizer.wrapper import wrapped_optimizers
from modelparallel.torch_compat.private_parts import version_of

if TYPE_CHECKING:
    from modelparallel.checkpoints.stores.local import Store
    from modelparallel.model.wrapper import DistributedModel
    from modelparallel.optimizer.wrapper import DistributedOptimizer
    from modelparallel.plan.rows import ParameterRow
    from modelparallel.training.participants import Target
    from modelparallel.training.runtime import Runtime

_HALF = (torch.float16, torch.bfloat16)


class StoredCheckpoint:
    """A partial checkpoint that can be read from.

    ``expected``: the files of its completion record. ``allowed``: classes that objects in it may be of beside plain
    ones; ``trusts_pickles``: any. Local.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: Store,
        expected: Mapping[str, FileRecord] | None,
        *,
        allowed: Sequence[Any] = (),
        trusts_pickles: bool = False,
    ) -> None:
        self._runtime = runtime
        self.store = store
        self._expected = expected
        self._allowed = tuple(allowed)
        self._trusts_pickles = trusts_pickles
        self._metadata = read_metadata(store, trusts_pickles)

    @property
    def entries(self) -> Mapping[str, Any]:
        """DCP's descriptions of all entries, by key."""
        return self._metadata.state_dict_metadata

    def read(self, pieces: Sequence[Piece], object_keys: Sequence[str], doing: str) -> dict[str, Any]:
        """Fill the pieces in place, and return the objects by key. Collective over the world."""
        objects: dict[str, Any] = {}

        def take(key: str, data: io.BytesIO) -> None:
            objects[key] = open_object(data, f"the entry '{key}'", self._allowed, self._trusts_pickles)

        planner = PieceLoadPlanner(pieces, object_keys, take)
        reader = RecordedReader(self.store, self._metadata, self._expected)
        failure: CheckpointError | None = None
        try:
            reader.fill(planner)
        except Exception as error:
            if not isinstance(error, CheckpointError):
                failure = CheckpointError(f"{type(error).__name__}: {error}")
                failure.__cause__ = error
            else:
                failure = error
        self._agree(failure, doing)
        return objects

    def _agree(self, failure: CheckpointError | None, doing: str) -> None:
        """All ranks hear of each other's failures. Collective over the world."""
        world = self._runtime.session.groups.world
        told = None if failure is None else (type(failure).__name__, str(failure))
        try:
            reports = gather_json(told, checkpoint_group(self._runtime))
        except Exception as error:
            if failure is None and isinstance(error, WaitTimeoutError):
                raise
            raise explained(failure or error, doing, world.rank_in_group) from error
        failures: dict[int, tuple[BaseException, StackSummary]] = {
            rank: (error_class(report[0])(report[1]), StackSummary())
            for rank, report in enumerate(reports)
            if report is not None
        }
        if failures:
            raise explained(CheckpointException(doing, failures), doing, world.rank_in_group) from failure


# Models


def check_model(model: DistributedModel, prefix: str, entries: Mapping[str, Any], strict: bool) -> None:
    """Whether the checkpoint holds this model. Local. Raises CheckpointError for names and shapes that differ; names
    only if ``strict``.
    """
    expected = {f"{prefix}.{row.name}": row for row, tensor in rows_of(model) if tensor.numel()}
    stored = {key for key, entry in entries.items() if key.startswith(f"{prefix}.") and not is_object(entry)}
    missing, unexpected = sorted(expected.keys() - stored), sorted(stored - expected.keys())
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"the checkpoint is of another model: it lacks {_listed(missing)}, and has beside {_listed(unexpected)}. "
            "Resume with the model that was saved (also its distributed layers: tensor_parallelism around the same "
            "modules), or pass strict=False to take what both have"
        )
    for key in expected.keys() & stored:
        tensor_entry(key, entries[key], expected[key].full_shape)


def _listed(keys: Sequence[str]) -> str:
    names = [key.partition(".")[2] for key in keys]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def load_model(checkpoint: StoredCheckpoint, model: DistributedModel, prefix: str) -> None:
    """Fill what this rank holds of a partitioned model. Collective over the world."""
    entries = checkpoint.entries
    stage = model._runtime.engine.stage
    pieces: list[Piece] = []
    for row, tensor in rows_of(model):
        key = _best_source(entries, prefix, row, tensor)
        if key in entries and model.table.is_local(row, stage):
            pieces.extend(model_pieces(model, row, tensor, key))
    names = [key for key, entry in entries.items() if key.startswith(f"{prefix}.") and is_object(entry)]
    objects = checkpoint.read(pieces, names, "loading the model")
    if objects:
        model.module.load_state_dict(
            {key.removeprefix(f"{prefix}."): value for key, value in objects.items()}, strict=False
        )
    for optimizer in wrapped_optimizers(model._runtime):
        optimizer.init_master_params()


def _best_source(entries: Mapping[str, Any], prefix: str, row: ParameterRow, tensor: torch.Tensor) -> str:
    """The fp32 master of a parameter that was saved in half precision and is in full precision now, else itself."""
    key = f"{prefix}.{row.name}"
    master = f"optimizer{prefix.removeprefix('model')}.state.{row.name}.{MASTER_KEY}"
    stored = entries.get(key)
    was_half = stored is not None and not is_object(stored) and stored.properties.dtype in _HALF
    return master if was_half and master in entries and tensor.dtype not in _HALF else key


# Optimizers


def check_optimizer(optimizer: DistributedOptimizer, prefix: str, groups: Sequence[Mapping[str, Any]]) -> None:
    """Whether the groups of the checkpoint are those of ``optimizer``. Local. Raises CheckpointError."""
    own = [optimizer._runtime.index.names_of(group) for group in optimizer.all_groups()]
    saved = [list(group["params"]) for group in groups]
    if [sorted(names) for names in saved] != [sorted(names) for names in own]:
        pairs = zip(saved, own, strict=False)
        different = [index for index, (theirs, ours) in enumerate(pairs) if sorted(theirs) != sorted(ours)]
        number = different[0] if different else min(len(saved), len(own))
        raise CheckpointError(
            f"the checkpoint's {prefix} has {len(saved)} groups of {[len(names) for names in saved]} parameters, this "
            f"one {len(own)} of {[len(names) for names in own]}; group {number} differs: build it over the same "
            "parameters in the same groups, or resume with load_optimizer=False"
        )


class OptimizerLoad:
    """Makes room for the state of one optimizer and gives it to the optimizer when it is read.

    ``groups``: the settings that the checkpoint has of its groups. ``masters_only``: the fp32 masters and the scale of
    the loss, not the state.
    """

    def __init__(
        self,
        checkpoint: StoredCheckpoint,
        optimizer: DistributedOptimizer,
        prefix: str,
        groups: Sequence[Mapping[str, Any]],
        *,
        masters_only: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._optimizer = optimizer
        self._prefix = prefix
        self._groups = groups
        self._masters_only = masters_only
        self._stored = state_keys(checkpoint.entries, prefix)
        self._pieces: list[Piece] = []
        self._object_keys: set[str] = set()
        #: What the targets get: by id of the target's tensor, the state's entries.
        self._values: dict[int, dict[str, Any]] = {}
        self._objects_of: list[tuple[int, str, str]] = []

    def run(self) -> None:
        """Collective over the world."""
        optimizer, prefix = self._optimizer, self._prefix
        stage = optimizer._runtime.engine.stage
        for parameter, row in named_parameters(optimizer):
            if row.home is None or stage in row.holders:
                for target in optimizer.targets.of_parameter(parameter):
                    self._make_room(row, target)
        scaler = f"{prefix}.{optimizer_states.SCALER_KEY}"
        scalers = [scaler] if scaler in self._checkpoint.entries else []
        entries = self._checkpoint.read(
            self._pieces, [*scalers, *sorted(self._object_keys)], "loading the state of the optimizer"
        )
        for identity, entry, key in self._objects_of:
            self._values[identity][entry] = entries[key]
        if scaler in entries and optimizer._runtime.decisions.has_loss_scale:
            optimizer.loss_scaler.load_state_dict(entries[scaler])
        if self._masters_only:
            self._give_masters()
        else:
            optimizer_states.take_state(optimizer, self._groups, self._values_of)

    def _values_of(self, parameter: nn.Parameter, target: Target | None) -> dict[str, Any] | None:
        return self._values.get(id(parameter if target is None else target.tensor))

    def _give_masters(self) -> None:
        with torch.no_grad():
            for target in self._optimizer.targets.masters():
                values = self._values.get(id(target.tensor), {})
                if MASTER_KEY in values:
                    target.tensor.copy_(values[MASTER_KEY])
                    target.version = version_of(target.parameter)

    def _make_room(self, row: ParameterRow, target: Target) -> None:
        values = self._values.setdefault(id(target.tensor), {})
        stored = self._stored.get(row.name, {})
        if target.has_master:
            # A job in full precision has no masters; its parameters are as good.
            source = stored.get(MASTER_KEY, f"model{self._prefix.removeprefix('optimizer')}.{row.name}")
            if source in self._checkpoint.entries:
                values[MASTER_KEY] = self._room_for(source, row, target, torch.float32, target.tensor)
        if self._masters_only:
            return
        for entry, key in stored.items():
            if entry != MASTER_KEY:
                self._make_room_for(entry, key, row, target, values)
        if not values:
            del self._values[id(target.tensor)]

    def _make_room_for(self, entry: str, key: str, row: ParameterRow, target: Target, values: dict[str, Any]) -> None:
        described = self._checkpoint.entries[key]
        if is_object(described):
            self._object_keys.add(key)
            self._objects_of.append((id(target.tensor), entry, key))
            return
        name, _, part = entry.partition("@")
        shape = tuple(described.size)
        if part:
            wanted = own_key(self._optimizer, row, target, name)
            if entry == wanted:
                values[name] = self._whole(key, described)
            elif not any(other == wanted for other in self._stored[row.name]):
                raise CheckpointError(
                    f"the optimizer's '{name}' of '{row.name}' was computed from a part of the parameter ({part}) that "
                    f"no rank of this job holds ({wanted.partition('@')[2] or 'it is whole here'}), and cannot be cut "
                    "or joined: resume with the same tensor_parallel_degree and sharding, or with load_optimizer=False"
                )
        elif shape == row.full_shape and (shape or name != "step"):
            there = self._optimizer.optimizer.state.get(target.tensor, {}).get(name)
            values[name] = self._room_for(key, row, target, described.properties.dtype, there)
        else:
            wanted = own_key(self._optimizer, row, target, name)
            if shape and wanted != name:
                raise CheckpointError(
                    f"the optimizer's '{name}' of '{row.name}' was computed from the whole parameter, of which the "
                    f"ranks of this job hold parts ({wanted.partition('@')[2]}), and cannot be cut: resume with the "
                    "tensor_parallel_degree and sharding that were saved, or with load_optimizer=False"
                )
            values[name] = self._whole(key, described)

    def _room_for(self, key: str, row: ParameterRow, target: Target, dtype: torch.dtype, there: Any) -> torch.Tensor:
        """What the optimizer has already (``there``), if that is such a tensor; new memory costs as much as reading."""
        wanted = target.tensor.shape, dtype, target.tensor.device
        if type(there) in (torch.Tensor, nn.Parameter) and (there.shape, there.dtype, there.device) == wanted:
            room: torch.Tensor = there.detach()
        else:
            room = torch.empty(target.tensor.shape, dtype=dtype, device=target.tensor.device)
        tensor_entry(key, self._checkpoint.entries[key], row.full_shape)
        self._pieces.extend(target_pieces(self._optimizer, key, row, target, room))
        return room

    def _whole(self, key: str, described: Any) -> torch.Tensor:
        # On the CPU, as torch keeps counts of steps; the optimizer moves the rest to its parameters' device.
        room = torch.empty(tuple(described.size), dtype=described.properties.dtype)
        self._pieces.append(whole_piece(key, room))
        return room
