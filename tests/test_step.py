"""smp.step and StepOutput: what a body sees, what a call returns (smp-api section 4)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modelparallel as smp
from distributed_run import assert_equal_over, distributed_run, merged_gradients
from modelparallel.errors import StepUsageError
from parity import assert_parity, assert_same_training, reference_run
from rank_tests import RankTests, on
from small_models import Classifier, make_batch, make_classifier, mean_loss, train_step
from training import sgd

MB4 = RankTests(1, {"microbatches": 4})
PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4})
SINGLE = RankTests(1, {})
DP2 = RankTests(2, {"microbatches": 3})
PP2_DP2 = RankTests(4, {"pipeline_parallel_degree": 2, "microbatches": 3})
STRICT = RankTests(1, {"microbatches": 4, "uneven_microbatches": "error"})
STRICT_PP2 = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4, "uneven_microbatches": "error"})
SIMPLE = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4, "pipeline": "simple"})
ZERO_BUBBLE = RankTests(2, {"pipeline_parallel_degree": 2, "microbatches": 4, "pipeline": "zero_bubble"})
ALL = (MB4, PP2)
SCHEDULES = (MB4, PP2, SIMPLE, ZERO_BUBBLE)  # the default is interleaved


def shape(tensor: torch.Tensor) -> str:
    """As text, since a tuple of numbers would come back from a step as a tuple of lists."""
    return "x".join(str(length) for length in tensor.shape)


@on(*ALL)
def test_c018_the_body_sees_each_quarter_of_the_batch_in_order():
    seen = []

    @smp.step
    def body(images, labels):
        if not smp.is_tracing():
            seen.append((images.clone(), labels.clone()))
        return images.mean()

    images, labels = torch.arange(64.0 * 3).reshape(64, 3), torch.arange(64)
    output = body(images, labels)
    assert len(seen) == 4 and len(output.outputs) == 4
    for index, (part, part_labels) in enumerate(seen):
        torch.testing.assert_close(part, images[16 * index : 16 * index + 16], rtol=0, atol=0)
        assert part_labels.tolist() == list(range(16 * index, 16 * index + 16))
        torch.testing.assert_close(output.outputs[index], part.mean(), rtol=0, atol=0)
        assert output.outputs[index].shape == ()


@on(*ALL)
def test_c019_the_decorator_without_parentheses_gives_step_outputs():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(64)
    output, loss = train_step(model, x, y)
    assert isinstance(output, smp.StepOutput) and isinstance(loss, smp.StepOutput)
    expected = make_classifier()(x)
    torch.testing.assert_close(output.concat(), expected)
    assert output.stack().shape == (4, 16, 10)
    torch.testing.assert_close(output.stack().flatten(0, 1), expected)


@on(*ALL)
def test_c020_reduce_mean_of_equal_microbatches_is_the_loss_of_the_batch():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(64)
    _, loss = train_step(model, x, y)
    torch.testing.assert_close(loss.reduce_mean(), torch.stack(loss.outputs).mean())
    torch.testing.assert_close(loss.reduce_mean(), mean_loss(make_classifier(), x, y))
    torch.testing.assert_close(loss.reduce_sum(), 4 * loss.reduce_mean())


@on(SINGLE)
def test_c021_without_microbatches_the_body_runs_once():
    calls = []

    @smp.step
    def body(x):
        calls.append(x)
        return x.sum()

    x = torch.randn(6, 3)
    assert len(body(x).outputs) == 1 and len(calls) == 1
    assert calls[0].shape == x.shape
    assert smp.num_microbatches() == 1


@on(*ALL)
def test_c022_split_axes_and_whole_arguments_by_position_and_by_keyword():
    @smp.step(input_split_axes={"x": 1}, non_split_inputs=["mask"])
    def body(x, mask, y=None):
        return shape(x), shape(mask), None if y is None else shape(y)

    x, mask, y = torch.zeros(3, 8), torch.zeros(5, 7), torch.zeros(8, 2)
    for output in (body(x, mask, y), body(x, mask=mask, y=y), body(mask=mask, y=y, x=x)):
        assert output == (["3x2"] * 4, ["5x7"] * 4, ["2x2"] * 4), output
    assert body(x, mask) == (["3x2"] * 4, ["5x7"] * 4, [None] * 4)

    @smp.step(non_split_inputs=["nested"], input_split_axes={"pairs": -1})
    def nested(nested, pairs):
        return shape(nested["a"][0]), shape(pairs[0])

    assert nested({"a": [torch.zeros(3)]}, (torch.zeros(2, 12),)) == (["3"] * 4, ["2x3"] * 4)


class Batch(OrderedDict):
    """A user's dictionary class."""


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


