"""State dicts of wrapped models, before and after the first step (smp-api section 5)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import modelparallel as smp
from distributed_run import assert_equal_over
from parity import assert_parity
from rank_tests import RankTests, on
from stateful_model import make_net, train_step, wrap
from training import forward_step

SINGLE = RankTests(1, {})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = RankTests(2, {"tensor_parallel_degree": 2})
PP2_TP2 = RankTests(4, {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2, "microbatches": 2})
PP2_DP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2_DP4 = RankTests(4, {"tensor_parallel_degree": 2})
ALL = (SINGLE, PP2, TP2, PP2_TP2, PP2_DP2, TP2_DP4)
SPLIT = (PP2, TP2, PP2_TP2)


def evaluate(model) -> torch.Tensor:
    with torch.no_grad():
        return forward_step(model.eval(), torch.arange(8)).concat()


def evaluate_plain(state: dict[str, torch.Tensor]) -> torch.Tensor:
    net = make_net(99)
    net.load_state_dict(state)
    with torch.no_grad():
        return net.eval()(torch.arange(8))


@on(*ALL)
def test_full_state_dicts_are_those_of_the_plain_model():
    plain = make_net(1).state_dict()
    model = wrap(make_net(1))
    for is_stepped in (False, True):
        if is_stepped:
            evaluate(model)
        state = model.state_dict()
        assert list(state) == list(plain), "names and order of the user's model, aliases too"
        assert all(value.device.type == "cpu" and not value.requires_grad for value in state.values())
        torch.testing.assert_close(state, dict(plain), rtol=0, atol=0)
    assert model.state_dict(prefix="net.").keys() == {f"net.{name}" for name in plain}
    make_net(2).load_state_dict(state)  # plain torch takes it, strictly
    next(iter(state.values())).zero_()
    torch.testing.assert_close(model.state_dict(), dict(plain), rtol=0, atol=0)


@on(*ALL)
def test_gathering_to_rank_0_leaves_nothing_elsewhere():
    model = wrap(make_net(1))
    for is_stepped in (False, True):
        if is_stepped:
            evaluate(model)
        state = model.state_dict(gather_to_rank0=True)
        assert (state == {}) if smp.rank() else (list(state) == list(make_net(1).state_dict()))


@on(PP2_DP2, TP2_DP4)
def test_a_state_dict_needs_only_the_ranks_of_one_pipeline():
    model = wrap(make_net(1))
    evaluate(model)
    is_caller = smp.rdp_rank() == 0 if smp.tp_size() > 1 else smp.dp_rank() == 0
    if is_caller:
        torch.testing.assert_close(model.state_dict(), dict(make_net(1).state_dict()), rtol=0, atol=0)
    smp.barrier()


@on(*ALL)
def test_c087_local_state_dicts_say_that_they_are_parts():
    model = wrap(make_net(1))
    before = model.local_state_dict()
    assert before.pop("_smp_is_partial") is True and list(before) == list(make_net(1).state_dict())
    evaluate(model)
    part = model.local_state_dict()
    assert part.pop("_smp_is_partial") is True
    everywhere = smp.allgather(set(part), smp.PP_GROUP)
    assert set().union(*everywhere) == set(make_net(1).state_dict())
    if smp.pp_size() > 1:
        assert all(len(names) < len(make_net(1).state_dict()) for names in everywhere)
    for name, value in part.items():
        assert not value.requires_grad
        if smp.tp_size() > 1 and name.startswith("layers") and "weight" in name:
            assert value.shape == (8, 4)


@on(*ALL)
def test_loading_a_full_dict_before_and_after_the_first_step():
    states = [make_net(seed).state_dict() for seed in (3, 4)]
    model = wrap(make_net(1))
    for state in states:
        result = model.load_state_dict(state)
        assert result.missing_keys == [] and result.unexpected_keys == []
        torch.testing.assert_close(evaluate(model), evaluate_plain(state))
        torch.testing.assert_close(model.state_dict(), dict(state), rtol=0, atol=0)
    model.load_state_dict({**states[0], "_smp_is_partial": False})
    torch.testing.assert_close(model.state_dict(), dict(states[0]), rtol=0, atol=0)
    assert_equal_over(smp.WORLD, model.state_dict())


@on(*ALL)
def test_names_that_do_not_fit():
    model = wrap(make_net(1))
    good = make_net(3).state_dict()
    short = {name: value for name, value in good.items() if name != "layers.0.weight"}
    for is_stepped in (False, True):
        if is_stepped:
            evaluate(model)
        for state in ({**short, "other": torch.zeros(1)}, {**short, "other": torch.zeros(1), "_smp_is_partial": False}):
            with pytest.raises(RuntimeError, match=r"missing \['layers\.0\.weight'\]; unexpected \['other'\]"):
                model.load_state_dict(state)
            result = model.load_state_dict(state, strict=False)
            assert result.missing_keys == ["layers.0.weight"] and result.unexpected_keys == ["other"]
        loaded = model.state_dict()
        torch.testing.assert_close(loaded["layers.1.weight"], good["layers.1.weight"], rtol=0, atol=0)
        torch.testing.assert_close(loaded["layers.0.weight"], make_net(1).layers[0].weight.detach(), rtol=0, atol=0)
        if smp.tp_size() > 1:
            with pytest.raises(RuntimeError, match=r"'layers\.0\.weight' has shape \(8, 7\), the model has \(8, 8\)"):
                model.load_state_dict({**good, "layers.0.weight": torch.zeros(8, 7)})


@on(*SPLIT)
def test_loading_parts_before_and_after_the_first_step():
    source = wrap(make_net(3))
    evaluate(source)
    part, whole = source.local_state_dict(), source.state_dict()
    for is_stepped in (False, True):
        for is_same in (False, True):
            model = wrap(make_net(1))
            if is_stepped:
                evaluate(model)
            model.load_state_dict(part, same_partition_load=is_same)
            assert part["_smp_is_partial"] is True, "the caller's dict is untouched"
            torch.testing.assert_close(evaluate(model), evaluate_plain(whole))
            torch.testing.assert_close(model.state_dict(), whole, rtol=0, atol=0)


@on(PP2)
def test_a_part_of_another_partition_is_noticed():
    source = wrap(make_net(3))
    evaluate(source)
    part = source.local_state_dict()
    name = next(name for name in part if name.startswith(("layers", "norm")))
    del part[name]
    model = wrap(make_net(1))
    model.load_state_dict(part, same_partition_load=True)
    with pytest.raises(RuntimeError, match=r"(?s)pp_rank \d was given a partial state dict.*the partition has changed"):
        evaluate(model)


@on(*SPLIT)
def test_training_goes_on_from_a_state_dict_to_the_bit():
    ids = torch.arange(8)

    def train(model, optimizer, num_steps):
        losses = []
        for _ in range(num_steps):
            optimizer.zero_grad()
            losses.append(train_step(model.train(), ids).reduce_mean().item())
            optimizer.step()
        return losses

    model = wrap(make_net(1))
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))
    train(model, optimizer, 2)
    saved = {
        "full": (model.state_dict(), optimizer.state_dict()),
        "partial": (model.local_state_dict(), optimizer.local_state_dict()),
    }
    saved = {key: tuple(_copied(part) for part in parts) for key, parts in saved.items()}
    expected = train(model, optimizer, 2), model.state_dict(), optimizer.state_dict()
    for model_state, optimizer_state in saved.values():
        for is_stepped in (False, True):
            other = wrap(make_net(7))
            other_optimizer = smp.DistributedOptimizer(torch.optim.Adam(other.parameters(), lr=0.5))
            if is_stepped:
                train(other, other_optimizer, 1)
            other.load_state_dict(model_state)
            other_optimizer.load_state_dict(_copied(optimizer_state))  # torch keeps the tensors that it is given
            assert other_optimizer.param_groups[0]["lr"] == 0.01, "at once, also before the partition"
            actual = train(other, other_optimizer, 2), other.state_dict(), other_optimizer.state_dict()
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


@on(*SPLIT)
def test_merged_optimizer_states_are_those_of_one_process():
    ids = torch.arange(8)
    model, plain = wrap(make_net(1)), make_net(1)
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        train_step(model, ids)
        optimizer.step()
        plain_optimizer.zero_grad()
        num_microbatches = smp.num_microbatches()
        for part in ids.chunk(num_microbatches):
            (F.cross_entropy(plain(part), part) / num_microbatches).backward()
        plain_optimizer.step()
    state, expected = optimizer.state_dict(), plain_optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [list(range(len(list(plain.parameters()))))]
    assert list(state["state"]) == list(expected["state"])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        actual = {str(index): values[key] for index, values in state["state"].items()}
        assert_parity(actual, {str(i): values[key] for i, values in expected["state"].items()}, dtype=torch.float64)
    plain_optimizer.load_state_dict(state)  # plain torch takes it
    assert_equal_over(smp.WORLD, state["state"][0])
