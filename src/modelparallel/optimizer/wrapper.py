"""``smp.DistributedOptimizer``: an optimizer whose parameters live on several stages and slices (smp-api section 7)."""

from __future__ import annotations

import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from modelparallel.errors import SMPConfigError, UnsupportedError
from modelparallel.optimizer import states as optimizer_states
from modelparallel.optimizer.closures import evaluated, with_mean_loss
from modelparallel.optimizer.flat_groups import FlatGroups
from modelparallel.optimizer.norms import DistributedNorms
from modelparallel.optimizer.probe import OptimizerProbe, needs_probe
from modelparallel.optimizer.targets import Targets, check_may_be_divided, updates_each_element_alone
from modelparallel.parameters.retired import name_before, replacement_of
from modelparallel.precision import LossScaler
from modelparallel.torch_compat.private_parts import version_of
from modelparallel.training import gradient_norm
from modelparallel.training import runtime as runtime_module
from modelparallel.training.memory_report import ExplainedMemory, note_update
from modelparallel.training.runtime import Runtime

logger = logging.getLogger("modelparallel")


class DistributedOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer; use it in its place. It may be built before or after the model is wrapped, and before the
    partition. Local.

    At the partition its groups shrink to the parameters of this rank, in place: the group dicts stay the same objects,
    so schedulers attached before go on working. ``step()`` on a rank without parameters does nothing.
    ``optimizer.optimizer`` is the inner optimizer. The loss-scale arguments act with fp16 only (`precision.LossScaler`
    has their meaning). With fp16 and bf16 the groups hold fp32 masters of the parameters, and with
    ``shard_optimizer_state`` or sharded data parallelism this rank's shards of them (see optimizer/targets.py).

    Source: smp-api section 7.
    """

    # Hugging Face's accelerate then takes the wrapper as prepared and leaves it as it is.
    _is_accelerate_prepared = True
    step_was_skipped = False
    _has_said_doubt = False
    first_closure_call_this_step = True
    #: The norm of the gradient when it was clipped last.
    _global_grad_norm: torch.Tensor | None = None

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
        arguments = {**(dynamic_loss_args or {}), **dynamic_loss_kwargs}
        # Made in any case: its arguments are checked, and scripts read it.
        scaler = LossScaler(static_loss_scale, arguments if dynamic_loss_scale else None)
        if not dynamic_loss_scale:
            LossScaler(1.0, arguments)
        # Not torch.optim.Optimizer.__init__: groups and state are those of the inner optimizer.
        self.__dict__["optimizer"] = optimizer
        self._runtime = runtime_module.current()
        self._index = self._runtime.index
        check_may_be_divided(optimizer, self._runtime)
        self._all: list[list[nn.Parameter]] = []
        self._waiting_state: tuple[Mapping[str, Any], bool] | None = None
        self.loss_scaler = scaler if self._runtime.decisions.has_loss_scale else LossScaler(1.0, None)
        #: What the inner optimizer updates for the parameters.
        self.targets = Targets(optimizer, self._runtime)
        self.own_parts = FlatGroups(self)
        if getattr(optimizer, "norms", False) is None:  # it needs norms of whole parameters: see optimizer/fused.py
            optimizer.norms = DistributedNorms(self._runtime, self.targets)
        #: Whether a gradient of the last update was not finite; the same on all ranks.
        self.overflow = False
        self._has_checked_parameters = False
        # Whether some gradient here is not finite, once the gradients are collected.
        self._overflow: torch.Tensor | None = None
        self._probe = self._make_probe() if needs_probe(optimizer) else None
        if self._runtime.decisions.half is not None and hasattr(type(optimizer), "zero_grad"):
            self._clear_by_inner()
        self.settle()
        self._runtime.optimizers.append(weakref.ref(self))

    def replace_parameters(self) -> None:
        """Take the new parameters for those that tensor parallelism has replaced since the optimizer was built. Local.

        Several may have become one (queries, keys and values): those must be in one group.
        """
        self._note_new_groups()
        for groups in ([group["params"] for group in self.optimizer.param_groups], self._all):
            first: dict[int, tuple[int, str]] = {}
            # Some may have become one that is in the groups already (a head that was tied while wrapping).
            present = {id(parameter): number for number, parameters in enumerate(groups) for parameter in parameters}
            for number, parameters in enumerate(groups):
                kept = []
                for parameter in parameters:
                    name = name_before(parameter)
                    if name is None:
                        kept.append(parameter)
                        continue
                    self.optimizer.state.pop(parameter, None)
                    replacement = _existing_replacement(parameter, name)
                    there, other = present.get(id(replacement), number), self._index.names_of([replacement])[0]
                    if id(replacement) not in present:
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
            each_once = list({id(parameter): parameter for parameter in group["params"]}.values())
            if len(each_once) < len(group["params"]):
                logger.warning(
                    "%d parameters are in their group of the optimizer more than once (a tied weight, found by several "
                    "modules): each is updated once",
                    len(group["params"]) - len(each_once),
                )  # fmt: skip
                group["params"][:] = each_once
            self._all.append(each_once)

    # What torch expects of an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimizer."""
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the inner optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        """The defaults of the inner optimizer."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that this rank holds; call it outside the step function, on every rank.

        With fp16 the update is skipped on all ranks if a gradient on any of them is not finite (``overflow``); with
        sharded data parallelism the gradient is clipped first (``sdp_gradient_clipping``). Collective over MP_GROUP
        then; with sharded parameters or optimizer state over the world; else local. Source: smp-api section 7.
        """
        self._runtime.num_updates += 1
        with ExplainedMemory(self._runtime, "in optimizer.step()"):
            result = self._update(closure)
        note_update(self._runtime, self._runtime.memory_path)
        if self._probe is not None and self._probe.doubt is not None and not self._has_said_doubt:
            self._has_said_doubt = True
            logger.warning(
                "%s could not be tried out for whether it looks beyond single parameters (%s): if it takes norms or "
                "sums over several, or over sliced ones, they are those of this rank's part",
                type(self.optimizer).__name__, self._probe.doubt,
            )  # fmt: skip
        return result

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        if not self._has_checked_parameters:
            self._check_parameters()
        decisions = self._runtime.decisions
        has_loss_scale, clips = decisions.has_loss_scale, decisions.shards_parameters
        # A closure may run the first step, in which the model is partitioned and shards take the parameters' place.
        is_settled = closure is None or not self.has_unpartitioned_parameters()
        if self.targets.are_trivial and not clips and not has_loss_scale and is_settled:
            return (
                self.optimizer.step()
                if closure is None
                else self.optimizer.step(with_mean_loss(closure, self.optimizer, self._runtime))
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for model in self.targets.models():
            model.gradients.joining.announce_update(self)
        self.collect_gradients()
        if has_loss_scale:
            self.overflow = self.step_was_skipped = self._agreed_overflow()
            self.loss_scaler.update_scale(self.overflow)
            if self.overflow:
                self.targets.skip_update()
                return result
        if clips:
            self._global_grad_norm = self._clip(self._runtime.session.config.sdp_gradient_clipping)
        self.targets.refresh_masters()
        if closure is None or self._probe is None:
            self.optimizer.step()
        else:
            self.optimizer.step(evaluated(result, type(self.optimizer).__name__))
        self.targets.finish_update()
        self.own_parts.refresh()
        return result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Forget the gradients of the parameters that this rank holds, or fill them with zeros. Local.

        The inner optimizer gets the arguments as they are, and its defaults count. ``set_grads_to_None`` is another
        name for ``set_to_none`` where it does not know that one.
        """
        is_usual = not kwargs and self.targets.are_trivial  # reading a signature takes 25 us
        known = {} if is_usual else inspect.signature(self.optimizer.zero_grad).parameters
        has_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
        if "set_grads_to_None" in kwargs and "set_grads_to_None" not in known and not has_any:
            kwargs["set_to_none"] = kwargs.pop("set_grads_to_None")
        self.optimizer.zero_grad(*args, **kwargs)
        self._overflow = None
        if not self.targets.are_trivial:
            said = [*args, *(kwargs[name] for name in ("set_to_none", "set_grads_to_None") if name in kwargs)]
            by_default = next((one.default for one in known.values() if isinstance(one.default, bool)), True)
            set_to_none = said[0] if said else getattr(self.optimizer, "set_grad_none", by_default)
            self.targets.forget_gradients(set_to_none=bool(set_to_none))

    def _clear_by_inner(self) -> None:
        """``zero_grad`` of the inner optimizer, which has the masters, clears what their gradients are made from."""
        targets, clear = self.targets, type(self.optimizer).zero_grad

        @functools.wraps(clear)
        def zero_grad(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            clear(optimizer, *args, **kwargs)
            set_to_none = next(iter((*args, *kwargs.values())), getattr(optimizer, "set_grad_none", True))
            targets.forget_gradients(set_to_none=bool(set_to_none))

        vars(self.optimizer)["zero_grad"] = types.MethodType(zero_grad, self.optimizer)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; after the partition of the model it keeps what this rank holds. Local."""
        self.optimizer.add_param_group(param_group)
        self.settle()

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"DistributedOptimizer({self.optimizer!r})"

    def __getstate__(self) -> Any:
        return self.__dict__

    def _check_parameters(self) -> None:
        """At the first update: the parameters should belong to wrapped models."""
        self._has_checked_parameters = True
        parameters = list(self.all_parameters())
        self._refuse_slices(parameters)
        foreign = [parameter for parameter in parameters if self._index.owner_of(parameter) is None]
        if not self._runtime.models or not foreign:
            return
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in foreign[:3]) + ("..." if foreign[3:] else "")
        remedy = (
            "\n  wrong: optimizer = SGD(other_model.parameters())\n"
            "  right: model = smp.DistributedModel(model); optimizer = SGD(model.parameters())"
        )
        if len(foreign) == len(parameters):
            raise SMPConfigError(
                f"smp.DistributedOptimizer: none of its {len(parameters)} parameters (of shape {shapes}) belongs to a "
                f"wrapped model, so that it would train nothing of it{remedy}"
            )
        logger.warning(
            "%d of %d parameters of a smp.DistributedOptimizer (of shape %s) belong to no wrapped model: their "
            "gradients are not reduced over the data-parallel ranks; make them part of the model",
            len(foreign), len(parameters), shapes,
        )  # fmt: skip

    def _refuse_slices(self, parameters: Sequence[nn.Parameter]) -> None:
        """An optimizer that is known to look at whole parameters must not be given slices."""
        if self._probe is not None or hasattr(self.optimizer, "norms") or updates_each_element_alone(self.optimizer):
            return
        rows = [row for row in map(self._index.row_of, parameters) if row is not None and row.split is not None]
        if rows and self._runtime.session.groups.tp.size > 1:
            raise SMPConfigError(
                f"{type(self.optimizer).__name__} looks at parameters as a whole, but of {len(rows)} of them "
                f"('{rows[0].name}') each tensor-parallel rank has a slice: norms and factors would be those of "
                "slices: use an element-wise optimizer (AdamW), smp.optimizers.FusedLAMB, which takes the norms of "
                "whole parameters, or leave these layers whole (smp.set_tensor_parallelism(layer, False)); "
                "is_elementwise = True on its class takes slices as parameters"
            )

    # Optimizers of unknown kind

    def _make_probe(self) -> OptimizerProbe | None:
        decisions = self._runtime.decisions
        if not decisions.is_divided and decisions.half is None:
            return None
        return OptimizerProbe(self.optimizer, self.targets.row_of, self._around_call, is_divided=decisions.is_divided)

    def _around_call(self, name: str) -> Callable[[], None]:
        """A method of the inner optimizer beside ``step`` begins; the result is for its end."""
        if self.targets.are_trivial:
            return lambda: None
        self.collect_gradients()
        tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        before = [version_of(tensor) for tensor in tensors]

        def after() -> None:
            if before == [version_of(tensor) for tensor in tensors]:
                return
            if self._runtime.decisions.shares_out_parameters:
                raise UnsupportedError(
                    f"{type(self.optimizer).__name__}.{name} changes parameters that are shared out among ranks, which "
                    "optimizer.step() alone may do: leave out shard_optimizer_state and sharded_data_parallel_degree"
                )
            self.targets.finish_update()  # masters are rounded into the model

        return after

    # Precision

    def collect_gradients(self) -> None:
        """Give masters and shards the gradients of the model, without the scale of the loss; local, and cheap if they
        have them.
        """
        is_checked = self._runtime.decisions.has_loss_scale
        overflow = self.targets.collect_gradients(self.loss_scaler.loss_scale, is_checked=is_checked)
        if overflow is not None:
            self._overflow = overflow

    def _agreed_overflow(self) -> bool:
        group, overflow = self._runtime.decisions.whole_model, self._overflow
        if overflow is None:
            overflow = torch.zeros((), device=self._runtime.session.device)
        self._overflow = None
        if group.size > 1:
            gradient_norm.reduce(overflow, group, dist.ReduceOp.MAX, self._runtime, "overflow")
        return bool(overflow)

    def clip_master_grads(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their norm over the whole model is at most ``max_norm``, in every precision,
        before ``step()``; returns the norm. Collective over MP_GROUP; with sharded parameters or optimizer state over
        the world. Source: smp-api section 7.
        """
        norm = self._global_grad_norm = self._clip(max_norm)
        return norm

    def _clip(self, max_norm: float) -> torch.Tensor:
        tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        return gradient_norm.clip_grad_norm_(tensors, max_norm)

    @property
    def loss_scale(self) -> float:
        """What the loss of a backward is multiplied by: 1 except with fp16."""
        return self.loss_scaler.loss_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the scale follows the overflows."""
        return self.loss_scaler.is_dynamic

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale; ``model.backward`` does that itself. Local. Source: smp-api section 18."""
        return loss * self.loss_scale

    def backward(self, loss: torch.Tensor, update_master_grads: bool = False) -> None:
        """``model.backward(loss)`` of the model whose parameters these are, and as collective. Source: smp-api section
        18.
        """
        models = self._index.owners_of(self.all_parameters())
        if models:
            models[0].backward(loss)
        else:
            loss.backward()
        if update_master_grads:
            self.collect_gradients()

    def update_master_grads(self) -> None:
        """Give the masters the gradients of the model, without the scale of the loss; ``step`` and
        ``clip_master_grads`` do it themselves. Local. Source: smp-api section 18.
        """
        self.collect_gradients()

    def init_master_params(self) -> None:
        """Make the masters anew from the parameters of the model. Local. Source: smp-api section 18."""
        self.targets.reload_masters()

    def reload_model_params(self) -> None:
        """Take over the values of the model's parameters in the masters. Local. Source: smp-api section 18."""
        self.targets.reload_masters()

    @property
    def master_params_created(self) -> bool:
        """Whether there are masters."""
        return bool(self.targets.masters())

    @property
    def fp32_from_fp16_groups(self) -> list[list[nn.Parameter]]:
        """The masters, by group. Source: smp-api section 18."""
        return [
            [tensor for tensor in group["params"] if (target := self.targets.of_tensor(tensor)) and target.has_master]
            for group in self.optimizer.param_groups
        ]

    @property
    def fp16_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of the model, by group, in whatever precision. Source: clients section 1.4."""
        return self.own_parts.parameters()

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """Under sharded data parallelism: the elements of each group that this rank keeps, as one flat tensor, of the
        masters where there are masters; it follows each update. To be read only. Source: smp-api section 18.
        """
        return self.own_parts.flat()

    @property
    def ds_param_shard_group(self) -> dist.ProcessGroup:
        """The ranks that together have each element of the parameters once. Source: smp-api section 18."""
        group = self.own_parts.shard_group
        if group is None:
            raise AttributeError("ds_param_shard_group is there with sharded_data_parallel_degree > 1 alone")
        return group.process_group

    # Indices

    def _param_id_to_index(self) -> dict[int, int]:
        """Position of each parameter in the whole model's optimizer, by identity."""
        return {id(parameter): index for index, parameter in enumerate(self.all_parameters())}

    def param_name_to_index(self) -> dict[str, int]:
        """Position of each parameter in the whole model's optimizer, by its name. Local. Source: smp-api section 18."""
        names = self._index.names_of(self.all_parameters())
        return {name: index for index, name in enumerate(names) if name}

    @property
    def _param_index_to_param_local(self) -> dict[int, nn.Parameter]:
        """The parameters of this rank, by their position in the whole model's optimizer."""
        everything = enumerate(self.all_parameters())
        return {number: parameter for number, parameter in everything if self._is_local(parameter)}

    # Partition

    def all_groups(self) -> list[list[nn.Parameter]]:
        """All parameters given to the optimizer, by group, also those that live on other stages. Local."""
        self._note_new_groups()
        return self._all

    def all_parameters(self) -> Iterable[nn.Parameter]:
        """All parameters given to the optimizer, also those that live on other stages. Local."""
        return (parameter for group in self.all_groups() for parameter in group)

    def settle(self) -> None:
        """The parameters of a model are in place: those that live on other stages are dropped, and masters and shards
        replace the others, in place. Called by the library.
        """
        self.replace_parameters()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self._is_local(parameter):
                    self.optimizer.state.pop(parameter, None)
            group["params"][:] = filter(self._is_local, group["params"])
        self._settle_targets()
        if self._waiting_state is not None and not self.has_unpartitioned_parameters():
            (state, gather_if_shard), self._waiting_state = self._waiting_state, None
            self.load_state_dict(state, gather_if_shard)

    def _settle_targets(self) -> None:
        self.targets.settle(self.all_parameters())
        self.own_parts.mark_targets()

    def _is_local(self, parameter: nn.Parameter) -> bool:
        return self._index.is_local(parameter, self._runtime.engine.stage)

    def renew_targets(self) -> None:
        """The shards of a model have been cut anew, before the first step: take the new ones. Called by the library."""
        self.targets.clear()
        for group, everything in zip(self.optimizer.param_groups, self.all_groups(), strict=True):
            group["params"][:] = filter(self._is_local, everything)
        self._settle_targets()

    def has_unpartitioned_parameters(self) -> bool:
        """Whether some of the parameters belong to a model whose partition is still to come. Local."""
        return any(not model.partitioned for model in self._index.owners_of(self.all_parameters()))

    # State dicts

    def local_state_dict(self, gather_if_shard: bool = True) -> dict[str, Any]:
        """The state of the parameters of this rank, indexed as in the whole model, with ``_smp_is_partial: True``.

        Local; with sharded parameters or optimizer state **collective over DP_GROUP**, whose ranks put the state of
        each parameter together, unless ``gather_if_shard=False``: then this rank's shards alone, which are loaded on
        the same ranks. With masters and loss scaling these are in it, too. Source: smp-api section 7.
        """
        return optimizer_states.local_state_dict(self, gather_if_shard)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, merged and un-sliced, on the CPU. Collective over MP_GROUP, and with sharded parameters or
        optimizer state over DP_GROUP, too: then all ranks of the world call it. Source: smp-api section 7.
        """
        return optimizer_states.full_state_dict(self)

    def orig_state_dict(self) -> dict[str, Any]:
        """The inner optimizer's own state dict. Local. Source: smp-api section 18."""
        return self.optimizer.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Mapping[str, Any], gather_if_shard: bool = True) -> None:
        """Load a whole state, the partial one of this partition, or the shards of this rank, which are known as such
        whether ``gather_if_shard`` says so or not. Collective over MP_GROUP for a partial state, else local.

        Before the partition the values of the groups are taken at once, the state is kept until then. When the groups
        differ it is a SMPConfigError. Source: smp-api section 7.
        """
        optimizer_states.load_state_dict(self, state_dict, gather_if_shard)

    #: Of scripts for versions before 1.10, which had files of their own for these.
    save_optimizer_backcompat = local_state_dict
    load_optimizer_backcompat = load_state_dict

    def note_state_for_later(self, state_dict: Mapping[str, Any], gather_if_shard: bool) -> None:
        """Load the state when the model is partitioned. Called by the library."""
        self._waiting_state = (state_dict, gather_if_shard)