@dataclass
class Sample:
    image: torch.Tensor
    label: int


@on(*ALL)
def test_c023_containers_are_split_leaf_by_leaf_and_keep_their_types():
    marker = object()
    kinds = []

    @smp.step
    def body(batch, other, text):
        kinds.append((type(batch), type(batch["pair"]), type(batch["sample"]), type(other)))
        assert batch["number"] == 5 and other["marker"] is marker and text == "abcd"
        assert batch["objects"] == ["p", "q", "r", "s"], "a list of objects is not cut up"
        assert batch["pair"].right == (1.5, None)
        return batch["list"][0].sum() + batch["list"][1].sum(), len(batch["list"][0]), batch["sample"].image.sum()

    values = torch.arange(8.0)
    batch = Batch(
        list=[values, values.reshape(8, 1) * 10],
        number=5,
        objects=["p", "q", "r", "s"],
        pair=Pair(values, (1.5, None)),
        sample=Sample(values * 2, 3),
    )
    total, lengths, images = body(batch, {"marker": marker}, "abcd")
    assert lengths == [2] * 4
    assert [float(value) for value in total.outputs] == [11.0 * (4 * index + 1) for index in range(4)]
    assert [float(value) for value in images.outputs] == [2.0 * (4 * index + 1) for index in range(4)]
    assert set(kinds) == {(Batch, Pair, Sample, dict)}
    assert type(batch) is Batch and batch["list"][0] is values, "the caller's batch is untouched"


class Slicing:
    """Splits itself, as detection batches do."""

    def __init__(self, items):
        self.items = items
        self.calls = []

    def smp_slice(self, num_mb, mb, axis):
        self.calls.append((num_mb, mb, axis))
        return ["slice", mb, "".join(self.items[mb::num_mb])]


@on(*ALL)
def test_c024_smp_slice_is_asked_for_each_microbatch():
    @smp.step
    def body(images, nested):
        assert nested["boxes"][0] == "slice"
        return images[1], images[2]

    images = Slicing("abcdefghi")
    numbers, items = body(images, {"boxes": Slicing("xyz")})
    assert numbers == [0, 1, 2, 3] and items == ["aei", "bf", "cg", "dh"]
    if smp.pp_rank() == 0:
        assert images.calls == [(4, 0, 0), (4, 1, 0), (4, 2, 0), (4, 3, 0)]


@on(*SCHEDULES)
def test_c025_scalars_come_back_as_lists_and_model_outputs_as_themselves():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)

    @smp.step
    def numbers(model, x, y):
        loss = mean_loss(model, x, y)
        assert isinstance(loss.item(), float)
        return loss.item(), (model(x).argmax(1) == y).sum().item(), {"name": "a"}, None

    plain = make_classifier()
    expected = [float(mean_loss(plain, x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2])) for i in range(4)]
    for _ in range(3):  # the later ones are planned
        with torch.no_grad():
            losses, correct, named, nothing = numbers(model, x, y)
        assert losses == pytest.approx(expected, rel=1e-12)
    assert type(losses) is list and losses == pytest.approx(expected, rel=1e-12)
    assert type(correct) is list and all(type(value) is int for value in correct) and len(correct) == 4
    assert named == {"name": ["a"] * 4} and nothing == [None] * 4
    assert_equal_over(smp.WORLD, (losses, correct))


@on(*SCHEDULES)
def test_c025_hugging_face_outputs_keep_type_and_keys():
    from transformers.modeling_outputs import CausalLMOutputWithPast

    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(8)

    def output_of(logits, y):
        cache: Any = {"past_key_values": ((logits, logits),)}
        return CausalLMOutputWithPast(loss=F.nll_loss(logits, y), logits=logits, **cache)

    @smp.step
    def outputs(model, x, y):
        return output_of(model(x), y)

    for _ in range(3):  # the later ones are planned
        output = outputs(model, x, y)
        torch.testing.assert_close(output.loss.reduce_mean(), F.nll_loss(make_classifier()(x), y).detach())
    assert isinstance(output["loss"], smp.StepOutput) and output.loss is output["loss"]
    assert type(output) is CausalLMOutputWithPast and isinstance(output, dict)
    names = list(output_of(make_classifier()(x), y).keys())  # transformers 5.24 has another one for the cache
    assert list(output.keys()) == names and len(names) == 3
    assert isinstance(output["past_key_values"], tuple) and isinstance(output["past_key_values"][0], tuple)
    torch.testing.assert_close(output["logits"].concat(), make_classifier()(x).detach())
    torch.testing.assert_close(output["past_key_values"][0][1].concat(), make_classifier()(x).detach())


