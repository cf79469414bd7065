"""A training job to be killed: it goes on from its newest checkpoint, checks what it got, and saves after each step.

The state is a function of the number of steps: every parameter has grown by that number, and every entry of the
optimizer's state equals it. So a mixture of two steps, or a part that was not read, shows in any shape of the job.
Numbers are multiples of 2^-10, so that sums are exact.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import modelparallel as smp
from modelparallel.errors import CheckpointNotFoundError
from modelparallel.job import session
from training import square_step

WIDTH, NUM_LAYERS = 192, 6
#: Seconds that the ranks wait for each other.
WAIT = 8


@dataclass(frozen=True)
class Shape:
    """A shape of the job."""

    name: str
    num_ranks: int
    parameters: dict[str, Any] = field(default_factory=dict)


PP2 = Shape("pp2", 2, {"pipeline_parallel_degree": 2, "microbatches": 2})
TP2 = Shape("tp2", 2, {"tensor_parallel_degree": 2})
SHARDED = Shape(
    "sharded", 2,
    {"sharded_data_parallel_degree": 2, "sdp_param_persistence_threshold": 0, "sdp_gradient_clipping": 1e6},
)  # fmt: skip
SHARED_OUT = Shape("shared-out", 2, {"shard_optimizer_state": True})
PP2_DP2 = Shape("pp2-dp2", 4, {"pipeline_parallel_degree": 2, "microbatches": 2})


@dataclass(frozen=True)
class Life:
    """What one start of the job does. ``kind``: "blocking", "background" or "full" checkpoints. ``tag``: of all of
    them, "" for one of each step; of which ``num_kept`` stay. ``num_saves``: it ends after so many; None: never.
    """

    folder: str
    shape: Shape
    kind: str
    tag: str = ""
    num_kept: int | None = None
    num_saves: int | None = None


class Counting(torch.optim.Optimizer):
    """Adds one to every parameter and every entry of its state."""

    is_elementwise = True

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Local."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            state = self.state[parameter]
            if not state:
                state.update(step=torch.zeros(()), sum=torch.zeros_like(parameter), more=torch.zeros_like(parameter))
            for tensor in (parameter, *state.values()):
                tensor.add_(1)


def make_net() -> nn.Sequential:
    torch.manual_seed(5)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((parameter * 1024).round() / 1024)
    return net


class Job:
    """The model and its optimizer, on one rank."""

    def __init__(self, life: Life) -> None:
        self.life = life
        net = make_net()
        self.start = {name: value.clone() for name, value in net.state_dict().items()}
        if smp.tp_size() > 1:
            for layer in list(net)[:-1]:
                smp.set_tensor_parallelism(layer)
        self.model = smp.DistributedModel(net)
        self.optimizer = smp.DistributedOptimizer(Counting(self.model.parameters()))
        self.num_steps = 0

    def backward(self) -> None:
        """The model's work on a batch, without a change of the weights."""
        self.optimizer.zero_grad()
        square_step(self.model, torch.ones(4, WIDTH) / 1024)

    def train(self) -> None:
        self.backward()
        self.optimizer.step()
        self.num_steps += 1

    def resume(self) -> None:
        try:
            if self.life.kind == "full":
                content = smp.resume_from_checkpoint(self.life.folder, partial=False)
            else:
                content = smp.resume_from_checkpoint(self.life.folder, tag="newest-complete")
        except CheckpointNotFoundError:
            return
        self.num_steps = content["step"]

    def check(self) -> None:
        """Everything in model and optimizer is what it was after ``num_steps`` steps, to the bit."""
        count = self.num_steps
        state = self.model.state_dict()
        assert state.keys() >= self.start.keys()
        for name, start in self.start.items():
            assert torch.equal(state[name], start + count), f"{name} is not that of step {count}"
        entries = self.optimizer.state_dict()["state"]
        assert len(entries) == (len(self.start) if count else 0)
        for index, values in entries.items():
            assert values.keys() == {"step", "sum", "more"}
            for name, value in values.items():
                assert torch.all(torch.as_tensor(value) == count), f"'{name}' of {index} is not that of step {count}"

    def save(self) -> None:
        life = self.life
        tag, content = life.tag or f"step{self.num_steps}", {"step": self.num_steps}
        if life.kind == "full":
            smp.save_checkpoint(life.folder, tag, partial=False, user_content=content, full_optimizer=True)
            return
        is_async = life.kind == "background"
        pending = smp.save_checkpoint(
            life.folder, tag, user_content=content, num_kept_partial_checkpoints=life.num_kept, async_save=is_async
        )
        if pending is not None:
            self.train()  # of which the checkpoint must have nothing
            pending.wait()


def live(life: Life, tell: Callable[[str, int], None]) -> None:
    """The job, until it is killed or has saved often enough; ``tell`` is told of each thing done, and the step."""
    job = Job(life)
    tell("load", 0)
    job.resume()
    job.backward()  # a pipeline loads at its first step
    tell("loaded", job.num_steps)
    job.check()
    tell("checked", job.num_steps)
    num_saves = 0
    while life.num_saves is None or num_saves < life.num_saves:
        job.train()
        step = job.num_steps
        tell("save", step)
        job.save()
        tell("saved", step)
        num_saves += 1


def run_rank(life: Life, global_rank: int, store: str, log: str, pipe: Connection) -> None:
    """One rank's process, which ends as a script does: after an error with exit code 1."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    torch.set_num_threads(1)
    num_ranks = life.shape.num_ranks
    os.environ.update(
        RANK=str(global_rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(global_rank), LOCAL_WORLD_SIZE=str(num_ranks)
    )
    code = 0
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, num_ranks), rank=global_rank, world_size=num_ranks,
            timeout=datetime.timedelta(seconds=WAIT),
        )  # fmt: skip
        smp.init({"ddp": True, "timeout_seconds": WAIT, **life.shape.parameters})
        live(life, lambda event, step: pipe.send_bytes(f"{event} {step} {time.monotonic()}".encode()))
    except BaseException:
        traceback.print_exc()
        code = 1
        _end()  # still in the error, as a script is
    else:
        _end()
    os._exit(code)


def _end() -> None:
    """What the interpreter does at its end, in its order."""
    threading._shutdown()  # type: ignore[attr-defined]
    try:
        session.shutdown()
    except BaseException:
        traceback.print_exc()
