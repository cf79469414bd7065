"""A small GPT trained in every combination of axes, sharding, precision and recomputation: a *cell* of the matrix."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modelparallel as smp
from distributed_run import own_device
from half_reference import half_reference_run
from modelparallel.errors import SMPConfigError
from pool import run_ranks

NUM_STEPS = 10
VOCABULARY, WIDTH, LENGTH, HEADS = 40, 32, 12, 4
MICROBATCHES = 2
SAMPLES = 4  # per copy: two for each microbatch
MAX_NORM = 0.5
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 1024.0}


@dataclass(frozen=True)
class Cell:
    """``sharding``: ddp (all copies whole), optimizer (shard_optimizer_state), sdp (sharded data parallelism)."""

    num_ranks: int
    pp: int
    tp: int
    sharding: str
    precision: str
    recomputes: bool

    def __str__(self) -> str:
        recomputation = "recompute" if self.recomputes else "keep"
        return f"{self.num_ranks}p-pp{self.pp}-tp{self.tp}-{self.sharding}-{self.precision}-{recomputation}"

    @property
    def dp(self) -> int:
        return self.num_ranks // self.pp

    @property
    def rdp(self) -> int:
        return self.num_ranks // self.pp // self.tp

    def parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "pipeline_parallel_degree": self.pp,
            "tensor_parallel_degree": self.tp,
            "microbatches": MICROBATCHES,
            "ddp": True,
            "timeout_seconds": 60,
        }
        if self.precision != "fp32":
            parameters[self.precision] = True
        if self.sharding == "optimizer":
            parameters["shard_optimizer_state"] = True
        if self.sharding == "sdp":
            parameters.update(sharded_data_parallel_degree=2, sdp_param_persistence_threshold=64)
            parameters["sdp_gradient_clipping"] = MAX_NORM
        return parameters

    @property
    def refusal(self) -> str | None:
        """Part of the error with which the combination is refused; None: it trains."""
        if self.sharding == "sdp" and self.rdp % 2:
            return "sharded_data_parallel_degree"
        return None


def all_cells() -> list[Cell]:
    axes = itertools.product(
        (4, 8), (1, 2), (1, 2), ("ddp", "optimizer", "sdp"), ("fp32", "bf16", "fp16"), (False, True)
    )
    return [Cell(*values) for values in axes]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.attention(self.first(x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.outer(F.gelu(self.inner(self.second(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_gpt() -> GPT:
    torch.manual_seed(11)
    return GPT()


def make_batches(num_copies: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(12)
    shape = (SAMPLES * num_copies, LENGTH + 1)
    drawn = [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(NUM_STEPS)]
    return [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in drawn]


def loss_of(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


@smp.step
def train_step(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    loss = loss_of(model(tokens), targets)
    model.backward(loss)
    return loss


def train_on_rank(cell: Cell, is_late: bool = False) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and weights; ``is_late``: of a model that is built without storage."""
    with smp.delay_param_initialization(is_late):
        net = make_gpt()
    if cell.tp > 1:
        for block in net.blocks:
            for layer in (block.attention, block.projection, block.inner, block.outer):
                smp.set_tensor_parallelism(layer)
    model = smp.DistributedModel(net)
    if cell.recomputes:
        for block in model.get_module().blocks:
            smp.set_activation_checkpointing(block)
    optimizer = smp.DistributedOptimizer(sgd(model.parameters()), static_loss_scale=LOSS_SCALE[cell.precision])
    losses, norms = [], []
    for batch in make_batches(cell.dp):
        optimizer.zero_grad()
        own = (tensor.tensor_split(cell.dp)[smp.dp_rank()].to(own_device()) for tensor in batch)
        losses.append(float(train_step(model, *own).reduce_mean()))
        if cell.sharding != "sdp":  # which clips by itself
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        if cell.sharding == "sdp":
            norms.append(float(optimizer._global_grad_norm))
    mean = torch.tensor(losses, dtype=torch.float64)
    torch.distributed.all_reduce(mean, group=smp.get_dp_process_group())
    assert smp.allgather(norms, smp.WORLD) == [norms] * smp.size(), "the norm differs between ranks"
    return (mean / cell.dp).tolist(), norms, {name: value.float().cpu() for name, value in model.state_dict().items()}


@functools.cache
def reference(
    precision: str, num_copies: int, device: str = "cpu"
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The same in one process."""
    batches = [tuple(tensor.to(device) for tensor in batch) for batch in make_batches(num_copies)]
    return half_reference_run(
        lambda: make_gpt().to(device), batches, loss_of, dtype=HALF.get(precision, torch.float32), make_optimizer=sgd,
        num_parts=num_copies * MICROBATCHES, loss_scale=LOSS_SCALE[precision], max_norm=MAX_NORM,
    )  # fmt: skip


#: Relative difference of each loss, of each norm, and of each weight, norm by norm. In half precision other orders of
#: the same sums round differently, by 2^-11 and 2^-8, and ten steps carry that on: most into biases, which start at 0.
TOLERANCES = {"fp32": (1e-5, 1e-5, 1e-5), "fp16": (1e-3, 1e-2, 3e-3), "bf16": (8e-3, 5e-2, 2e-2)}


def verify(cell: Cell, device: str = "cpu", **more: Any) -> None:
    """Train the cell and compare it, or see it refused. ``device`` "cuda": all ranks on one GPU, if they are several;
    ``more``: further parameters.
    """
    how: dict[str, Any] = {"parameters": {**cell.parameters(), **more}, "timeout": 120}
    if device == "cuda":
        how["environ"] = {"MODELPARALLEL_DEVICE": "cuda"}
        how["parameters"]["ddp_dist_backend"] = "gloo" if cell.num_ranks > 1 else "auto"
    if cell.refusal is not None:
        try:
            run_ranks(train_on_rank, cell.num_ranks, cell, **how)
        except Exception as error:
            assert isinstance(error.__cause__, SMPConfigError) and cell.refusal in str(error), error
            return
        raise AssertionError(f"{cell} was to be refused")
    results = run_ranks(train_on_rank, cell.num_ranks, cell, **how)
    losses, norms, weights = reference(cell.precision, cell.dp, device)
    for_losses, for_norms, for_weights = TOLERANCES[cell.precision]
    assert losses[-1] < losses[0]
    for own_losses, own_norms, own_weights in results:
        torch.testing.assert_close(own_losses, losses, rtol=for_losses, atol=0)
        torch.testing.assert_close(own_norms, norms, rtol=for_norms, atol=0)
        for name, expected in weights.items():
            difference = float((own_weights[name] - expected.cpu()).norm() / expected.cpu().norm())
            assert difference <= for_weights, f"{name}: {difference:.3g}"