@on(*ALL)
def test_c026_returned_tensors_are_detached_unless_told_otherwise():
    def body(model, x):
        output = model(x)
        return output, [output * 2, {"again": output}]

    model = smp.DistributedModel(make_classifier())
    x, _ = make_batch(8)
    output, (doubled, named) = smp.step(body)(model, x)
    for value in (*output.outputs, *doubled.outputs, *named["again"].outputs):
        assert not value.requires_grad
    output, (doubled, named) = smp.step(detach_outputs=False)(body)(model, x)
    for value in (*output.outputs, *doubled.outputs, *named["again"].outputs):
        assert value.requires_grad
    torch.testing.assert_close(doubled.concat(), 2 * output.concat())
    if smp.pp_size() == 1:
        output.concat().sum().backward()
        assert model.get_module().first.weight.grad is not None


@on(*ALL)
def test_c027_a_step_output_can_be_detached_joined_and_moved():
    model = smp.DistributedModel(make_classifier())
    x, _ = make_batch(8)
    output = smp.step(detach_outputs=False)(lambda model, x: model(x))(model, x)
    joined = output.detach().concat().cpu()
    assert not joined.requires_grad and joined.device.type == "cpu"
    torch.testing.assert_close(joined, make_classifier()(x).detach())
    assert isinstance(output.detach(), smp.StepOutput) and output.outputs[0].requires_grad


@pytest.mark.parametrize("num_samples", [10, 7, 2])
def test_c028_reference_of_uneven_batches_is_the_whole_batch(num_samples):
    x, y = make_batch(num_samples)
    whole = reference_run(make_classifier, [(x, y)], mean_loss, make_optimizer=sgd)
    cut = reference_run(make_classifier, [(x, y)], mean_loss, make_optimizer=sgd, num_microbatches=4)
    assert_parity(cut.gradients, whole.gradients, dtype=torch.float64)


@on(*SCHEDULES)
def test_c028_uneven_batches_are_exact():
    """9 to 1 samples in 4 microbatches, in one run: gradients, losses and weights are those of the whole batches."""
    batches = [make_batch(num_samples, seed=num_samples) for num_samples in (9, 10, 11, 7, 3, 1, 8)]
    expected = reference_run(make_classifier, batches, mean_loss, make_optimizer=sgd)
    actual = distributed_run(make_classifier, batches, mean_loss, make_optimizer=sgd)
    assert_same_training(actual, expected, dtype=torch.float64)


@on(DP2, PP2_DP2)
def test_c028_uneven_batches_are_exact_with_data_parallelism():
    """The copies' losses count alike, also where one has fewer samples than microbatches and the other has not."""
    sizes = [(4, 4), (5, 5), (2, 2), (1, 1), (2, 2), (7, 7)]
    batches = [make_batch(sum(pair), seed=index) for index, pair in enumerate(sizes)]
    expected = reference_run(make_classifier, batches, mean_loss, make_optimizer=sgd, num_copies=2)
    actual = distributed_run(make_classifier, batches, mean_loss, make_optimizer=sgd)
    assert_same_training(actual, expected, dtype=torch.float64)


@on(DP2, PP2_DP2)
def test_c028_copies_with_different_numbers_of_samples():
    """As with DDP, gradients are averaged over the copies; one has 2 samples for 3 microbatches, the other 5."""
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(7)
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    train_step(model, *parts[smp.dp_rank()])
    plain = make_classifier()
    (sum(mean_loss(plain, *part) for part in parts) / 2).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert_parity(merged_gradients(model), expected, dtype=torch.float64)


@on(*ALL)
def test_c028_microbatches_of_different_sizes_are_weighted_in_the_mean():
    @smp.step
    def body(x):
        return x.mean(), x, len(x)

    x = torch.arange(10.0, dtype=torch.float64)
    mean, values, sizes = body(x)
    assert sizes == [3, 3, 2, 2]
    torch.testing.assert_close(mean.reduce_mean(), x.mean())
    torch.testing.assert_close(values.concat(), x)
    mean, values, sizes = body(x[:2])
    assert sizes == [1, 1] and len(values.outputs) == 2
    torch.testing.assert_close(mean.reduce_mean(), x[:2].mean())


@on(STRICT, STRICT_PP2)
def test_c028_in_error_mode_a_batch_that_does_not_divide_stops():
    @smp.step
    def body(images, mask):
        return images.sum()

    with pytest.raises(StepUsageError, match=r"'images' has length 10.*microbatches=4"):
        body(torch.zeros(10, 2), torch.zeros(4))
    with pytest.raises(StepUsageError, match=r"'mask' has length 3.*microbatches=4"):
        body(torch.zeros(8, 2), [torch.zeros(4), torch.zeros(3)])
    assert body(torch.ones(8, 2), torch.zeros(4)).reduce_sum() == 16


