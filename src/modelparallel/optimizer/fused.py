"""``smp.optimizers``: FusedAdam, FusedLAMB and FusedNovoGrad without apex (smp-api section 7).

[Note: where the arithmetic runs] Every update is a handful of torch's multi-tensor kernels over all parameters of a
group, and FusedAdam takes torch's one fused kernel where that computes the same. Parameters in half precision are
updated in fp32: their moments are kept in fp32 (in bf16 a second moment with beta2 = 0.999 would never move again),
and the result is rounded once.

[Note: whole parameters] The updates of LAMB and NovoGrad need norms of whole parameters (``is_elementwise`` is False).
Where a process holds slices of parameters, or part of the model, ``norms`` says how norms are made whole;
``smp.DistributedOptimizer`` sets it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.optim.adam import adam

from modelparallel.errors import SMPConfigError
from modelparallel.torch_compat.private_parts import (
    by_kind,
    foreach_add,
    foreach_add_,
    foreach_addcmul_,
    foreach_div,
    foreach_div_,
    foreach_mul_,
    foreach_norm,
    foreach_sqrt,
)

__all__ = ["FusedAdam", "FusedLAMB", "FusedLamb", "FusedNovoGrad", "Norms"]

_HALF = (torch.float16, torch.bfloat16)
#: Where torch has a fused Adam kernel for fp32 and fp64.
_FUSED_DEVICES = ("cpu", "cuda")


class Norms(Protocol):
    """How the numbers that a process has of its parameters become those of the whole model."""

    def whole(self, parameters: Sequence[torch.Tensor], values: torch.Tensor, is_maximum: bool) -> torch.Tensor:
        """Per parameter (row of ``values``, [n, ...]): the sum, or the maximum, over the slices of it."""
        ...

    def gradient_norm(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm of the gradient over the whole model, of which this process has these parameters; 0-dim."""
        ...


