"""The linear layer with its input features divided over the tensor-parallel ranks (smp-api section 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from modelparallel.comm.collectives.split import gather_counts, reduce_scatter, split_features
from modelparallel.errors import TensorParallelError
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.distributed_module import DistributedModule
from modelparallel.tensor_parallel.placements import cut_weight, slice_length, slice_of

if TYPE_CHECKING:
    from modelparallel.comm.groups import Group


class DistributedLinear(DistributedModule):
    """``nn.Linear`` whose weight is cut along the *input* features: [..., in_features] -> [..., out_features].

    Each of the t ranks of TP_GROUP calls it with its own batch (all leading dims together count as rows; their number
    may differ from rank to rank) and gets the rows of its own batch back. Inside, an all-to-all gives each rank its
    slice of the features of all rows; the partial products are summed and scattered back. Construction is local; calls
    and backward are collective over TP_GROUP.

    Parameters: ``weight`` (out_features, in_features / t), this rank's slice; its gradient is the sum over the batches
    of the group. ``bias`` (out_features,), whole on each rank and added once, to the own batch; its gradient is that of
    the own batch. The full weight is initialised as ``nn.Linear`` does it, with the same random numbers, and then
    sliced: for one seed the layer does not depend on t.

    Raises:
        TensorParallelError: ``in_features`` is not divisible by t.

    Source: smp-api section 9.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        slice_length(in_features, self.tp_group.size, "in_features of a DistributedLinear")
        self.in_features = in_features
        self.out_features = out_features
        whole = nn.Linear(in_features, out_features, bias, device, dtype)
        group = self.tp_group
        full = whole.weight.detach()
        self.weight = nn.Parameter(slice_of(full, self._weight_spec(), group.rank_in_group, group.size))
        self.register_parameter("bias", whole.bias)

    @classmethod
    def convert(cls, module: nn.Module, tp_group: Group) -> None:
        """Turn an ``nn.Linear`` into a DistributedLinear in place: same object, same parameters, each rank its
        slice.
        """
        assert isinstance(module, nn.Linear)
        spec = SplitSpec(1, (module.out_features, module.in_features))
        cut_weight(module, {"weight", "bias"}, spec, "in_features", tp_group)
        cls._adopt(module, tp_group)

    def reset_parameters(self) -> None:
        """Initialise again as ``nn.Linear.reset_parameters`` does, from the same random numbers."""
        whole = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.weight.device, self.weight.dtype
        )
        group = self.tp_group
        with torch.no_grad():
            self.weight.copy_(slice_of(whole.weight, self._weight_spec(), group.rank_in_group, group.size))
            if self.bias is not None and whole.bias is not None:
                self.bias.copy_(whole.bias)

    def split_tensors(self) -> dict[str, SplitSpec]:
        """The weight is cut along dim 1, the input features."""
        return {"weight": self._weight_spec()}

    def _weight_spec(self) -> SplitSpec:
        return SplitSpec(1, (self.out_features, self.in_features))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], for the caller's own batch."""
        group = self.tp_group
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise TensorParallelError(
                f"DistributedLinear: the input has shape {tuple(input.shape)}, its last dim must be "
                f"in_features={self.in_features} "
                f"(the full width; the local weight {tuple(self.weight.shape)} holds slice {group.rank_in_group} of "
                f"{group.size})"
            )
        if group.size == 1:
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        device_type = rows.device.type
        has_autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        if has_autocast and rows.dtype != torch.float64:
            rows = rows.to(torch.get_autocast_dtype(device_type))  # before it is sent: half the bytes
        elif rows.dtype != self.weight.dtype:
            raise TensorParallelError(
                f"DistributedLinear: the input is {rows.dtype}, the weight {self.weight.dtype}: convert one of them"
            )
        counts = gather_counts(rows.shape[0], group, rows, self.described)
        features = split_features(rows, group, counts)
        output = reduce_scatter(F.linear(features, self.weight), group, counts=counts)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The global sizes and the local slice."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"local_weight={tuple(self.weight.shape)}"
        )
