"""fp16 and bf16 against fp32 on one processor: time of a step, and memory held after an update."""

from __future__ import annotations

import torch

import modelparallel as smp
from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result, plain_result
from bench.models import GPT, GPTSize, language_loss, token_batch
from bench.ranks import run_on_ranks

#: Small: a CPU without units for half precision takes over ten times as long.
SIZE = GPTSize(num_layers=4, hidden=256, num_heads=4)
BATCH = 2
MIB = 2**20
PRECISIONS = ("bf16", "fp16")


@smp.step
def train_step(model: smp.DistributedModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = language_loss(model(ids), targets)
    model.backward(loss)
    return loss


def compare_on_rank(precision: str, num_pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of forward, backward and Adam in half precision with fp32 masters, and of the plain model in fp32."""
    ids, targets = token_batch(SIZE, BATCH)
    torch.manual_seed(0)
    model = smp.DistributedModel(GPT(SIZE))
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-4), static_loss_scale=1024.0)
    torch.manual_seed(0)
    plain = GPT(SIZE)
    update = torch.optim.Adam(plain.parameters(), lr=1e-4)
    losses: tuple[list[float], list[float]] = ([], [])

    def ours() -> None:
        optimizer.zero_grad()
        losses[0].append(float(train_step(model, ids, targets).reduce_mean()))
        optimizer.step()

    def peer() -> None:
        update.zero_grad()
        loss = language_loss(plain(ids), targets)
        loss.backward()
        update.step()
        losses[1].append(float(loss.detach()))

    times = measure_pairs(ours, peer, num_pairs, num_warmup=1)
    # Half precision rounds each sum; a wrong scale of the loss or lost masters would be far off.
    if abs(losses[0][-1] - losses[1][-1]) > 0.05 * losses[1][0]:
        raise RuntimeError(f"{precision} does not train as fp32: losses {losses[0][-1]} and {losses[1][-1]}")
    return times


def memory_on_rank() -> tuple[float, float]:
    """(MiB held after an update: parameters, gradients, masters, moments; growth of the process at its peak)."""
    before = _peak_resident()
    ids, targets = token_batch(SIZE, BATCH)
    torch.manual_seed(0)
    model = smp.DistributedModel(GPT(SIZE))
    optimizer = smp.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-4), static_loss_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        train_step(model, ids, targets)
        optimizer.step()
    held = smp.memory_report(is_local=True).ranks[0].held
    return held / MIB, (_peak_resident() - before) / MIB


def _peak_resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(num_pairs: int) -> list[Result]:
    """Times and memory of both half precisions."""
    results = []
    held, peak = run_on_ranks(memory_on_rank, 1, parameters={})[0]
    for precision in PRECISIONS:
        key = {precision: True}
        ours, peer = run_on_ranks(compare_on_rank, 1, precision, num_pairs, parameters=key)[0]
        results.append(paired_result(f"precision_{precision}_time", "s/step", ours, peer, "reported"))
        half_held, half_peak = run_on_ranks(memory_on_rank, 1, parameters=key)[0]
        results.append(plain_result(f"precision_{precision}_held", "MiB", half_held, 1, "reported", peer=held))
        results.append(plain_result(f"precision_{precision}_peak", "MiB", half_peak, 1, "reported", peer=peak))
    return results


CASES = [
    Case(
        "precision",
        "One process on the CPU, GPT of 4 layers x 256 with Adam: `bf16` and `fp16` (fp32 masters) against fp32. Time "
        "of a step, MiB held after an update, and growth of the process at its peak. A CPU without units for half "
        "precision is slower in it.",
        measure,
    )
]
