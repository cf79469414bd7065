"""All benchmarks, by name."""

from __future__ import annotations

from bench.cases import data_parallel, memory, overhead, pipeline, tensor_parallel
from bench.cases.case import Case

CASES: dict[str, Case] = {
    case.name: case for module in (pipeline, overhead, data_parallel, tensor_parallel, memory) for case in module.CASES
}