class _FusedOptimizer(torch.optim.Optimizer):
    """What the three share: checks, the state of a parameter, zeroing, and loading states that stay in fp32."""

    is_elementwise = True

    def __init__(self, params: Any, defaults: dict[str, Any], amsgrad: bool, set_grad_none: bool) -> None:
        name = type(self).__name__
        if amsgrad:
            raise RuntimeError(f"{name} does not support the AMSGrad variant: use amsgrad=False, or torch.optim.AdamW")
        _check_range(name, "lr", float(defaults["lr"]), 0.0)
        _check_range(name, "eps", defaults["eps"], 0.0)
        _check_range(name, "weight_decay", defaults["weight_decay"], 0.0)
        for beta in defaults["betas"]:
            if not 0.0 <= beta < 1.0:
                raise SMPConfigError(f"{name}: betas must be in [0, 1), got {defaults['betas']}")
        self.set_grad_none = set_grad_none
        super().__init__(params, defaults)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients; ``set_to_none`` is the constructor's ``set_grad_none`` unless it is given."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients; returns what ``closure`` returns. Local, or, with ``norms``,
        collective as those are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_groups()
        return loss

    def _update_groups(self) -> None:
        for group in self.param_groups:
            self._update(group, self._trained(group))

    @abstractmethod
    def _update(self, group: Mapping[str, Any], parameters: list[torch.Tensor]) -> None:
        """Update the parameters of a group that have gradients."""

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch, but moments of half-precision parameters are not rounded to the parameters' dtype."""
        super().load_state_dict(dict(state_dict))
        saved = state_dict["state"]
        identifiers = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(identifiers, parameters, strict=True):
            for key, value in saved.get(index, {}).items():
                if isinstance(value, torch.Tensor) and key != "step" and value.is_floating_point():
                    dtype = _exact(parameter.dtype)
                    self.state[parameter][key] = value.detach().clone().to(parameter.device, dtype)

    def _trained(self, group: Mapping[str, Any]) -> list[torch.Tensor]:
        """The parameters of a group that have a gradient."""
        trained = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients (a parameter of shape "
                    f"{tuple(parameter.shape)} has one): use sparse=False, or torch.optim.SparseAdam for it"
                )
            trained.append(parameter)
        return trained

    def _moment(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        """A state tensor like the parameter, zeros at first, in fp32 at least."""
        state = self.state[parameter]
        if key not in state:
            state[key] = torch.zeros_like(parameter, dtype=_exact(parameter.dtype), memory_format=torch.preserve_format)
        return state[key]  # type: ignore[no-any-return]

    def _count(self, parameter: torch.Tensor) -> float:
        """The number of this update of the parameter, from 1; it counts its own, since it may have gone without."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        return float(state["step"])


class _OptimizerWithNorms(_FusedOptimizer):
    is_elementwise = False
    norms: Norms | None = None


class FusedAdam(_FusedOptimizer):
    """Adam (Kingma and Ba 2015), or AdamW (Loshchilov and Hutter 2019) with ``adam_w_mode``, with apex's signature.
    Local.

    Updates each element by itself, so states may be sharded element by element.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps: as in torch.
        bias_correction: divide the moments by 1 - beta^t.
        adam_w_mode: decoupled weight decay (AdamW); False: weight decay is added to the gradient.
        weight_decay: the factor of either.
        amsgrad: only False.
        set_grad_none: what ``zero_grad()`` does.
        capturable: accepted without effect.
        master_weights: keep fp32 copies of half-precision parameters in the state, and update those.

    Raises:
        RuntimeError: ``amsgrad=True``.

    Source: smp-api section 7.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        self.adam_w_mode, self.capturable, self.master_weights = bool(adam_w_mode), capturable, master_weights
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, amsgrad, set_grad_none)

    def _update(self, group: Mapping[str, Any], parameters: list[torch.Tensor]) -> None:
        kinds = by_kind(parameters, lambda parameter: (parameter.device, parameter.dtype, _gradient(parameter).dtype))
        for (device, dtype, grad_dtype), members in kinds.items():
            has_kernel = device.type in _FUSED_DEVICES and dtype == grad_dtype and dtype not in _HALF
            if has_kernel and group["bias_correction"]:
                self._fused_update(group, members)
            else:
                self._plain_update(group, members)

    def _fused_update(self, group: Mapping[str, Any], parameters: list[torch.Tensor]) -> None:
        steps = []
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            # The kernel counts on the device of the parameters.
            state["step"] = state["step"].to(parameter.device)
            steps.append(state["step"])
        adam(
            parameters,
            [_gradient(parameter) for parameter in parameters],
            [self._moment(parameter, "exp_avg") for parameter in parameters],
            [self._moment(parameter, "exp_avg_sq") for parameter in parameters],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=self.adam_w_mode,
        )

    def _plain_update(self, group: Mapping[str, Any], parameters: list[torch.Tensor]) -> None:
        lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
        values, gradients = _exact_values(parameters), _exact_gradients(parameters)
        if self.master_weights:
            for index, parameter in enumerate(parameters):
                if parameter.dtype in _HALF:
                    values[index] = self.state[parameter].setdefault("master_param", values[index])
        if decay and self.adam_w_mode:
            foreach_mul_(values, 1 - lr * decay)
        elif decay:
            gradients = list(foreach_add(gradients, values, alpha=decay))
        averages = [self._moment(parameter, "exp_avg") for parameter in parameters]
        squares = [self._moment(parameter, "exp_avg_sq") for parameter in parameters]
        _average(averages, gradients, beta1, 1 - beta1)
        _average_squares(squares, gradients, beta2)
        counts = [self._count(parameter) for parameter in parameters]
        update = _adam_direction(averages, squares, counts, group)
        foreach_add_(values, update, alpha=-lr)
        _store(parameters, values)


