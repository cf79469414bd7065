"""Training in half precision: what is cast, masters in full precision, and the scale of the loss."""

from modelparallel.precision.casting import cast_floating, cast_tensors, scaled_backward
from modelparallel.precision.loss_scale import LossScaler
from modelparallel.precision.masters import make_master, unscale, update_masters, write_back

__all__ = [
    "LossScaler",
    "cast_floating",
    "cast_tensors",
    "make_master",
    "scaled_backward",
    "unscale",
    "update_masters",
    "write_back",
]
