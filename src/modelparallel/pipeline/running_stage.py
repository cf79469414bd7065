"""What the parts of the engine that begin a program's calls need of the engine: which program runs now, and more.

As stage_view.py, for what stands above the program: calls of modules, doors, transforms, regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from modelparallel.pipeline.placed_modules import PlacedModule
from modelparallel.pipeline.program import Program
from modelparallel.pipeline.randomness import RandomFrames
from modelparallel.pipeline.reached import Captured
from modelparallel.pipeline.stage_view import StageView


class RunningStage(StageView, Protocol):
    """This stage with what runs on it now. See :class:`PipelineEngine` for what is not said here."""

    program: Program | None
    frames: RandomFrames | None
    captured: Captured | None
    copied: list[nn.Parameter]
    is_in_region: bool

    def run_placed(
        self, program: Program, entry: PlacedModule, args: Any, kwargs: Any, call: Callable[..., Any]
    ) -> Any:
        """Run ``call``, the module's own, at its home."""
        ...

    def place_inside(self, module: nn.Module, name: str, around: PlacedModule) -> None:
        """From now on ``module``, a part of ``around``, runs at its home by itself, too."""
        ...

    def place_buffer(self, owner: nn.Module, name: str) -> None:
        """Note that glue may assign a new value to this placed buffer."""
        ...

    def assigned_buffers(self) -> Sequence[tuple[nn.Module, str, torch.Tensor | None]]:
        """The buffers that glue may assign to, and what they are now."""
        ...
