"""All benchmarks, by name."""

from __future__ import annotations

from bench.cases import (
    checkpoints,
    data_parallel,
    engine_overhead,
    growth,
    language_models,
    memory,
    memory_ladder,
    overhead,
    partition,
    pipeline,
    precision,
    schedules,
    sharded,
    tensor_parallel,
    transformer_block,
    wrapping,
)
from bench.cases.case import Case

_MODULES = (
    pipeline,
    schedules,
    partition,
    growth,
    overhead,
    engine_overhead,
    data_parallel,
    sharded,
    tensor_parallel,
    transformer_block,
    wrapping,
    language_models,
    memory,
    memory_ladder,
    precision,
    checkpoints,
)
CASES: dict[str, Case] = {case.name: case for module in _MODULES for case in module.CASES}
