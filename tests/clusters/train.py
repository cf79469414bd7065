"""A script that several launchers start on several hosts: trains a small network in float64, and prints the losses.

    python train.py [--pp 2] [--tp 2] [--placement spread] [--steps 3] [--seconds 0.5] [--until FILE] [--timeout 60]
    [--fail RANK:STEP] [--kill RANK:STEP] [--once FILE]

`--seconds`: of a pause after each step; `--until`: after the first step wait until that file exists. `--fail 1:2`: an
exception on global rank 1 in step 2, `--kill 1:2`: SIGKILL; with `--once FILE` only where that file does not exist yet.
The losses are those of one process, whatever the degrees.
"""

import argparse
import os
import signal
import socket
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import modelparallel as smp

parser = argparse.ArgumentParser()
parser.add_argument("--pp", type=int, default=1)
parser.add_argument("--tp", type=int, default=1)
parser.add_argument("--placement", default="cluster")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--until", default="")
parser.add_argument("--timeout", type=float, default=120.0)
parser.add_argument("--fail", default="")
parser.add_argument("--kill", default="")
parser.add_argument("--once", default="")
options = parser.parse_args()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(F.gelu(self.second(F.gelu(self.first(x)))))


def is_due(place: str, number: int) -> bool:
    """Whether rank and step are those of an option, and it is the first time."""
    if place != f"{smp.rank()}:{number}" or (options.once and os.path.exists(options.once)):
        return False
    if options.once:
        open(options.once, "w").close()
    return True


parameters = {
    "pipeline_parallel_degree": options.pp,
    "tensor_parallel_degree": options.tp,
    "microbatches": 2,
    "ddp": True,
    "placement_strategy": options.placement,
    "timeout_seconds": options.timeout,
}
if options.tp > 1:
    parameters["prescaled_batch"] = True
begin = time.monotonic()
try:
    smp.init(parameters)
except Exception:
    print(f"failed after {time.monotonic() - begin:.1f} s", flush=True)
    raise
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
net = Net()
if options.tp > 1:
    smp.set_tensor_parallelism(net.second, True)
model = smp.DistributedModel(net)
optimizer = smp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))


@smp.step
def step(model, x, y):
    loss = F.cross_entropy(model(x), y)
    model.backward(loss)
    return loss


generator = torch.Generator().manual_seed(7)
x, y = torch.randn(64, 16, generator=generator), torch.randint(0, 8, (64,), generator=generator)
num_copies = smp.rdp_size()
x, y = x[smp.rdp_rank() :: num_copies], y[smp.rdp_rank() :: num_copies]
print(
    f"{socket.gethostname()} rank {smp.rank()} of {smp.size()} local {smp.local_rank()} of {smp.local_size()} "
    f"interface {os.environ.get('GLOO_SOCKET_IFNAME')} {os.environ.get('NCCL_SOCKET_IFNAME')}",
    flush=True,
)
for number in range(options.steps):
    if is_due(options.fail, number):
        raise ValueError("deliberate failure of the script")
    if is_due(options.kill, number):
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    loss = step(model, x, y).reduce_mean().clone()
    optimizer.step()
    if num_copies > 1:
        dist.all_reduce(loss, group=smp.get_rdp_process_group())
        loss /= num_copies
    if smp.rank() == 0:
        print(f"step {number} loss {loss.item():.14f}", flush=True)
    time.sleep(options.seconds)
    while options.until and not os.path.exists(options.until):
        time.sleep(0.1)
print(f"rank {smp.rank()} done", flush=True)
