"""What calls of modules, doors, transforms and regions need of the engine: a stage view, and which program runs now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from modelparallel.pipeline.operations.captured_values import Captured
from modelparallel.pipeline.program.program import Program
from modelparallel.pipeline.program.randomness import RandomFrames
from modelparallel.pipeline.values.stage_view import StageView


class RunningStage(StageView, Protocol):
    """This stage with what runs on it now. See :class:`PipelineEngine` for what is not said here."""

    program: Program | None
    frames: RandomFrames | None
    captured: Captured | None
    copied: list[nn.Parameter]
    is_in_region: bool

    def assigned_buffers(self) -> Sequence[tuple[nn.Module, str, torch.Tensor | None]]:
        """The buffers that glue may assign to, and what they are now."""
        ...
