"""The private names of ``torch.distributed`` that sharded data parallelism needs, each with the reason."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from modelparallel.errors import UnsupportedError

# FSDP2. [Note: fully_shard] ``torch.distributed.fsdp.fully_shard`` and the methods of its modules are public. What a
# pipeline needs beside them is not: reducing gradients when all backward pieces are through (torch's own pipelining
# does that through the same private names, ``stage.py``, ``perform_reduce_grad``), and looking at the two parameters
# that stand for one, the shard and the gathered one. These two classes are all of it.


class FSDPParameter:
    """One parameter in FSDP's care: a shard (a ``DTensor``) between uses, a gathered one while it is used."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """The first module that holds it, and the name there."""
        return self._inner._module_info.module, self._inner._module_info.param_name

    @property
    def sharded(self) -> nn.Parameter:
        """The ``DTensor`` parameter that optimizers see."""
        parameter: nn.Parameter = self._inner.sharded_param
        return parameter

    @property
    def local(self) -> torch.Tensor:
        """This rank's rows of it, contiguous."""
        tensor: torch.Tensor = self._inner._sharded_local_tensor
        return tensor

    @property
    def local_gradient(self) -> torch.Tensor | None:
        """The reduced gradient of these rows."""
        gradient: Any = self.sharded.grad
        return None if gradient is None else gradient._local_tensor

    def set_local_gradient(self, gradient: torch.Tensor | None) -> None:
        """Have another reduced gradient of these rows, or none."""
        if gradient is not None:
            gradient = self._inner.to_sharded_dtensor(gradient.detach())
        self.sharded.grad = gradient

    def take_hooks(self, old: nn.Parameter) -> None:
        """What the script has registered on the parameter ``old``, whose place this one takes, is called where the
        gradient is made: on the gathered parameter. So is what it registers later on any of the three.
        """
        hooks: Any = OrderedDict() if old._backward_hooks is None else old._backward_hooks
        for parameter in (old, self.whole, self.sharded):
            assert parameter is not None
            parameter._backward_hooks = hooks
        after: Any = getattr(old, "_post_accumulate_grad_hooks", None)
        if after:
            assert self.whole is not None
            self.whole._post_accumulate_grad_hooks = after

    @property
    def whole(self) -> nn.Parameter | None:
        """The gathered parameter: always the same object, without memory while it is not gathered; None before the
        first gathering.
        """
        return getattr(self._inner, "_unsharded_param", None)

    @property
    def is_waiting(self) -> bool:
        """Whether it has a gradient that is not reduced yet."""
        whole = self.whole
        return self._inner.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)

    def wait_with_zeros(self) -> None:
        """Have a gradient of zeros to reduce, if there is none."""
        whole = self.whole
        if whole is not None and not self.is_waiting:
            whole.grad = torch.zeros_like(whole)

    def take_waiting(self, before: torch.Tensor | None = None) -> torch.Tensor | None:
        """The gradient that is not reduced yet, which it then has no more; added to ``before``, what was taken already:
        a backward leaves a module once for each call of it.
        """
        whole = self.whole
        waiting: torch.Tensor | None = self._inner.unsharded_accumulated_grad
        if whole is not None and whole.grad is not None:
            waiting = whole.grad if waiting is None else waiting.add_(whole.grad)
        self.forget_waiting()
        if before is None or waiting is None:
            return waiting if before is None else before
        return before.add_(waiting)

    def scale_waiting(self, factor: float, before: torch.Tensor | None) -> None:
        """Multiply the gradient that is not reduced yet, and add ``before`` to it."""
        whole, waiting = self.whole, self._inner.unsharded_accumulated_grad
        local = None if whole is None else whole.grad
        for gradient in (waiting, local):
            if gradient is not None:
                gradient.mul_(factor)
        if before is None:
            return
        if waiting is not None:
            waiting.add_(before)
        elif local is not None:
            local.add_(before)
        else:
            self.wait_with(before)

    def wait_with(self, gradient: torch.Tensor) -> None:
        """Have this gradient to reduce, and no other; it lies where one of its dtype would."""
        self.forget_waiting()
        if self.whole is not None and self.whole.dtype == gradient.dtype:
            self.whole.grad = gradient
        else:
            self._inner.unsharded_accumulated_grad = gradient

    def forget_waiting(self) -> None:
        """Forget the gradient that is not reduced yet."""
        self._inner.unsharded_accumulated_grad = None
        if self.whole is not None:
            self.whole.grad = None

    def placed(self, full: torch.Tensor) -> torch.Tensor:
        """A ``DTensor`` laid out as the parameter, with the values of the whole tensor ``full``. Local."""
        local = self.local
        rows = self._inner.padded_sharded_param_size[0]
        start = min(self._inner.mesh_info.shard_mesh_rank * rows, full.shape[0])
        part = full[start : start + local.shape[0]].to(device=local.device, dtype=local.dtype)
        result: torch.Tensor = self._inner.to_sharded_dtensor(part.reshape(local.shape).contiguous())
        return result

    @property
    def padded_numel(self) -> int:
        """Elements that each rank has in a flat buffer of shards."""
        return int(self._inner.padded_sharded_param_size.numel())

    @property
    def start(self) -> int:
        """Where this rank's elements begin in the flat parameter."""
        size, rank = self._inner.padded_sharded_param_size, self._inner.mesh_info.shard_mesh_rank
        return min(int(rank * size.numel()), self.sharded.numel())


