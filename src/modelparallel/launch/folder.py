"""The folder of a job: what is /opt/ml in a training container is a folder of this machine here (smp-config 5.5).

    code -> the source directory        input/data/<channel> -> the data        input/config/*.json
    model        output/data        output/intermediate        output/failure        checkpoints
    logs/rank_<rank>.log                 what a process printed
    logs/launcher.log                    what the launcher said; elastic.log, mpirun.log: what the backend said
    events/rank<rank>.jsonl              what a rank wrote down of its last events when a step failed
    status/                              how each process tells the launcher that it started, failed or finished
    attempts/<number>/                   logs, events and status of an attempt that was followed by another one
    attempts/attempts.json               how each attempt ended, if the job may restart
    starts/<number>/                     the same of a whole start of the job, before its engine started it again

Of a job on several hosts each has its own logs/node_<k>, events/node_<k> and status/node_<k>, so that the folder may be
one that all of them share; status/nodes.json then says which job it is that they share. Hosts that do not see each
other's files have a folder each, of the same form.

Only names and files; who runs what in it is in job.py.

[Note: what goes] A folder may be used again, and may hold files of others: of the user, or of the script. What an
earlier job left goes by its name, file by file, out of directories that are no links: the names of `_WRITTEN`, links
that were written down when they were made and lead where they led, and directories that are empty then.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.job.private_files import write_private
from modelparallel.launch import folder_mark
from modelparallel.launch.channels import check_channel_names

#: Where jobs go that were not told where, below the current directory.
DEFAULT_PARENT = "modelparallel-jobs"

#: What a job writes into the directories that are its own, by the names of the files; see [Note: what goes].
_WRITTEN = {
    "logs": re.compile(r"(rank_\d+|launcher|elastic|mpirun)\.log"),
    "status": re.compile(
        r"job\.json|nodes\.json|secret|store|preempt(\.asks)?|rank_\d+\.partial|"
        r"rank_\d+\.(started|error|finished|elastic)\.(json|partial)"
    ),
    "events": re.compile(r"rank\d+\.(jsonl|partial|memory\.json)"),
    "attempts": re.compile(r"attempts\.(json|partial)"),
    "config": re.compile(r"(hyperparameters|resourceconfig|inputdataconfig)\.json"),
}
#: The directories in which each node of several has its own, and its name there.
_OF_NODES = ("logs", "status", "events")
_NODE = re.compile(r"node_(0|[1-9]\d{0,5})")
_MAX_NAME = 128


@dataclass(frozen=True)
class JobFolder:
    """Names of everything below one job folder; of what each node has for itself, those of `node`."""

    root: Path
    node: int | None = None

    def _own(self, directory: str) -> Path:
        whole = self.root / directory
        return whole if self.node is None else whole / f"node_{self.node}"

    def of_nodes(self) -> list["JobFolder"]:
        """The same folder for each node that has written into it; just this one for a job of one host."""
        found: set[int] = set()
        for directory in _OF_NODES:
            with suppress(OSError):
                names = os.listdir(self.root / directory)
                found.update(int(match[1]) for name in names if (match := _NODE.fullmatch(name)))
        return [JobFolder(self.root, node) for node in sorted(found)] or [self]

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def input(self) -> Path:
        return self.root / "input"

    @property
    def input_config(self) -> Path:
        # One file of the hosts names the current one; node 0 writes where scripts look that know the path.
        config = self.input / "config"
        return config / f"node_{self.node}" if self.node else config

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
        return self._own("logs")

    @property
    def launcher_log(self) -> Path:
        return self.logs / "launcher.log"

    @property
    def mpirun_log(self) -> Path:
        return self.logs / "mpirun.log"

    @property
    def events(self) -> Path:
        return self._own("events")

    @property
    def status(self) -> Path:
        return self._own("status")

    @property
    def nodes_file(self) -> Path:
        """Which job it is that several nodes share this folder for."""
        return self.root / "status" / "nodes.json"

    @property
    def secret_file(self) -> Path:
        """By what the ranks of all nodes that share this folder prove to each other that they are of its job."""
        return self.root / "status" / "secret"

    @property
    def description(self) -> Path:
        """The file from which every process of the job reads what it has to do."""
        return self.status / "job.json"

    @property
    def store(self) -> Path:
        """The file through which the processes of an attempt find each other."""
        return self.status / "store"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def attempts_file(self) -> Path:
        return self.attempts / "attempts.json"

    def attempt(self, number: int) -> "JobFolder":
        """Where `put_aside` has put logs, events and status of an attempt; the rest of a job's files is not there."""
        return JobFolder(self.attempts / str(number), self.node)

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

    @property
    def preemption_file(self) -> Path:
        """It is there when the script is to save and leave; see [Note: preemption] in job/preemption.py."""
        return self.status / "preempt"

    @property
    def links_file(self) -> Path:
        """Which links a job has made, and where they lead."""
        return self.root / ".modelparallel-links"

    def prepare(self, source_dir: Path, channels: Mapping[str, Path], checkpoints: Path | None = None) -> None:
        """Make the directories and links. Logs, status, events, attempts and failure of an earlier run in this
        folder go; model, output data and checkpoints stay, so that a job can go on where it stopped, and so does
        whatever no job has written. Raises `LaunchError` for what is in the way.
        """
        check_channel_names(channels)
        try:
            self._clear()
            _make_own(self.input / "data", self.root)
            self._make_own_directories()
            for directory in (self.model, self.output_data, self.output_intermediate):
                directory.mkdir(parents=True, exist_ok=True)
            # The code of a submitted job may lie in its folder already.
            links = {} if source_dir == self.code and not self.code.is_symlink() else {self.code: source_dir}
            for name, path in channels.items():
                if not path.is_dir():
                    # A channel is a directory for the script, also when it is given as one file.
                    _make_own(self.channel(name), self.root)
                links[self.channel(name) if path.is_dir() else self.channel(name) / path.name] = path
            if checkpoints is not None:
                checkpoints.mkdir(parents=True, exist_ok=True)
                links[self.checkpoints] = checkpoints
            elif not self.checkpoints.is_symlink():
                self.checkpoints.mkdir(exist_ok=True)
            self._link(links)
        except OSError as error:
            raise LaunchError(f"the job folder {self.root} cannot be made ready: {error}") from error

    def prepare_shared(self) -> None:
        """Make the directories that this node has for itself in a folder that another one has prepared. Raises
        `LaunchError` for what is in the way.
        """
        try:
            self._make_own_directories()
        except OSError as error:
            raise LaunchError(f"the shared job folder {self.root} cannot be written to: {error}") from error

    def _make_own_directories(self) -> None:
        for directory in (self.input_config, self.logs, self.status, self.events):
            _make_own(directory, self.root)

    def _clear(self) -> None:
        """Remove what an earlier job has written; see [Note: what goes]."""
        names = ("logs", "status", "events", "attempts", "input", "input/config", "input/data", "output")
        for name in names:
            _check_own(self.root / name)
        for link, target in self._links_made().items():
            if _leads_to(link, target) and link != self.checkpoints:
                link.unlink()
                if link.parent.parent == self.input / "data":
                    _remove_if_empty(link.parent)
        whole = JobFolder(self.root)
        for folder in (*self._attempt_folders(), whole):
            for part in (*(part for part in folder.of_nodes() if part.node is not None), folder):
                for directory in (part.logs, part.status, part.events):
                    _remove_written(directory)
            if folder is not whole:
                _remove_if_empty(folder.root)
        _remove_written(self.attempts)
        for directory in (*_node_directories(whole.input_config), whole.input_config):
            _remove_written(directory)
        with suppress(FileNotFoundError):
            self.failure_file.unlink()

    def _attempt_folders(self) -> Iterator["JobFolder"]:
        with suppress(FileNotFoundError):
            for name in os.listdir(self.attempts):
                root = self.attempts / name
                if re.fullmatch("[1-9][0-9]*", name) and root.is_dir() and not root.is_symlink():
                    yield JobFolder(root)

    def _links_made(self) -> dict[Path, str]:
        try:
            links_of_names = json.loads(self.links_file.read_text(encoding="utf-8"))
            links = {self.root / str(link): str(target) for link, target in links_of_names.items()}
        except (OSError, ValueError, RecursionError, AttributeError):
            return {}
        # Whatever the file says, only where jobs make links, and not through other ones.
        data = self.input / "data"
        return {
            link: target
            for link, target in links.items()
            if link in (self.code, self.checkpoints)
            or (data in (link.parent, link.parent.parent) and ".." not in link.parts and not link.parent.is_symlink())
        }

    def _link(self, links: Mapping[Path, Path]) -> None:
        """Make the links. Only that of the checkpoints may be there from an earlier job; it is replaced or kept."""
        earlier = {link: target for link, target in self._links_made().items() if _leads_to(link, target)}
        wanted = {link: str(target) for link, target in links.items()}
        for link in wanted:
            if os.path.lexists(link) and link not in earlier:
                raise LaunchError(
                    f"{link} exists and is not a link of an earlier job: remove it or choose another job folder"
                )
        text = json.dumps({str(link.relative_to(self.root)): target for link, target in {**earlier, **wanted}.items()})
        write_private(self.links_file, text)
        for link, target in wanted.items():
            if link in earlier:
                link.unlink()
            os.symlink(target, link)

    def put_aside(self, number: int) -> None:
        """Move logs, events and status of an attempt that has ended to a folder of its own; the launcher's log stays.
        No process of the attempt is alive.
        """
        self._move_written(self.attempt(number), (self.launcher_log,))

    def put_start_aside(self, number: int) -> None:
        """Move what the start of the job before this one has left, on all nodes, to `starts/<number>`: a batch system
        starts a job again in the same folder. Raises `LaunchError` for what is in the way.
        """
        target = self.root / "starts" / str(number)
        try:
            for part in JobFolder(self.root).of_nodes():
                if any(map(_written, (part.logs, part.status, part.events))):
                    part._move_written(JobFolder(target, part.node))
            if _written(self.attempts) or any(self._attempt_folders()):
                _make_own(target, self.root)
                self.attempts.rename(target / "attempts")
            if self.failure_file.is_file():
                _make_own(target / "output", self.root)
                self.failure_file.rename(JobFolder(target).failure_file)
        except OSError as error:
            raise LaunchError(f"what is left of the start before cannot be moved to {target}: {error}") from error

    def _move_written(self, target: "JobFolder", but: tuple[Path, ...] = ()) -> None:
        for directory, kept in (
            (self.logs, target.logs), (self.status, target.status), (self.events, target.events)
        ):  # fmt: skip
            _make_own(kept, self.root)
            for path in _written(directory):
                if path not in but:
                    path.rename(kept / path.name)

    def write_input_config(self, name: str, content: Mapping[str, Any]) -> None:
        """Write input/config/<name>.json."""
        text = json.dumps(content, indent=2, sort_keys=True, default=str)
        write_private(self.input_config / f"{name}.json", text + "\n")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other jobs out of it while this one runs. Raises `LaunchError` for a folder that is
        not empty and not a job's; see folder_mark.py.
        """
        with folder_mark.held(self.root):
            ignore = self.root.parent / ".gitignore"
            if self.root.parent.name == DEFAULT_PARENT:
                with suppress(FileExistsError), open(ignore, "x", encoding="ascii") as file:
                    file.write("*\n")
            yield


def new_job_name(base: str, now: datetime | None = None) -> str:
    """A name in the form base-2026-01-31-12-00-00-123."""
    now = now or datetime.now()
    base = re.sub(r"[^A-Za-z0-9-]+", "-", base)[: _MAX_NAME // 2].strip("-") or "job"
    return f"{base}-{now:%Y-%m-%d-%H-%M-%S}-{now.microsecond // 1000:03d}"


def default_folder(job_name: str) -> JobFolder:
    """The folder of a job that was not given one: ./modelparallel-jobs/<job name>, ignored by git."""
    return JobFolder(Path.cwd() / DEFAULT_PARENT / job_name)


def checked_job_name(name: Any) -> str:
    """The name, if it can be that of a folder and of a variable's value. Raises `LaunchError`."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > _MAX_NAME:
        raise LaunchError(
            f"job name {name!r}: use letters, digits, '.', '_' and '-', a letter or digit first, at most {_MAX_NAME} "
            "characters"
        )
    return name


