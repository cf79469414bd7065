"""How a wrapped model is planned: its structure, what was said of its partition, and its plan (smp-api section 6)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn

from modelparallel.errors import PartitionError, SMPConfigError, StepUsageError
from modelparallel.job import registry
from modelparallel.model import creation
from modelparallel.model.known_parameters import KnownParameters
from modelparallel.model.questions import ModelParameters
from modelparallel.partitioning import Trace, check_plan, find_units, make_plan, trace_step, untouched
from modelparallel.pipeline.schedule.making import step_predictor
from modelparallel.plan.partition import PartitionPlan

if TYPE_CHECKING:
    from modelparallel.parameters.table import ParameterTable


class PlannedModel(ModelParameters):
    """The part of ``smp.DistributedModel`` that decides which plan it gets."""

    #: The plan of a checkpoint, which the partition takes.
    stored_plan: PartitionPlan | None = None
    #: Equal for models whose lists of parameters correspond, one to one.
    structure: Hashable
    #: The model that was named when this one was wrapped.
    same_as: PlannedModel | None = None
    #: In fp32, of the weights in half precision: what smp.average_weights has made of them.
    averages: dict[str, torch.Tensor]
    known: KnownParameters
    #: What a partial state dict held that was loaded before the partition.
    early_names: set[str] | None = None
    #: Whether a part of the model was loaded before the partition, other ones on other ranks.
    has_own_part = False
    has_left: bool
    _index: int
    _units: tuple[str, ...]
    _overrides: list[tuple[nn.Module, int]]
    _loads: list[Callable[[], None]]
    _trace_device: str
    _trace_execution_times: bool
    _trace_memory_usage: bool

    @property
    def partitioned(self) -> bool:
        """Whether the model has been partitioned: at the first step call, or at once without pipelining."""
        return self._is_partitioned

    @property
    def partition_plan(self) -> PartitionPlan | None:
        """The frozen plan; None before the partition and without pipelining."""
        return self._plan

    def set_partition(self, module: nn.Module, index: int) -> None:
        """Place an existing module on a stage, as ``smp.set_partition``. Local, but the same calls on every rank."""
        if self._is_partitioned and self._runtime.is_pipelined:
            raise PartitionError("smp.set_partition: the model is already partitioned; call it before the first step")
        self._overrides.append((module, index))

    @property
    def index(self) -> int:
        """Its number among the wrapped models of this process, in the order of wrapping."""
        return self._index

    def title_of(self, name: str) -> str:
        """The name of a module or tensor among all wrapped models: of the first model the user's, of later ones with
        the number of the model, so that equal names in two models do not meet. Local.
        """
        return f"{name} (model {self._index})".lstrip() if self._index else name

    @property
    def plan_file(self) -> str | None:
        """Where the plan is saved to or loaded from: ``partition_file``; of the second model in a process
        ``partition_file.1``.
        """
        file, index = self._runtime.session.config.partition_file, self._index
        return f"{file}.{index}" if file and index else file

    def make_plan(self, trace: Trace | None) -> PartitionPlan:
        """The plan of this model under the session's configuration; local."""
        config = self._runtime.session.config
        return make_plan(
            self.module,
            config.pipeline_parallel_degree,
            units=self._units,
            trace=trace,
            memory_weight=config.memory_weight,
            num_microbatches=config.microbatches,
            active_microbatches=config.active_microbatches,
            schedule=config.pipeline,
            virtual_degree=config.virtual_pipeline_degree,
            memory_limit=config.memory_limit,
            step_time=step_predictor(config.pipeline, config.microbatches, config.active_microbatches),
            tied_weights=config.tied_weights,
            is_automatic=config.auto_partition,
            marks=registry.partition_mark,
            overrides=self._overrides,
            default_partition=config.default_partition,
            load_from=self.plan_file if config.load_partition else None,
            stored=self.stored_plan,
        )

    def use_stored_plan(self, plan: PartitionPlan) -> None:
        """Take the plan of a checkpoint at the partition. Local; on all ranks alike.

        Raises:
            PartitionError: the plan is for another number of stages or another model, and is not taken.
        """
        config = self._runtime.session.config
        wanted, given = (
            (config.pipeline_parallel_degree, config.virtual_pipeline_degree),
            (plan.num_stages, plan.virtual_degree),
        )
        if wanted != given:
            raise PartitionError(f"it is for (stages, virtual degree) = {given}, and this job has {wanted}")
        check_plan(plan, self.module)
        self.stored_plan = plan

    def load_when_partitioned(self, load: Callable[[], None]) -> None:
        """Call ``load`` at the partition, when every rank has its part and before any hook. Local; on all ranks alike,
        since it may be collective over the world.
        """
        self._loads.append(load)

    def trace(self, run: Callable[[], object], units: Sequence[str] | None = None) -> Trace:
        """What ``run``, a step on the unsplit models, does with the units of this one; all are left as they were.
        Local.
        """
        units = self._units if units is None else units
        with ExitStack() as others:
            for model in self._runtime.models:
                if model.module is not self.module and not model.partitioned:
                    others.enter_context(untouched(model.module))
            if any(creation.has_deferred(model.module) for model in self._runtime.models):
                return creation.trace_shapes(lambda: trace_step(self.module, units, run))
            device = self._runtime.session.device
            if device.type == "cuda" and self._trace_device == "gpu":
                self.module.to(device)
            return trace_step(
                self.module,
                units,
                run,
                measure_times=self._trace_execution_times,
                measure_memory=self._trace_memory_usage,
            )

    def begin_plan(self, same_as: PlannedModel | None) -> None:
        """The model has its table. ``same_as``: that of the constructor. Called by the library."""
        self._plan = None
        self._is_partitioned = False
        self._overrides = []
        self._loads = []
        self.averages = {}
        self._checked_pairings = set()
        self.known = KnownParameters(self.module, self._table)
        self.structure = structure_of(self.module, self._table)
        self._take_partition_of(same_as)

    # What the script changes

    def look_again(self) -> None:
        """Before the partition: parameters and modules may have been replaced, tied or added since the model was
        wrapped. Called by the library.
        """
        is_changed = self.known.is_changed()
        if is_changed:
            self._check_parts()
        self._table.rebuild(self.module)
        if is_changed:
            self._units = find_units(self.module)
            self.structure = structure_of(self.module, self._table)
            self.known.note()

    def check_parameters(self) -> None:
        """Raise StepUsageError for a parameter that was put into the model too late to be placed or reduced. Local."""
        if not self.known.is_changed():
            return
        if self._runtime.is_pipelined or self._runtime.session.groups.dp.size > 1:
            self._check_parts()
            self._check_places()
            self.known.note()
        else:
            self.look_again()

    def _check_parts(self) -> None:
        """Raise for a shard or a slice that stands elsewhere now: only the module that owns it knows how to use it."""
        table, sharding = self._table, self.gradients.sharding
        for name, value in self.known.changed():
            if sharding is not None and sharding.has(table.tensor(name)):
                raise StepUsageError(
                    f"parameter '{self.title_of(name)}' was taken out of the model, or replaced, after it was sharded "
                    "(sharded_data_parallel_degree), so that the next gathering would put it back: change the modules "
                    "before the model is wrapped"
                )
            rows = [table.row_named(name), table.row_named(table.name_of(value) or name)]
            splits = [row.split for row in rows if row is not None and row.split is not None]
            if splits and (len(splits) < len(rows) or splits[0] != splits[1]):
                raise StepUsageError(
                    f"'{self.title_of(name)}' was made the parameter '{table.name_of(value)}' after the model was "
                    "wrapped, and tensor parallelism has cut the two differently (or only one of them), so that they "
                    "are not one weight any more: tie before the model is wrapped, and mark both modules or none"
                )

    def _check_places(self) -> None:
        when = "partitioned" if self._runtime.is_pipelined else "wrapped"
        remedy = (
            f"Replace, add and tie before the model is {when}; of a parameter that is there change the values: "
            "with torch.no_grad(): parameter.copy_(...)"
        )
        unknown = self.known.unknown()
        if unknown:
            raise StepUsageError(
                f"parameter '{self.title_of(unknown[0])}'{_and_more(unknown)} was put into the model after it was "
                f"{when}, so that it has {'no stage' if when == 'partitioned' else 'gradients that are not reduced'}. "
                f"{remedy} (modules that are made in the first forward: call the model once before it is wrapped)"
            )
        if self._plan is None:
            return
        for place, name in self.known.out_of_place(self._plan.home_of_tensor):
            raise StepUsageError(
                f"'{self.title_of(place)}' was made the parameter '{name}' after the partition, which lives on another "
                f"stage. {remedy}"
            )

    def check_made(self) -> None:
        """Raise PartitionError if the first step, or its trace, has made parameters. Local."""
        made = self.known.unknown() if self.known.is_changed() else []
        if made:
            raise PartitionError(
                f"the first forward has made parameter '{self.title_of(made[0])}'{_and_more(made)}, which was not "
                "there when the model was wrapped, so that neither the plan nor an optimizer knows it: call the model "
                "once on an example batch before it is wrapped, on all ranks, or make the module in __init__"
            )

    # Models of one structure

    def _take_partition_of(self, model: PlannedModel | None) -> None:
        if model is None:
            return
        if not isinstance(model, PlannedModel):
            raise SMPConfigError(f"same_as: expected a smp.DistributedModel, got {type(model).__name__}")
        difference = difference_of(self, model)
        if difference:
            raise PartitionError(
                f"same_as: the two models are not of one structure, so one cannot be partitioned as the other: "
                f"{difference}"
            )
        self.__dict__["same_as"] = model.same_as or model  # kept out of nn.Module's registry

    def is_trained(self) -> bool:
        """Whether an optimizer has parameters of it; local, and the same on all ranks."""
        trained = {id(parameter) for _, parameter in self._table.parameters() if parameter.requires_grad}
        return any(
            id(parameter) in trained
            for optimizer in self._runtime.live_optimizers()
            for parameter in optimizer.all_parameters()
        )

    def is_placed_by_hand(self) -> bool:
        """Whether the script has said where parts of it go. Local."""
        if self._runtime.session.config.auto_partition:
            return False
        return bool(self._overrides) or any(map(_is_marked, self.module.modules()))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _is_marked(module: nn.Module) -> bool:
    return registry.partition_mark(module) is not None


def structure_of(module: nn.Module, table: ParameterTable) -> Hashable:
    """What two models must have in common for their lists of parameters and modules to correspond, also in slices."""
    modules = tuple((name, _class_name(part)) for name, part in module.named_modules(remove_duplicate=False))
    rows = tuple((row.name, row.aliases, row.is_buffer, row.full_shape, row.split is None) for row in table.rows())
    return modules, rows


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def difference_of(model: PlannedModel, other: PlannedModel) -> str | None:
    """The first difference of their structures, in words."""
    for own, theirs in zip(model.structure, other.structure, strict=True):  # type: ignore[call-overload]
        for entry, counterpart in zip(own, theirs, strict=False):
            if entry != counterpart:
                return f"{entry[0]!r} is {entry[1:]} in one and {counterpart} in the other"
        if len(own) != len(theirs):
            return f"{len(own)} entries in one and {len(theirs)} in the other"
    return None
