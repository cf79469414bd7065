"""Runs of train.py on hosts, and what they must have printed."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clusters.hosts import Host

SCRIPT = Path(__file__).with_name("train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PATIENCE = 600.0


def losses_of(text: str) -> list[float]:
    """The losses that a run of train.py has printed."""
    return [float(found) for found in re.findall(r"step \d+ loss ([-+.\deinfa]+)", text)]


@functools.cache
def losses_of_one_process() -> list[float]:
    """Those that every run has to have."""
    environ = Host("", "", "", Path("/"), None, None).environ({"TMPDIR": None})
    result = subprocess.run([sys.executable, SCRIPT], env=environ, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout + result.stderr
    return losses_of(result.stdout)


def check_losses(text: str) -> None:
    """A run has printed the losses of one process, to 1e-9."""
    found, wanted = losses_of(text), losses_of_one_process()
    assert len(found) == len(wanted) == 3, text
    assert all(abs(one - other) <= 1e-9 for one, other in zip(found, wanted, strict=True)), (found, wanted)


def start_torchrun(
    hosts: Sequence[Host],
    arguments: Sequence[str],
    folder: Path,
    *,
    master: str = "",
    port: int = 29500,
    counts: Sequence[int] = (),
    options: Sequence[str] = (),
    script: Path = SCRIPT,
    environ: Mapping[str, str | None] | None = None,
) -> list[tuple[subprocess.Popen[str], Path]]:
    """An agent of torchrun on each host, with its log: ``counts`` processes on each, 1 by default; ``options`` in the
    place of the static rendezvous.
    """
    started = []
    for number, host in enumerate(hosts):
        static = {"node-rank": number, "master-addr": master or hosts[0].address, "master-port": port}
        rendezvous = options or [f"--{name}={value}" for name, value in static.items()]
        log = folder / f"{host.name}.log"
        command: list[Any] = [*TORCHRUN, f"--nnodes={len(hosts)}", f"--nproc-per-node={(*counts, *[1] * 9)[number]}"]
        started.append((host.start([*command, *rendezvous, script, *arguments], log=log, environ=environ), log))
    return started


def ends_of(started: Sequence[tuple[subprocess.Popen[str], Path]], seconds: float = PATIENCE) -> list[tuple[int, str]]:
    """Wait for processes with logs; the exit code and output of each."""
    return [(process.wait(seconds), log.read_text()) for process, log in started]


def check_run(started: Sequence[tuple[subprocess.Popen[str], Path]]) -> str:
    """All end well, and the losses are right. Returns what they have printed."""
    ends = ends_of(started)
    text = "\n".join(f"--- {code}\n{output}" for code, output in ends)
    assert all(code == 0 for code, _ in ends), text
    assert "terminate called" not in text, text
    check_losses(text)
    return text