def _leads_to(link: Path, target: str) -> bool:
    return link.is_symlink() and os.readlink(link) == target


def _check_own(directory: Path) -> None:
    """A link could lead to files of others, in which a job must neither write nor remove anything."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        what = "a link" if directory.is_symlink() else "no directory"
        raise LaunchError(f"{directory} is {what}: remove it, or choose another job folder; jobs make it themselves")


def _make_own(directory: Path, root: Path) -> None:
    """Make a directory below the job folder that nobody else can look into."""
    if directory.parent != root:
        _make_own(directory.parent, root)
    _check_own(directory)
    directory.mkdir(mode=0o700, exist_ok=True)
    directory.chmod(0o700)


def _node_directories(directory: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return [directory / name for name in os.listdir(directory) if _NODE.fullmatch(name)]
    return []


def _written(directory: Path) -> list[Path]:
    """The files in it that have names of what jobs write."""
    if not directory.is_dir() or directory.is_symlink():
        return []
    files = []
    kind = directory.parent.name if _NODE.fullmatch(directory.name) else directory.name
    with os.scandir(directory) as entries:
        for entry in entries:
            if _WRITTEN[kind].fullmatch(entry.name):
                if not entry.is_file(follow_symlinks=False):
                    raise LaunchError(f"{entry.path} is no file of a job: remove it, or choose another job folder")
                files.append(directory / entry.name)
    return files


def _remove_written(directory: Path) -> None:
    for path in _written(directory):
        path.unlink()
    _remove_if_empty(directory)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()
