"""Random numbers under a pipeline are those of one process, on any number of stages."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from engine_random import CASES
from engine_runs import compare, outcomes


@pytest.mark.parametrize("num_stages", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_random_numbers_do_not_depend_on_the_partition(num_stages: int) -> None:
    expected = outcomes("engine_random", list(CASES), 1)[0]
    ranks = outcomes("engine_random", list(CASES), num_stages)
    for name in CASES:
        compare(name, [rank[name] for rank in ranks], expected[name])


def test_a_step_s_number_is_torch_s_next_also_after_an_import_in_inference_mode() -> None:
    spec = importlib.util.find_spec("modelparallel.torch_compat.generators")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with torch.inference_mode():
        spec.loader.exec_module(module)
    torch.manual_seed(5)
    numbers = [module.drawn_number() for _ in range(3)]
    torch.manual_seed(5)
    assert numbers == [int(torch.randint((1 << 62) - 1, ())) for _ in range(3)]