@on(*ALL)
def test_c028_unclear_and_empty_batches_stop_with_their_names():
    @smp.step
    def body(images, mask):
        return images.sum()

    with pytest.raises(StepUsageError, match=r"'images' has length 10 and argument 'mask' has length 3"):
        body(torch.zeros(10, 2), torch.zeros(3))
    with pytest.raises(StepUsageError, match=r"'mask' has an empty batch"):
        body(torch.zeros(4), torch.zeros(0))
    assert body(torch.ones(4), torch.tensor(3.0)).reduce_sum() == 4, "tensors without dimensions are not split"


def placeholder_or(batch: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Real data on pp_rank 0, samples without content on the others, as the example scripts' loaders give them."""
    if smp.pp_rank() == 0:
        return batch
    return tuple(torch.empty(len(value), 0) for value in batch)


@on(PP2, PP2_DP2)
def test_c029_only_the_inputs_of_pp_rank_0_count():
    results = []
    for is_real in (True, False):
        model = smp.DistributedModel(make_classifier())
        batch = make_batch(12, seed=smp.dp_rank())
        _, loss = train_step(model, *(batch if is_real else placeholder_or(batch)))
        results.append((loss.outputs, merged_gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@on(PP2)
def test_c029_other_numbers_strings_and_containers_on_later_stages_are_ignored():
    @smp.step
    def body(number, text, values, flag, module):
        module.eval()
        return number, text, values["x"].sum(), flag, values["dtype"]

    module = nn.Linear(1, 1)
    if smp.pp_rank() == 0:
        arguments = (3, "real", {"x": torch.ones(4), "dtype": torch.float16}, True, module)
    else:
        arguments = (7, "no", {"x": torch.zeros(4, 0), "dtype": torch.float32}, None, module)
    number, text, total, flag, dtype = body(*arguments)
    assert number == [3] * 4 and text == ["real"] * 4 and flag == [True] * 4 and dtype == [torch.float16] * 4
    assert total.reduce_sum() == 4 and not module.training


@on(PP2, PP2_DP2)
def test_c030_outputs_are_equal_on_all_ranks_of_a_pipeline():
    model = smp.DistributedModel(make_classifier())
    x, y = make_batch(12, seed=smp.dp_rank())

    @smp.step
    def body(model, x, y):
        hidden = model.module.first(x)  # lives on the first stage, the loss on the last
        output = model(x)
        loss = F.nll_loss(output, y)
        model.backward(loss)
        return {
            "hidden": hidden,
            "output": output,
            "loss": loss,
            "x": x,
            "half": output.half(),
            "right": output.argmax(1) == y,
            "large": output.repeat(1, 3000),
        }

    result = body(model, x, y)
    values = {name: value.outputs for name, value in result.items()}
    assert_equal_over(smp.PP_GROUP, values)
    plain = make_classifier()
    torch.testing.assert_close(result["hidden"].concat(), plain.first(x).detach())
    torch.testing.assert_close(result["output"].concat(), plain(x).detach())
    torch.testing.assert_close(result["x"].concat(), x, rtol=0, atol=0)
    assert result["large"].outputs[0].shape[1] == 30000
    assert result["half"].outputs[0].dtype == torch.float16 and result["right"].outputs[0].dtype == torch.bool


@on(*ALL)
def test_c031_evaluation_between_training_steps_leaves_no_trace():
    @smp.step
    def eval_step(model, x, y):
        output = model(x)
        assert not torch.is_grad_enabled() and not output.requires_grad
        return output, mean_loss(model, x, y)

    runs = []
    for does_evaluate in (False, True):
        model = smp.DistributedModel(make_classifier())
        optimizer = smp.DistributedOptimizer(sgd(model.parameters()))
        for step in range(3):
            model.train()
            optimizer.zero_grad()
            train_step(model, *make_batch(8, seed=step))
            if does_evaluate:
                before = merged_gradients(model)
                model.eval()
                with torch.no_grad():
                    for num_samples in (8, 5):
                        _check_evaluation(model, eval_step, *make_batch(num_samples, seed=99))
                torch.testing.assert_close(merged_gradients(model), before, rtol=0, atol=0)
            optimizer.step()
        runs.append(model.state_dict())
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def _check_evaluation(model, eval_step, x, y) -> None:
    output, loss = eval_step(model, x, y)
    plain = Classifier().double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(output.concat(), plain(x).detach())
    torch.testing.assert_close(loss.reduce_mean(), mean_loss(plain, x, y).detach())
