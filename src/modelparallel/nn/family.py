"""What the modules of the transformer family share: their layout, and linear maps that are split over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modelparallel.nn.layouts import HiddenLayout
from modelparallel.nn.linear_maps import column_linear, row_linear
from modelparallel.plan.rows import SplitSpec
from modelparallel.tensor_parallel.distributed_module import DistributedModule, current_settings
from modelparallel.tensor_parallel.placements import slice_of


class FamilyModule(DistributedModule):
    """A distributed module that works on the batch of the whole group: all its parameters are scaled-batch ones.

    ``is_inner`` says that it stands inside another module of the family, so that what it gets and gives is in the
    layout inside (see layouts.py).
    """

    def __init__(self) -> None:
        super().__init__()
        settings = current_settings()
        self.is_memory = settings.is_memory
        self.is_prescaled = settings.is_prescaled
        self.is_debug = settings.is_debug
        self.is_inner = False

    @property
    def layout(self) -> HiddenLayout:
        """The layout of the hidden state inside."""
        return HiddenLayout(self.tp_group, self.is_memory, self.is_prescaled, self.is_debug)

    def scaled_batch_tensors(self) -> set[str]:
        """All parameters owned directly."""
        return set(self._parameters)

    def slice_parameter(self, full: torch.Tensor, dim: int | None, num_parts: int = 1) -> nn.Parameter:
        """A parameter that holds this rank's slice of ``full`` along ``dim``, of each of ``num_parts`` equal blocks;
        None: all of it.
        """
        group = self.tp_group
        if dim is None or group.size == 1:
            return nn.Parameter(full)
        spec = spec_of(tuple(full.shape), dim, num_parts)
        return nn.Parameter(slice_of(full, spec, group.rank_in_group, group.size))


class SplitLinear(FamilyModule):
    """A linear map, or several of equal shapes beside each other, split over the ranks.

    ``weight`` is [num_maps * out, in], the blocks of ``num_maps`` maps that read the same input (queries, keys and
    values) one after another; ``bias`` [num_maps * out]. ``is_column``: cut along the output features; else along the
    input features. Initialised as ``nn.Linear`` is, or from N(0, ``std``) with a bias of zeros; the full tensors are
    drawn, so for one seed they do not depend on the tensor parallel degree.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        is_column: bool,
        bias: bool = True,
        num_maps: int = 1,
        std: float | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.is_column, self.num_maps, self.std = is_column, num_maps, std
        weight, offset = self._initial(bias)
        specs = self._specs()
        self.weight = self.slice_parameter(weight, specs["weight"].dim, num_maps)
        self.bias: nn.Parameter | None = None
        if offset is not None:
            spec = specs.get("bias")
            self.bias = self.slice_parameter(offset, None if spec is None else spec.dim, num_maps)

    def _initial(self, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = torch.empty(self.num_maps * self.out_features, self.in_features)
        bias = torch.empty(self.num_maps * self.out_features) if has_bias else None
        with torch.no_grad():
            for index, own in enumerate(weight.chunk(self.num_maps)):
                own_bias = None if bias is None else bias.chunk(self.num_maps)[index]
                if self.std is not None:
                    own.normal_(0.0, self.std)
                    if own_bias is not None:
                        own_bias.zero_()
                    continue
                nn.init.kaiming_uniform_(own, a=math.sqrt(5))
                if own_bias is not None:
                    own_bias.uniform_(-1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        return weight, bias

    def _specs(self) -> dict[str, SplitSpec]:
        num_outputs = self.num_maps * self.out_features
        specs = {"weight": spec_of((num_outputs, self.in_features), 0 if self.is_column else 1, self.num_maps)}
        if self.is_column or self.is_memory:  # a row-parallel map gives slices of the hidden state in that layout
            specs["bias"] = spec_of((num_outputs,), 0, self.num_maps)
        return specs

    def split_tensors(self) -> dict[str, SplitSpec]:
        """The weight, and the bias where each rank holds a slice of the output."""
        specs = self._specs()
        return specs if self.bias is not None else {"weight": specs["weight"]}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """In the layout inside: see nn/linear_maps.py. Several maps give [..., num_maps * local out]."""
        linear = column_linear if self.is_column else row_linear
        return linear(input, self.weight, self.bias, self.tp_group, is_memory=self.is_memory)

    def extra_repr(self) -> str:
        """The global sizes and the local slice."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{'column' if self.is_column else 'row'}-parallel, local_weight={tuple(self.weight.shape)}"
        )


def spec_of(full_shape: tuple[int, ...], dim: int, num_parts: int = 1) -> SplitSpec:
    """A cut along ``dim``, of each of ``num_parts`` equal blocks."""
    parts = (full_shape[dim] // num_parts,) * num_parts if num_parts > 1 else ()
    return SplitSpec(dim, full_shape, parts)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """The entries of a tuple or list; anything else alone."""
    return tuple(value) if isinstance(value, Sequence) else (value,)