class FusedLAMB(_OptimizerWithNorms):
    """LAMB (You et al. 2020): AdamW whose step is scaled, per parameter, by |parameter| / |update|; apex's signature.

    Gradients are clipped first, all together, to the norm ``max_grad_norm`` (None or 0: not). The scale is 1 where
    either norm is 0, and without weight decay unless ``use_nvlamb``. Local as it is; wrapped in
    ``smp.DistributedOptimizer`` a step is collective, since the norms are those of the whole model.

    Args:
        params, lr, bias_correction, betas, eps, weight_decay, amsgrad, set_grad_none: as in FusedAdam.
        adam_w_mode: False: weight decay is added to the gradient and not to the update.
        grad_averaging: the gradient enters the first moment with 1 - beta1; False: with 1.
        max_grad_norm: see above.
        use_nvlamb: see above.

    Source: smp-api section 7.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float | None = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        self.adam_w_mode, self.use_nvlamb = bool(adam_w_mode), use_nvlamb
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        super().__init__(params, defaults, amsgrad, set_grad_none)

    def _update_groups(self) -> None:
        total: torch.Tensor | None = None
        for group in self.param_groups:
            is_clipped = group["max_grad_norm"] is not None and group["max_grad_norm"] > 0
            if is_clipped and total is None:
                total = self._gradient_norm()
            self._update(group, self._trained(group), total if is_clipped else None)

    def _gradient_norm(self) -> torch.Tensor:
        parameters = [parameter for group in self.param_groups for parameter in self._trained(group)]
        if self.norms is not None:
            return self.norms.gradient_norm(parameters)
        return _norms(_exact_gradients(parameters)).square().sum().sqrt()

    def _update(
        self, group: Mapping[str, Any], parameters: list[torch.Tensor], total: torch.Tensor | None = None
    ) -> None:
        lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
        values, gradients = _exact_values(parameters), _exact_gradients(parameters)
        if total is not None:
            scale = torch.clamp(group["max_grad_norm"] / total, max=1.0)
            gradients = [gradient * scale.to(gradient.device, gradient.dtype) for gradient in gradients]
        if decay and not self.adam_w_mode and parameters:
            gradients = list(foreach_add(gradients, values, alpha=decay))
        averages = [self._moment(parameter, "exp_avg") for parameter in parameters]
        squares = [self._moment(parameter, "exp_avg_sq") for parameter in parameters]
        update: list[torch.Tensor] = []
        if parameters:
            _average(averages, gradients, beta1, 1 - beta1 if group["grad_averaging"] else 1.0)
            _average_squares(squares, gradients, beta2)
            counts = [self._count(parameter) for parameter in parameters]
            update = _adam_direction(averages, squares, counts, group)
            if decay and self.adam_w_mode:
                foreach_add_(update, values, alpha=decay)
        if decay or self.use_nvlamb:
            update = self._scaled(parameters, values, update, group["params"])
        if parameters:
            foreach_add_(values, update, alpha=-lr)
            _store(parameters, values)

    def _scaled(
        self,
        parameters: list[torch.Tensor],
        values: list[torch.Tensor],
        update: list[torch.Tensor],
        everything: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        squares = torch.stack([_norms(values), _norms(update)], 1).square()
        norms = _whole(self.norms, parameters, squares, everything, is_maximum=False).sqrt()
        ratios = torch.where((norms > 0).all(1), norms[:, 0] / norms[:, 1], 1.0)
        return [part * ratio.to(part.device, part.dtype) for part, ratio in zip(update, ratios.unbind(), strict=True)]


FusedLamb = FusedLAMB


class FusedNovoGrad(_OptimizerWithNorms):
    """NovoGrad (Ginsburg et al. 2019): gradients are divided by a running norm per parameter; apex's signature.

    Local as it is; wrapped in ``smp.DistributedOptimizer`` a step is collective, since the norms are those of whole
    parameters.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, set_grad_none: as in FusedAdam.
        bias_correction: divide both moments by 1 - beta^t.
        reg_inside_moment: the divided gradient and the weight decay enter the first moment, as in the paper; False: the
            moment is that of the gradients, and both are applied to the update.
        grad_averaging: what enters the first moment enters with 1 - beta1; False: with 1.
        norm_type: 2, the running mean of squared L2 norms; 0, that of maximum norms. The state ``exp_avg_sq`` is that
            mean, one number for a parameter.
        init_zero: the mean starts at 0; False: with the first gradient's norm.

    Source: smp-api section 7.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        reg_inside_moment: bool = False,
        grad_averaging: bool = True,
        norm_type: int = 2,
        init_zero: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if norm_type not in (0, 2):
            raise SMPConfigError(f"FusedNovoGrad: norm_type must be 2 (L2) or 0 (maximum), got {norm_type!r}")
        self.reg_inside_moment, self.norm_type, self.init_zero = reg_inside_moment, norm_type, init_zero
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
        }  # fmt: skip
        super().__init__(params, defaults, amsgrad, set_grad_none)

    def _update(self, group: Mapping[str, Any], parameters: list[torch.Tensor]) -> None:
        lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
        gradients = _exact_gradients(parameters)
        norms = _norms(gradients, self.norm_type)
        if self.norm_type == 2:
            norms = norms.square()
        norms = _whole(self.norms, parameters, norms, group["params"], is_maximum=self.norm_type == 0)
        if not parameters:
            return
        values = _exact_values(parameters)
        counts = [self._count(parameter) for parameter in parameters]
        denominators = []
        for parameter, count, now in zip(parameters, counts, norms.unbind(), strict=True):
            state = self.state[parameter]
            now = now.to(parameter.device, _exact(parameter.dtype))
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(now) if self.init_zero else now.clone()
                start = beta2 if self.init_zero else 1.0
            else:
                start = beta2
            state["exp_avg_sq"].mul_(start).add_(now, alpha=1 - start)
            mean = state["exp_avg_sq"].sqrt() if self.norm_type == 2 else state["exp_avg_sq"].clone()
            if group["bias_correction"]:
                correction = 1 - beta2**count
                mean.div_(correction**0.5 if self.norm_type == 2 else correction)
            denominators.append(mean.add_(group["eps"]))
        corrections = [1 - beta1**count if group["bias_correction"] else 1.0 for count in counts]
        share = 1 - beta1 if group["grad_averaging"] else 1.0
        averages = [self._moment(parameter, "exp_avg") for parameter in parameters]
        if self.reg_inside_moment:
            gradients = list(foreach_div(gradients, denominators))
            if decay:
                foreach_add_(gradients, values, alpha=decay)
            _average(averages, gradients, beta1, share)
            update = foreach_div(averages, corrections)
        else:
            _average(averages, gradients, beta1, share)
            update = foreach_div(averages, corrections)
            foreach_div_(update, denominators)
            if decay:
                foreach_add_(update, values, alpha=decay)
        foreach_add_(values, update, alpha=-lr)
        _store(parameters, values)


