"""The scale of the loss: small gradients are lost in fp16, so the loss is multiplied by it and the gradients divided
(Micikevicius et al., Mixed Precision Training, 2018; the rule for dynamic scales: smp-api section 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelparallel.errors import SMPConfigError

#: The arguments of a dynamic scale and their defaults.
DYNAMIC_DEFAULTS: Mapping[str, Any] = {
    "init_scale": 2.0**32,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1,
    "delayed_shift": 1,
    "consecutive_hysteresis": False,
}


class LossScaler:
    """A fixed scale, or one that follows the overflows.

    Dynamic: an update with an overflow divides the scale by ``scale_factor``, not below ``min_scale``; before that it
    forgives ``delayed_shift - 1`` of them. ``scale_window`` updates without an overflow multiply it by
    ``scale_factor``, and the overflows that are forgiven are counted anew (with ``consecutive_hysteresis``: after each
    update without one).
    """

    def __init__(self, static_scale: float | None, arguments: Mapping[str, Any] | None) -> None:
        """``arguments``: of a dynamic scale; None: the scale is ``static_scale``."""
        for name in arguments or {}:
            if name not in DYNAMIC_DEFAULTS:
                raise SMPConfigError(
                    f"smp.DistributedOptimizer: unknown argument {name!r}; loss scaling takes "
                    f"{', '.join(DYNAMIC_DEFAULTS)}"
                )
        self.is_dynamic = arguments is not None
        settings = {**DYNAMIC_DEFAULTS, **(arguments or {})}
        self.scale_factor = float(settings["scale_factor"])
        self.scale_window = int(settings["scale_window"])
        self.min_scale = float(settings["min_scale"])
        self.delayed_shift = int(settings["delayed_shift"])
        self.consecutive_hysteresis = bool(settings["consecutive_hysteresis"])
        self.cur_scale = float(
            settings["init_scale"] if self.is_dynamic else 1.0 if static_scale is None else static_scale
        )
        self.cur_iter = 0
        self.last_overflow_iter = -1
        self.cur_hysteresis = self.delayed_shift
        for name, value, is_right in (
            ("scale_factor", self.scale_factor, self.scale_factor > 1),
            ("scale_window", self.scale_window, self.scale_window >= 1),
            ("delayed_shift", self.delayed_shift, self.delayed_shift >= 1),
            ("init_scale" if self.is_dynamic else "static_loss_scale", self.cur_scale, self.cur_scale > 0),
            ("min_scale", self.min_scale, self.min_scale > 0),
        ):
            if not is_right:
                bound = (
                    "> 1" if name == "scale_factor" else ">= 1" if name in ("scale_window", "delayed_shift") else "> 0"
                )
                raise SMPConfigError(f"smp.DistributedOptimizer: {name}: expected a number {bound}, got {value!r}")

    @property
    def loss_scale(self) -> float:
        """What the loss of the next backward is multiplied by."""
        return self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        """After each update, or skipped one; with the same ``overflow`` on all ranks."""
        if not self.is_dynamic:
            return
        if overflow:
            if self.cur_hysteresis == 1 or self.delayed_shift == 1:
                self.cur_scale = max(self.cur_scale / self.scale_factor, self.min_scale)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            is_window_full = (self.cur_iter - self.last_overflow_iter) % self.scale_window == 0
            if self.consecutive_hysteresis or is_window_full:
                self.cur_hysteresis = self.delayed_shift
            if is_window_full:
                self.cur_scale *= self.scale_factor
        self.cur_iter += 1

    def state_dict(self) -> dict[str, Any]:
        """The scale and the counters."""
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved scale and its counters."""
        for name in self.state_dict():
            if name in state:
                setattr(self, name, state[name])
