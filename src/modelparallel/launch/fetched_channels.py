"""Channels that are URLs, for a job on this machine: their files are fetched before the job starts, and go with it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.transfers import fetch
from modelparallel.launch.node_scratch import SCRATCH_VARIABLE
from modelparallel.launch.spec import JobSpec
from modelparallel.plan.partition import readable_bytes

#: SM_CHANNEL_URL_<NAME>: where the data of a channel were fetched from, or are to be read from (FastFile).
URL_VARIABLE = "SM_CHANNEL_URL_"


def local_channels(job: JobSpec) -> dict[str, Path]:
    """The channels of a job over several hosts. Raises `LaunchError` for a URL, which nobody fetches there."""
    paths = {}
    for name, location in job.channels.items():
        if not isinstance(location, Path):
            raise LaunchError(
                f"channel {name!r}: {location}: with --nnodes give a path that all hosts see; `modelparallel submit` "
                "fetches URLs on each node"
            )
        paths[name] = location
    return paths


@contextmanager
def fetched_channels(job: JobSpec, output: TextIO) -> Iterator[tuple[JobSpec, dict[str, Path]]]:
    """The job with what its script finds in the environment about URLs, and where the data of each channel are here.

    Raises `LaunchError` naming channel, URL and cause.
    """
    with ExitStack() as stack:
        paths: dict[str, Path] = {}
        environment = dict(job.environment)
        for name, location in job.channels.items():
            if isinstance(location, Path):
                paths[name] = location
                continue
            base = os.environ.get(SCRATCH_VARIABLE) or None
            parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelparallel-data-", dir=base))
            print(f"[launcher] channel {name!r}: fetching {location}", file=output, flush=True)
            size = fetch(location, Path(parent) / "data", f"channel {name!r}")
            print(f"[launcher] channel {name!r}: {readable_bytes(size)} are there", file=output, flush=True)
            paths[name] = Path(parent) / "data"
            environment[f"{URL_VARIABLE}{name.upper()}"] = location
        yield replace(job, environment=environment), paths