def _check_range(name: str, what: str, value: float, low: float) -> None:
    if not value >= low:
        raise SMPConfigError(f"{name}: {what} must be >= {low:g}, got {value!r}")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _exact_values(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters themselves, or fp32 copies of those in half precision."""
    return [parameter.detach().to(_exact(parameter.dtype)) for parameter in parameters]


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _exact_gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [_gradient(parameter).detach().to(_exact(parameter.dtype)) for parameter in parameters]


def _store(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Round the new values of half-precision parameters into them; the others have been updated in place."""
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.dtype != value.dtype:
            parameter.copy_(value)


def _average(averages: list[torch.Tensor], values: list[torch.Tensor], beta: float, share: float) -> None:
    foreach_mul_(averages, beta)
    foreach_add_(averages, values, alpha=share)


def _average_squares(squares: list[torch.Tensor], values: list[torch.Tensor], beta: float) -> None:
    foreach_mul_(squares, beta)
    foreach_addcmul_(squares, values, values, 1 - beta)


def _adam_direction(
    averages: list[torch.Tensor], squares: list[torch.Tensor], counts: list[float], group: Mapping[str, Any]
) -> list[torch.Tensor]:
    """m / (sqrt(v) + eps), with corrected moments if the group wants that."""
    denominators = foreach_sqrt(squares)
    beta1, beta2 = group["betas"]
    if group["bias_correction"]:
        foreach_div_(denominators, [(1 - beta2**count) ** 0.5 for count in counts])
    foreach_add_(denominators, group["eps"])
    if group["bias_correction"]:
        foreach_mul_(denominators, [1 - beta1**count for count in counts])
    return list(foreach_div(averages, denominators))


def _norms(tensors: list[torch.Tensor], kind: int = 2) -> torch.Tensor:
    """[n]: the L2 norm of each tensor, or (``kind`` 0) its largest absolute value."""
    if not tensors:
        return torch.zeros(0)
    norms = foreach_norm(tensors, float("inf") if kind == 0 else 2)
    device = norms[0].device
    return torch.stack([norm.to(device) for norm in norms])


def _whole(
    norms: Norms | None,
    parameters: list[torch.Tensor],
    values: torch.Tensor,
    everything: list[torch.Tensor],
    is_maximum: bool,
) -> torch.Tensor:
    """``values`` of ``parameters``, of their slices together; ranks may lack gradients of different parameters."""
    if norms is None:
        return values
    position = {id(parameter): index for index, parameter in enumerate(everything)}
    places = torch.tensor([position[id(parameter)] for parameter in parameters], dtype=torch.long, device=values.device)
    table = values.new_zeros(len(everything), *values.shape[1:])
    table[places] = values
    return norms.whole(everything, table, is_maximum)[places]
