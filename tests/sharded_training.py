"""Train with sharded parameters and compare with one process; the models and the loop of the sharding tests.

The optimizer is a plain one over the tensors of the shards, as ``smp.DistributedOptimizer`` uses them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import modelparallel as smp
from distributed_run import mean_over_copies, own_share
from modelparallel.comm.ending import let_threads_finish
from modelparallel.model import states as model_states
from parity import ReferenceResult, assert_parity, reference_run
from training import step_of


class TiedGPT(nn.Module):
    """Odd sizes, so that shards are uneven, and a head that is the embedding."""

    def __init__(self, vocabulary: int = 13, hidden: int = 6, num_layers: int = 3, is_tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Parameter(torch.randn(5, hidden) / 4)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        if is_tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.mix = nn.Linear(5, 5)
        self.up = nn.Linear(hidden, 3 * hidden + 1)
        self.down = nn.Linear(3 * hidden + 1, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Awkward(nn.Module):
    """Weights used twice, tied across, frozen, never used, in a batch norm, and (if asked) by some samples only."""

    def __init__(self, is_conditional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.shared = nn.Linear(8, 8)
        self.between = nn.Linear(8, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.partly = nn.Linear(8, 8)
        self.partly.weight.requires_grad_(False)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 12, bias=False)
        self.is_conditional = is_conditional

    def forward(self, tokens: Tensor, use: Tensor) -> Tensor:
        x = self.shared(self.embed(tokens))
        x = self.shared(torch.tanh(self.between(x))) + x
        x = self.batch_norm(x.flatten(0, 1)).view(x.shape)
        x = self.partly(self.frozen(x))
        if not self.is_conditional or use.sum().item() > 0:
            x = x + self.sometimes(x)
        return self.head(x)


def make_gpt(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Tied."""
    torch.manual_seed(2)
    return TiedGPT().to(dtype)


def make_untied_gpt() -> nn.Module:
    torch.manual_seed(2)
    return TiedGPT(is_tied=False).double()


def make_awkward() -> nn.Module:
    torch.manual_seed(3)
    return Awkward().double()


def make_conditional() -> nn.Module:
    torch.manual_seed(3)
    return Awkward(is_conditional=True).double()


def gpt_batches(num_samples: int, num_steps: int = 3) -> list[tuple[Any, ...]]:
    """Of all data-parallel ranks together."""
    generator = torch.Generator().manual_seed(7)
    return [(torch.randint(0, 13, (num_samples, 5), generator=generator),) for _ in range(num_steps)]


def gpt_loss(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def awkward_batches(num_samples: int, num_steps: int = 3) -> list[tuple[Any, ...]]:
    """The first quarter does not use one layer; in step 1 nobody does."""
    result = []
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 12, (num_samples, 5), generator=generator)
        use = torch.ones(num_samples, dtype=torch.long)
        use[: num_samples // 4] = 0
        if step == 1:
            use[:] = 0
        result.append((tokens, use))
    return result


def adam(parameters: Any) -> torch.optim.Optimizer:
    # With an eps far above rounding errors: gradients that are nearly zero would be blown up.
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=0.01, eps=1e-4)


class ShardOptimizer:
    """A plain optimizer over the shards of a model, and over its whole parameters."""

    def __init__(self, model: Any, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.shards = model.gradients.shards
        tensors = []
        for parameter in model.parameters():
            if self.shards.has(parameter):
                tensors.extend(shard.tensor for shard in self.shards.shards_of(parameter))
            else:
                tensors.append(parameter)
        self.optimizer = make_optimizer(tensors)

    def step(self) -> None:
        self.shards.collect_gradients()
        self.optimizer.step()
        self.shards.finish_update()


def train(
    make_model: Callable[[], nn.Module],
    batches: Sequence[tuple[Any, ...]],
    body: Callable[..., Tensor],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    is_plain: bool = False,
    **arguments: Any,
) -> ReferenceResult:
    """As ``distributed_run``. ``is_plain``: without a step function."""
    model = smp.DistributedModel(make_model(), **arguments)
    train_step = step_of(body)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    optimizer = None
    for batch in batches:
        model.zero_grad()
        if is_plain:
            loss = body(model, *own_share(batch))
            loss.backward()
        else:
            loss = train_step(model, *own_share(batch)).reduce_mean()
        losses.append(mean_over_copies(loss))
        gradients = gradients or merged_gradients(model)
        optimizer = optimizer or ShardOptimizer(model, make_optimizer)
        optimizer.step()
    return ReferenceResult(losses, gradients, model.state_dict())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; collective over its mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def updated_tensors(model: Any) -> list[Tensor]:
    """What an optimizer of this rank updates: shards where a parameter is shared out, in the order of the model."""
    shards = model.gradients.shards
    return [
        tensor
        for _, parameter in model.local_named_parameters()
        for tensor in (
            [shard.tensor for shard in shards.shards_of(parameter)] if shards.has(parameter) else [parameter]
        )
    ]


def live_bytes() -> int:
    """Bytes of all tensors that exist in this process, each memory once."""
    let_threads_finish()  # gloo reports a collective first, and lets go of its tensors afterwards
    gc.collect()
    found = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and type(value) is not DTensor:
            try:
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):
                continue
    return sum(found.values())


def merged_gradients(model: Any) -> dict[str, Tensor]:
    """Every gradient by name, un-sharded, un-sliced and from all stages; none counts as zero."""
    local = {}
    for name, parameter in model.local_named_parameters():
        if parameter.grad is not None:
            local[name] = whole(parameter.grad).detach().clone()
        else:
            local[name] = torch.zeros(parameter.shape, dtype=parameter.dtype)
    return model_states.merge(model, smp.allgather((smp.pp_rank(), smp.tp_rank(), local), smp.MP_GROUP))


def check(
    make_model: Callable[[], nn.Module],
    batches: Sequence[tuple[Any, ...]],
    body: Callable[..., Tensor],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    num_microbatches: int | None = None,
    dtype: torch.dtype = torch.float64,
    mark: Callable[[nn.Module], None] = lambda model: None,
    **arguments: Any,
) -> None:
    """Parity with one process, of losses, first gradients and last weights. ``mark``: for tensor parallelism."""
    num_microbatches = smp.num_microbatches() if num_microbatches is None else num_microbatches
    expected = reference_run(
        make_model, batches, body, make_optimizer=make_optimizer, num_microbatches=num_microbatches,
        num_copies=smp.dp_size(),
    )  # fmt: skip

    def make_marked() -> nn.Module:
        model = make_model()
        mark(model)
        return model

    actual = train(make_marked, batches, body, make_optimizer, **arguments)
    losses = (torch.tensor(values, dtype=torch.float64) for values in (actual.losses, expected.losses))
    assert_parity(*({"losses": values} for values in losses), dtype=dtype)
    assert_parity(actual.gradients, expected.gradients, dtype=dtype)
    assert_parity(
        {name: value for name, value in actual.weights.items() if "running" not in name and "num_b" not in name},
        {name: value for name, value in expected.weights.items() if "running" not in name and "num_b" not in name},
        dtype=dtype,
    )
