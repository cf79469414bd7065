"""``smp.DistributedOptimizer``: an optimizer whose parameters live on several stages and slices (smp-api section 7)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modelparallel import runtime as runtime_module
from modelparallel.errors import SMPConfigError
from modelparallel.model_states import PARTIAL_KEY
from modelparallel.optimizer_norms import DistributedNorms
from modelparallel.parameters import ParameterTable
from modelparallel.plan.parameters import ParameterRow
from modelparallel.ranks_and_messages import allgather
from modelparallel.topology import CommGroup

_LOSS_SCALE_ARGUMENTS = (
    "init_scale",
    "scale_factor",
    "scale_window",
    "min_scale",
    "delayed_shift",
    "consecutive_hysteresis",
)


class DistributedOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer; use it in its place. It may be built before or after the model is wrapped, and before the
    partition.

    At the partition its groups shrink to the parameters of this rank, in place: the group dicts stay the same objects,
    so schedulers attached before go on working. ``step()`` on a rank without parameters does nothing.
    ``optimizer.optimizer`` is the inner optimizer. The loss-scale arguments act with fp16 only.

    Source: smp-api section 7.
    """

    # Hugging Face's accelerate then takes the wrapper as prepared and leaves it as it is.
    _is_accelerate_prepared = True
    step_was_skipped = False
    overflow = False

    def __new__(cls, optimizer: Any, *args: Any, **kwargs: Any) -> DistributedOptimizer:
        inner_class = type(optimizer)
        if isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, DistributedOptimizer):
            # isinstance(wrapped, torch.optim.SGD) holds, as scripts expect. What the wrapper has comes first, and what
            # only the inner class has is that of the inner object.
            own = {name: _delegate(name) for name in _names_beside_torch_s(inner_class)}
            cls = type(cls.__name__, (cls, inner_class), {"__module__": cls.__module__, **own})
        return object.__new__(cls)

    def __init__(
        self,
        optimizer: Any,
        static_loss_scale: float | None = 1.0,
        dynamic_loss_scale: bool = False,
        dynamic_loss_args: Mapping[str, Any] | None = None,
        **dynamic_loss_kwargs: Any,
    ) -> None:
        if isinstance(optimizer, DistributedOptimizer):
            raise SMPConfigError(
                "smp.DistributedOptimizer was given a smp.DistributedOptimizer: wrap the optimizer once"
            )
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
            raise SMPConfigError(f"smp.DistributedOptimizer: expected an optimizer, got {type(optimizer).__name__}")
        for name in {**(dynamic_loss_args or {}), **dynamic_loss_kwargs}:
            if name not in _LOSS_SCALE_ARGUMENTS:
                raise SMPConfigError(
                    f"smp.DistributedOptimizer: unknown argument {name!r}; loss scaling takes "
                    f"{', '.join(_LOSS_SCALE_ARGUMENTS)}"
                )
        # Not torch.optim.Optimizer.__init__: groups and state are those of the inner optimizer.
        self.__dict__["optimizer"] = optimizer
        self._runtime = runtime_module.current()
        self._all: list[list[nn.Parameter]] = []
        self._waiting_state: Mapping[str, Any] | None = None
        if getattr(optimizer, "norms", False) is None:  # it needs norms of whole parameters: see optimizers.py
            optimizer.norms = DistributedNorms(self._runtime)
        self.replace_parameters()
        self._runtime.optimizers.append(weakref.ref(self))
        self._keep_local_parameters_of_all()

    def replace_parameters(self) -> None:
        """Take the new parameters for those that tensor parallelism has replaced since the optimizer was built.

        Several may have become one (queries, keys and values): those must be in one group.
        """
        self._note_new_groups()
        for groups in ([group["params"] for group in self.optimizer.param_groups], self._all):
            first: dict[int, tuple[int, str]] = {}
            for number, parameters in enumerate(groups):
                kept = []
                for parameter in parameters:
                    replacement = self._runtime.replacement_of(parameter)
                    if replacement is None:
                        kept.append(parameter)
                        continue
                    self.optimizer.state.pop(parameter, None)
                    name = self._runtime.name_before(parameter)
                    if id(replacement) not in first:
                        kept.append(replacement)
                    there, other = first.setdefault(id(replacement), (number, name))
                    if there != number:
                        raise SMPConfigError(
                            f"parameters '{other}' and '{name}', which the wrapped model has as one, are in different "
                            "groups of the optimizer: put them in one, or build the optimizer after wrapping"
                        )
                parameters[:] = kept

    def _note_new_groups(self) -> None:
        """Remember the parameters of groups that were added since, perhaps to the inner optimizer."""
        for group in self.optimizer.param_groups[len(self._all) :]:
            self._all.append(list(group["params"]))

    # What torch expects of an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the inner optimizer."""
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the inner optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        """The defaults of the inner optimizer."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that this rank holds; call it outside the step function, on every rank."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the parameters that this rank holds."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; after the partition of the model it keeps what this rank holds."""
        self.optimizer.add_param_group(param_group)
        self._note_new_groups()
        self._keep_local_parameters_of_all()

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.optimizer!r})"

    def __getstate__(self) -> Any:
        return self.__dict__

    # Partition

    def all_parameters(self) -> Iterable[nn.Parameter]:
        """All parameters given to the optimizer, also those that live on other stages."""
        self._note_new_groups()
        return (parameter for group in self._all for parameter in group)

    def keep_local_parameters(self, model: Any) -> None:
        """Drop the parameters of ``model`` that live on other stages, in place; called at its partition."""
        self._note_new_groups()
        for group in self.optimizer.param_groups:
            kept = [parameter for parameter in group["params"] if model.is_local(parameter)]
            for parameter in group["params"]:
                if not model.is_local(parameter):
                    self.optimizer.state.pop(parameter, None)
            group["params"][:] = kept
        if self._waiting_state is not None and not self._has_unpartitioned_parameters():
            state, self._waiting_state = self._waiting_state, None
            self.load_state_dict(state)

    def _keep_local_parameters_of_all(self) -> None:
        for model in self._runtime.session.models:
            if model.partitioned and self._runtime.is_pipelined:
                self.keep_local_parameters(model)

    def _has_unpartitioned_parameters(self) -> bool:
        if not self._runtime.is_pipelined:
            return False
        waiting = [model.table for model in self._runtime.session.models if not model.partitioned]
        return any(table.row_of(parameter) is not None for table in waiting for parameter in self.all_parameters())

    # State dicts

    def local_state_dict(self, gather_if_shard: bool = True) -> dict[str, Any]:
        """The state of the parameters of this rank, indexed as in the whole model, with ``_smp_is_partial: True``;
        local.
        """
        index_of = self._indices()
        state = {
            index_of[id(parameter)]: dict(values)
            for parameter, values in self.optimizer.state.items()
            if id(parameter) in index_of
        }
        return {"state": state, "param_groups": self._whole_groups(), PARTIAL_KEY: True}

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The whole state, merged and un-sliced, on the CPU; collective over MP_GROUP. Source: smp-api section 7."""
        local = self.local_state_dict()["state"]
        if self._runtime.session.groups.mp.size == 1:
            return {"state": local, "param_groups": self._whole_groups()}
        on_cpu = {index: {key: _cpu(value) for key, value in values.items()} for index, values in local.items()}
        return {"state": self._merged(on_cpu), "param_groups": self._whole_groups()}

    def orig_state_dict(self) -> dict[str, Any]:
        """The inner optimizer's own state dict; local. Source: smp-api section 18."""
        return self.optimizer.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Mapping[str, Any], gather_if_shard: bool = True) -> None:  # type: ignore[override]
        """Load a whole state, or the partial one of this partition.

        Before the partition the values of the groups are taken at once, the state is kept until then. Collective over
        MP_GROUP for a partial state. Raises SMPConfigError when the groups differ. Source: smp-api section 7.
        """
        self._check_groups(state_dict["param_groups"])
        if self._has_unpartitioned_parameters():
            for saved, group in zip(state_dict["param_groups"], self.optimizer.param_groups, strict=True):
                group.update((key, value) for key, value in saved.items() if key != "params")
            self._waiting_state = state_dict
            return
        state: Mapping[int, Any] = state_dict["state"]
        if state_dict.get(PARTIAL_KEY) and self._runtime.session.groups.mp.size > 1:
            state = self._merged(state)
        index_of = self._indices()
        local_groups, local_state = [], {}
        position = 0
        for saved, group in zip(state_dict["param_groups"], self.optimizer.param_groups, strict=True):
            positions = []
            for parameter in group["params"]:
                values = state.get(index_of[id(parameter)])
                if values is not None:
                    local_state[position] = {key: self._local_part(parameter, value) for key, value in values.items()}
                positions.append(position)
                position += 1
            local_groups.append(
                {**{key: value for key, value in saved.items() if key != "params"}, "params": positions}
            )
        self.optimizer.load_state_dict({"state": local_state, "param_groups": local_groups})

    def _check_groups(self, saved: Sequence[Mapping[str, Any]]) -> None:
        self._note_new_groups()
        lengths, own = [len(group["params"]) for group in saved], [len(group) for group in self._all]
        if lengths != own:
            raise SMPConfigError(
                f"optimizer.load_state_dict: the state has {len(lengths)} groups of {lengths} parameters, the "
                "optimizer "
                f"{len(own)} of {own}: load a state of an optimizer over the same parameters in the same groups"
            )

    def _indices(self) -> dict[int, int]:
        """Position of each parameter in the whole model's optimizer, by identity."""
        return {id(parameter): index for index, parameter in enumerate(self.all_parameters())}

    def _whole_groups(self) -> list[dict[str, Any]]:
        result, start = [], 0
        for group, everything in zip(self.optimizer.param_groups, self._all, strict=True):
            entry = {key: value for key, value in group.items() if key != "params"}
            entry["params"] = list(range(start, start + len(everything)))
            start += len(everything)
            result.append(entry)
        return result

    def _row(self, parameter: nn.Parameter) -> tuple[ParameterTable, ParameterRow] | None:
        for model in self._runtime.session.models:
            row = model.table.row_of(parameter)
            if row is not None:
                return model.table, row
        return None

    def _merged(self, local: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        """The whole state from the ``local`` ones of an MP_GROUP; collective over it."""
        groups = self._runtime.session.groups
        own = (groups.pp.rank_in_group, groups.tp.rank_in_group, self._names(), dict(local))
        parts = allgather(own, CommGroup.MP_GROUP)
        for pp_rank, tp_rank, names, _ in parts:
            if names != own[2]:
                raise SMPConfigError(
                    f"the optimizers of pp_rank {pp_rank}, tp_rank {tp_rank} and of pp_rank {own[0]}, tp_rank {own[1]} "
                    f"were not built over the same parameters ({len(names)} and {len(own[2])}), so that their states "
                    "cannot be merged: build the optimizer before the first step, or from the parameters of "
                    "model.virtual_named_parameters()"
                )
        parameters = list(self.all_parameters())
        slices: dict[int, dict[int, Mapping[str, Any]]] = {}
        for _, tp_rank, _, entries in sorted(parts, key=lambda part: part[:2]):
            for index, values in entries.items():
                slices.setdefault(index, {}).setdefault(tp_rank, values)
        result = {}
        for index in sorted(slices):
            by_rank = [slices[index][tp_rank] for tp_rank in sorted(slices[index])]
            found = self._row(parameters[index])
            split = found[1].split if found is not None else None
            merged = dict(by_rank[0])
            if split is not None:
                shape = torch.Size(split.local_shape(0, groups.tp.size))  # of rank 0, whose values these are
                for key, value in merged.items():
                    if isinstance(value, torch.Tensor) and value.shape == shape:
                        merged[key] = split.join([values[key] for values in by_rank])
            result[index] = merged
        return result

    def _names(self) -> list[str]:
        rows = (self._row(parameter) for parameter in self.all_parameters())
        return [found[1].name if found is not None else "" for found in rows]

    def _local_part(self, parameter: nn.Parameter, value: Any) -> Any:
        found = self._row(parameter)
        if found is None or found[1].split is None or not isinstance(value, torch.Tensor):
            return value
        split = found[1].split
        if value.shape != torch.Size(split.full_shape) or value.shape == parameter.shape:
            return value
        tp = self._runtime.session.groups.tp
        return split.slice_of(value, tp.rank_in_group, tp.size).clone()


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _names_beside_torch_s(inner_class: type) -> list[str]:
    """The methods and attributes of the class and its bases below torch.optim.Optimizer that the wrapper has not."""
    own_classes = inner_class.__mro__[: inner_class.__mro__.index(torch.optim.Optimizer)]
    names = {name for cls in own_classes for name in vars(cls) if not name.startswith("__")}
    return sorted(name for name in names if not hasattr(DistributedOptimizer, name))


def _delegate(name: str) -> property:
    return property(lambda self: getattr(self.optimizer, name))