class FSDPGroup:
    """The parameters that one call of ``fully_shard`` gathers and reduces together."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        from torch.distributed.fsdp import fully_shard

        self.module = module
        self._state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
        self._inner: Any = _param_groups(module)[0]
        self._device = device
        self.parameters = [FSDPParameter(inner) for inner in self._inner.fsdp_params]

    @staticmethod
    def exists(module: nn.Module) -> bool:
        """Whether ``fully_shard`` has found a parameter for this module's own group."""
        return bool(_param_groups(module))

    def take_off_hooks(self) -> None:
        """Let calls of the module pass; gathering and reducing is up to the caller from now on."""
        self._state._pre_forward_hook_handle.remove()
        self._state._post_forward_hook_handle.remove()
        self._state._comm_ctx.lazy_init(self._device)
        self._inner.comm_ctx = self._state._comm_ctx
        self._inner.lazy_init()

    def keep_place(self, names: Sequence[str]) -> None:
        """Refuse to gather where something else stands in the place of a parameter, which gathering would overwrite.
        ``names``: of the parameters, for the error.
        """
        original = self._inner.unshard

        def unshard(*args: Any, **kwargs: Any) -> None:
            for parameter, name in zip(self.parameters, names, strict=True) if self._inner.is_sharded else ():
                module, attribute = parameter.owner
                if module._parameters.get(attribute) is not parameter.sharded:
                    raise UnsupportedError(
                        f"{type(module).__name__} is called with another tensor in place of its parameter '{name}' "
                        "(torch.func.functional_call does that), and with sdp_gather: visit the call gathers its own, "
                        "which would count instead: set sdp_gather: step, with which parameters are whole during a step"
                    )
            original(*args, **kwargs)

        self._inner.unshard = unshard

    def notice_backward(self, notice: Callable[[], None]) -> None:
        """Call ``notice`` where the backward through the group ends, before its gradients are reduced."""
        original = self._inner.post_backward

        def post_backward(*unused: Any) -> None:
            notice()
            self._take_dtypes()
            original(*unused)

        self._inner.post_backward = post_backward

    def name_reduction(self, named: Callable[[], AbstractContextManager[None]]) -> None:
        """Reduce gradients inside of ``named()``."""
        original = self._inner.post_backward

        def post_backward(*unused: Any) -> None:
            with named():
                original(*unused)

        self._inner.post_backward = post_backward

    def _take_dtypes(self) -> None:
        # FSDP takes those of the parameters that were trained when it was made, and has none if all were frozen.
        if self._inner._orig_dtype is None:
            self._inner._init_mp_dtypes()

    @property
    def reduces(self) -> bool:
        """Whether gradients are reduced where the backward through the group ends."""
        return bool(self._inner.reduce_grads)

    def set_backward(self, *, reduces: bool, frees: bool) -> None:
        """What the next backward does where it leaves the group: reduce gradients, free the whole parameters."""
        self._inner.reduce_grads = self._inner.all_reduce_grads = reduces
        self._inner.reshard_after_backward = frees

    def make_whole(self) -> None:
        """Make the gathered parameters, without memory and values: the first gathering would. Local."""
        self._inner.lazy_init()
        num_ranks = self._inner.mesh_info.shard_mesh_size
        for inner in self._inner.fsdp_params:
            dtype = inner.param_dtype or inner.orig_dtype
            inner.init_all_gather_outputs([inner._sharded_param_data.numel()], [dtype], num_ranks, self._device)
            inner.init_unsharded_param()
            inner.free_unsharded_param()

    @property
    def is_gathered(self) -> bool:
        """Whether the whole parameters are in memory."""
        return bool(self._inner.is_unsharded)

    def gather(self) -> None:
        """Gather the parameters; collective over the sharding group."""
        self._inner.lazy_init()
        self._inner.unshard()
        self._inner.wait_for_unshard()

    def free(self) -> None:
        """Free the whole parameters, whatever FSDP would do by itself now."""
        self._inner._to_sharded()

    def reduce(self) -> None:
        """Reduce the gradients that wait, add them to those of the shards, and free the whole parameters; collective
        over the mesh.
        """
        inner, context = self._inner, self._inner.comm_ctx
        if not hasattr(context, "reduce_scatter_stream"):
            context.lazy_init(self._device)
            inner.lazy_init()
        before = inner.reduce_grads, inner.all_reduce_grads, inner.reshard_after_backward
        inner.reduce_grads = inner.all_reduce_grads = inner.reshard_after_backward = True
        self._take_dtypes()
        try:
            inner.post_backward()
            inner.finalize_backward()
            for state in _take_reduce_scatter_states(context):
                if state.event is not None:
                    context.device_handle.current_stream().wait_event(state.event)
        finally:
            inner.reduce_grads, inner.all_reduce_grads, inner.reshard_after_backward = before
            inner._training_state = type(inner._training_state).IDLE

    def reset(self) -> None:
        """Forget what a forward or backward that raised has left open; the gradients that wait stay."""
        if self._state._is_root and hasattr(self._state, "_reset_iter_state"):
            self._state._reset_iter_state()
        else:
            self._inner._training_state = type(self._inner._training_state).IDLE
        self.free()


def _param_groups(module: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import fully_shard

    state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch 2.11


def _take_reduce_scatter_states(context: Any) -> list[Any]:
    """What keeps the memory of reductions that have been started; the context forgets it."""
    if hasattr(context, "reduce_scatter_states"):
        states = list(context.reduce_scatter_states)
        context.reduce_scatter_states.clear()
        return states
    states, context.reduce_scatter_state = [context.reduce_scatter_state], None  # torch 2.11
    return [state for state in states if state is not None]
