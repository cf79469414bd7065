"""The functions of the odd module paths: state_mod, utils."""

import pytest

import modelparallel as smp
from modelparallel.errors import NotInitializedError
from pool import run_ranks


def odd_paths():
    import torch
    from smdistributed.modelparallel.torch.state_mod import state
    from smdistributed.modelparallel.torch.utils import get_distribution_axis, rmsg

    assert state is smp.state
    keys = ("fp16", "bf16", "prescaled_batch", "shard_optimizer_state", "sharded_data_parallel_degree")
    values = [getattr(state.cfg, key) for key in keys]
    with smp.tensor_parallelism():
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Embedding(4, 8))
    model = smp.DistributedModel(model)
    linear, embedding = model.get_module()
    axes = [get_distribution_axis(tensor) for tensor in (linear.weight, linear.bias, embedding.weight)]
    return values, list(state.module_manager.translate_functions), axes, rmsg("hello")


def test_state_and_the_functions_of_utils():
    results = run_ranks(odd_paths, 2, parameters={"tensor_parallel_degree": 2, "ddp": True})
    for rank, (values, pairs, axes, text) in enumerate(results):
        assert values == [False, False, False, False, 1] and pairs == []
        assert axes == [1, None, 1]
        assert text == f"[rank {rank}, pp 0, tp {rank}, rdp 0] hello"


def test_before_init_the_state_names_the_remedy():
    with pytest.raises(NotInitializedError, match=r"smp\.init\(\)"):
        smp.state.cfg  # noqa: B018
