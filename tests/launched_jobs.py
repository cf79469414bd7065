"""Jobs of the launcher, for tests that start some, and the processes that they leave."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

from modelparallel.launch import JobSpec
from modelparallel.launch.folder import JobFolder

MPI_OPTIONS = {
    "enabled": True,
    "processes_per_host": 8,
    "custom_mpi_options": "--mca btl_vader_single_copy_mechanism none ",
}
# The launcher's command line, where the package may not be installed.
COMMAND = "import sys; from modelparallel.launch.command_line import app; sys.argv[0] = 'modelparallel'; app()"


def seed_distribution(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"smdistributed": {"modelparallel": {"enabled": True, "parameters": parameters}}, "mpi": MPI_OPTIONS}


def write_script(tmp_path: Path, text: str, name: str = "train.py") -> Path:
    path = tmp_path / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def job_of(tmp_path: Path, script: Path, **settings: Any) -> JobSpec:
    """A job whose processes do not import torch: no rehearsal is started for device cuda."""
    settings = {"num_processes": 2, "backend": "elastic", "device": "cuda", "working_directory": tmp_path, **settings}
    return JobSpec(name="test", script=script, source_dir=script.parent, folder=JobFolder(tmp_path / "job"), **settings)


def processes_with(mark: str) -> list[int]:
    """Pids whose environment has the text; this process is not among them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes() and "Z" not in (entry / "stat").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


LEAVES_CHILDREN = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print("ready", flush=True)
    time.sleep(60)
"""