def wrapped_optimizers(runtime: Runtime) -> list[DistributedOptimizer]:
    """The wrapped optimizers of this process that still exist. Local."""
    return [optimizer for optimizer in runtime.live_optimizers() if isinstance(optimizer, DistributedOptimizer)]


def _existing_replacement(parameter: nn.Parameter, name: str) -> nn.Parameter:
    replacement = replacement_of(parameter)
    if replacement is None:
        raise SMPConfigError(
            f"the optimizer holds parameter '{name}', which tensor parallelism has replaced by parameters of other "
            "names and shapes when the model was wrapped, so that it would train nothing\n"
            "  wrong: optimizer = SGD(model.parameters()); model = smp.DistributedModel(model)\n"
            "  right: model = smp.DistributedModel(model); optimizer = SGD(model.parameters())"
        )
    return replacement


def _names_beside_torch_s(inner_class: type) -> list[str]:
    """The methods and attributes of the class and its bases below torch.optim.Optimizer that the wrapper has not."""
    own_classes = inner_class.__mro__[: inner_class.__mro__.index(torch.optim.Optimizer)]
    names = {name for cls in own_classes for name in vars(cls) if not name.startswith("__")}
    return sorted(name for name in names if not hasattr(DistributedOptimizer, name))


def _delegate(name: str) -> property:
    return property(lambda self: getattr(self.optimizer, name))
