"""Parity with one process: the assertion behind most tests.

Criterion. float64: the norm of the difference of every tensor is at most ``1e-9 * max(norm of the expected tensor,
1e-6 * global norm)``. float32 and below: at most a relative 1e-5 for each tensor (with the same floor: a gradient that
is zero in theory has no relative error worth comparing) and for all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5
FLOOR = 1e-6


@dataclass
class ReferenceResult:
    """A run of the plain model in one process.

    losses: one number per step, the sample-weighted mean over the microbatches.
    gradients: of the first step, by parameter name, as the optimizer saw them.
    weights: parameters and buffers after the last step, by name.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def assert_parity(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Both mappings have the same names, shapes and, by the criterion above for ``dtype``, values."""
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    assert not missing and not extra, f"names differ: missing {missing[:5]}, not expected {extra[:5]}"
    for name, tensor in expected.items():
        shapes = tuple(actual[name].shape), tuple(tensor.shape)
        assert shapes[0] == shapes[1], f"{name}: shape {shapes[0]}, expected {shapes[1]}"
        assert bool(torch.isfinite(actual[name]).all()), f"{name}: holds values that are not finite"
    pairs = {name: (actual[name].detach().double(), expected[name].detach().double()) for name in expected}
    global_norm = float(torch.tensor([float(b.norm()) for _, b in pairs.values()], dtype=torch.float64).norm())
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE
    excess: dict[str, float] = {}
    total = 0.0
    for name, (a, b) in pairs.items():
        difference = float((a - b).norm())
        total += difference**2
        excess[name] = difference / (tolerance * max(float(b.norm()), FLOOR * global_norm, 1e-300))
    _assert_all_below_one(excess, pairs)
    overall = total**0.5 / max(global_norm, 1e-300)
    assert overall <= tolerance, f"all tensors together differ by {overall:.3g}, allowed {tolerance:g}"


def _assert_all_below_one(excess: dict[str, float], pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    if not excess:
        return
    worst = max(excess, key=lambda name: excess[name])
    if excess[worst] <= 1.0:
        return
    a, b = pairs[worst]
    bad = [name for name in excess if excess[name] > 1.0]
    where = int((a - b).abs().argmax())
    norm, expected_norm = float(a.norm()), float(b.norm())
    raise AssertionError(
        f"{len(bad)} of {len(pairs)} differ; the worst is {worst!r} {tuple(b.shape)}: {excess[worst]:.3g} times "
        f"the allowed difference. Norms: {norm:.9g}, expected {expected_norm:.9g}, ratio "
        f"{norm / max(expected_norm, 1e-300):.6g}. At flat index {where}: {float(a.flatten()[where]):.12g}, expected "
        f"{float(b.flatten()[where]):.12g}. Differing: {bad[:8]}"
    )


def assert_same_training(actual: ReferenceResult, expected: ReferenceResult, *, dtype: torch.dtype) -> None:
    """Losses, first gradients and last weights are equal; losses to more digits than the rest."""
    tolerance = 1e-12 if dtype == torch.float64 else FLOAT32_TOLERANCE
    assert len(actual.losses) == len(expected.losses), (actual.losses, expected.losses)
    for step, (loss, other) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        assert abs(loss - other) <= max(tolerance * abs(other), 1e-12), f"step {step}: loss {loss}, expected {other}"
    assert_parity(actual.gradients, expected.gradients, dtype=dtype)
    assert_parity(actual.weights, expected.weights, dtype=dtype)


def assert_ranks_train_as_one(
    ranks: Sequence[tuple[list[float], dict[str, Tensor], dict[str, Tensor]]],
    expected: ReferenceResult,
    *,
    dtype: torch.dtype,
) -> None:
    """Each rank has the gradients and weights of one process, and the ranks' losses have the mean of its losses."""
    for _, gradients, weights in ranks:
        assert_parity(gradients, expected.gradients, dtype=dtype)
        assert_parity(weights, expected.weights, dtype=dtype)
    losses = torch.tensor([losses for losses, _, _ in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected.losses))


def reference_run(
    make_model: Callable[[], nn.Module],
    batches: Sequence[tuple[Any, ...]],
    body: Callable[..., Tensor],
    *,
    num_microbatches: int = 1,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    num_steps: int | None = None,
    num_copies: int = 1,
) -> ReferenceResult:
    """Train the plain model in this process, microbatch by microbatch.

    make_model: builds the model, seeded by the caller.
    batches: one tuple of arguments per step: tensors are the *union* of the batches of all data-parallel ranks, one
        after another along dim 0, and are split; anything else is passed on.
    body: ``body(model, *microbatch) -> loss``, the mean over the samples of the microbatch.
    num_microbatches: per rank, as the configuration's ``microbatches``; a batch that does not divide is split as
        ``torch.tensor_split`` does and weighted by samples; empty microbatches are skipped.
    num_copies: data-parallel ranks whose batches are joined in ``batches`` (BatchNorm sees microbatches of one).
    num_steps: number of steps; the batches are reused in turn when there are fewer. Default: one step per batch.
    """
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(len(batches) if num_steps is None else num_steps):
        batch = batches[step % len(batches)]
        num_samples = next(argument.shape[0] for argument in batch if isinstance(argument, Tensor) and argument.ndim)
        optimizer.zero_grad()
        mean = 0.0
        for microbatch in _microbatches(batch, num_copies, num_microbatches):
            share = next(item.shape[0] for item in microbatch if isinstance(item, Tensor) and item.ndim) / num_samples
            loss = body(model, *microbatch)
            (loss * share).backward()
            mean += float(loss.detach()) * share
        losses.append(mean)
        if step == 0:
            gradients = {
                name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone())
                for name, parameter in model.named_parameters()
            }
        optimizer.step()
    return ReferenceResult(
        losses, gradients, {name: value.detach().clone() for name, value in model.state_dict().items()}
    )


def _microbatches(batch: tuple[Any, ...], num_copies: int, num_microbatches: int) -> list[tuple[Any, ...]]:
    pieces: list[tuple[Any, ...]] = []
    for copy in range(num_copies):
        for microbatch in range(num_microbatches):
            piece = []
            for argument in batch:
                if isinstance(argument, Tensor) and argument.ndim:
                    own = argument.tensor_split(num_copies)[copy]
                    argument = own.tensor_split(num_microbatches)[microbatch]
                piece.append(argument)
            if all(item.shape[0] for item in piece if isinstance(item, Tensor) and item.ndim):
                pieces.append(tuple(piece))
    return pieces
