"""The folder of a job: what is /opt/ml in a training container is a folder of this machine here (smp-config 5.5).

    code -> the source directory        input/data/<channel> -> the data        input/config/*.json
    model        output/data        output/intermediate        output/failure        checkpoints
    logs/rank_<rank>.log                 what a process printed
    logs/launcher.log                    what the launcher said; elastic.log, mpirun.log: what the backend said
    events/rank<rank>.jsonl              what a rank wrote down of its last events when a step failed
    status/                              how each process tells the launcher that it started, failed or finished
    attempts/<number>/                   logs, events and status of an attempt that was followed by another one
    attempts/attempts.json               how each attempt ended, if the job may restart

Only names and files; who runs what in it is in job.py.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from modelparallel.errors import LaunchError

#: Where jobs go that were not told where, below the current directory.
DEFAULT_PARENT = "modelparallel-jobs"


@dataclass(frozen=True)
class JobFolder:
    """Names of everything below one job folder."""

    root: Path

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def input(self) -> Path:
        return self.root / "input"

    @property
    def input_config(self) -> Path:
        return self.input / "config"

    def channel(self, name: str) -> Path:
        return self.input / "data" / name

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def output_data(self) -> Path:
        return self.output / "data"

    @property
    def output_intermediate(self) -> Path:
        return self.output / "intermediate"

    @property
    def failure_file(self) -> Path:
        return self.output / "failure"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def launcher_log(self) -> Path:
        return self.logs / "launcher.log"

    @property
    def mpirun_log(self) -> Path:
        return self.logs / "mpirun.log"

    @property
    def events(self) -> Path:
        return self.root / "events"

    @property
    def status(self) -> Path:
        return self.root / "status"

    @property
    def description(self) -> Path:
        """The file from which every process of the job reads what it has to do."""
        return self.status / "job.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def attempts_file(self) -> Path:
        return self.attempts / "attempts.json"

    def attempt(self, number: int) -> "JobFolder":
        """Where `put_aside` has put logs, events and status of an attempt; the rest of a job's files is not there."""
        return JobFolder(self.attempts / str(number))

    def rank_log(self, global_rank: int) -> Path:
        return self.logs / f"rank_{global_rank}.log"

    def event_file(self, global_rank: int) -> Path:
        return self.events / f"rank{global_rank}.jsonl"

    def started_file(self, global_rank: int) -> Path:
        return self.status / f"rank_{global_rank}.started.json"

    def error_file(self, global_rank: int) -> Path:
        return self.status / f"rank_{global_rank}.error.json"

    def finished_file(self, global_rank: int) -> Path:
        return self.status / f"rank_{global_rank}.finished.json"

    def prepare(self, source_dir: Path, channels: Mapping[str, Path], checkpoints: Path | None = None) -> None:
        """Make the directories and links. Logs, status, events, attempts and failure of an earlier run in this
        folder go; model, output data and checkpoints stay, so that a job can go on where it stopped.
        """
        for old in (self.logs, self.status, self.events, self.attempts, self.input):
            shutil.rmtree(old, ignore_errors=True)
        self.failure_file.unlink(missing_ok=True)
        for directory in (
            self.input_config,
            self.input / "data",
            self.model,
            self.output_data,
            self.output_intermediate,
            self.logs,
            self.status,
        ):
            directory.mkdir(parents=True, exist_ok=True)
        _link(self.code, source_dir)
        for name, path in channels.items():
            if path.is_dir():
                _link(self.channel(name), path)
            else:
                # A channel is a directory for the script, also when it is given as one file.
                self.channel(name).mkdir()
                _link(self.channel(name) / path.name, path)
        if checkpoints is None:
            if not self.checkpoints.is_symlink():
                self.checkpoints.mkdir(exist_ok=True)
        else:
            checkpoints.mkdir(parents=True, exist_ok=True)
            _link(self.checkpoints, checkpoints)

    def put_aside(self, number: int) -> None:
        """Move logs, events and status of an attempt that has ended to a folder of its own; the launcher's log stays.
        No process of the attempt is alive.
        """
        target = self.attempt(number)
        target.root.mkdir(parents=True)
        for directory in (self.logs, self.status, self.events):
            if directory.exists():
                directory.rename(target.root / directory.name)
        for directory in (self.logs, self.status):
            directory.mkdir()
        kept = target.logs / self.launcher_log.name
        if kept.exists():
            kept.rename(self.launcher_log)

    def write_input_config(self, name: str, content: Mapping[str, Any]) -> None:
        """Write input/config/<name>.json."""
        text = json.dumps(content, indent=2, sort_keys=True, default=str)
        (self.input_config / f"{name}.json").write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other jobs out of it while this one runs."""
        self.root.mkdir(parents=True, exist_ok=True)
        ignore = self.root.parent / ".gitignore"
        if self.root.parent.name == DEFAULT_PARENT and not ignore.exists():
            ignore.write_text("*\n", encoding="ascii")
        with (self.root / ".lock").open("w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise LaunchError(
                    f"another job is running in {self.root}: choose another folder (--job-dir, job_dir) or wait"
                ) from error
            yield


def new_job_name(base: str, now: datetime | None = None) -> str:
    """A name in the form base-2026-01-31-12-00-00-123."""
    now = now or datetime.now()
    base = re.sub(r"[^A-Za-z0-9-]+", "-", base).strip("-") or "job"
    return f"{base}-{now:%Y-%m-%d-%H-%M-%S}-{now.microsecond // 1000:03d}"


def default_folder(job_name: str) -> JobFolder:
    """The folder of a job that was not given one: ./modelparallel-jobs/<job name>, ignored by git."""
    return JobFolder(Path.cwd() / DEFAULT_PARENT / job_name)


def _link(link: Path, target: Path) -> None:
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise LaunchError(f"{link} exists and is not a link of an earlier job: remove it or choose another job folder")
    os.symlink(target, link, target_is_directory=target.is_dir())
