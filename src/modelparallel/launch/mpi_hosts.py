"""The hosts on which mpirun starts processes: `--hosts node-a:8,node-b:8`, or a hostfile."""

import re
from pathlib import Path

from modelparallel.errors import LaunchError
from modelparallel.launch.hosts import Hosts

_HOST = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9._-]+)(?::(\d+))?")
_LINE = re.compile(r"(\S+?)(?::(\d+)|(?:\s+(?:slots|max[-_]slots)\s*=\s*\d+)*)\s*")
_SLOTS = re.compile(r"\sslots\s*=\s*(\d+)")


def parse_hosts(text: str) -> Hosts:
    """The hosts of `node-a:8,node-b:8`; a host without a number has one process. Raises `LaunchError`."""
    pairs = []
    for part in text.split(","):
        match = _HOST.fullmatch(part.strip())
        if match is None:
            raise LaunchError(f"--hosts {text!r}: cannot read {part!r}: expected HOST:N,HOST:N,...")
        pairs.append((match[1].strip("[]"), int(match[2] or 1)))
    return _hosts(pairs, f"--hosts {text}")


def read_hostfile(path: Path) -> Hosts:
    """The hosts of a file as Open MPI reads it: a line each, `node-a slots=8` or `node-a:8`. Raises `LaunchError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--hostfile {path}: cannot be read: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise LaunchError(f"--hostfile {path}, line {number}: cannot read {line!r}: expected HOST slots=N")
        slots = _SLOTS.search(line)
        pairs.append((match[1], int(match[2] or (slots[1] if slots else 1))))
    return _hosts(pairs, f"--hostfile {path}")


def _hosts(pairs: list[tuple[str, int]], where: str) -> Hosts:
    names = [name for name, _ in pairs]
    if not names:
        raise LaunchError(f"{where}: no host is named")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LaunchError(f"{where}: {', '.join(twice)} stands there twice: give each host once, with its sum")
    if empty := [name for name, size in pairs if size < 1]:
        raise LaunchError(f"{where}: {', '.join(empty)} has no process: at least 1 is needed")
    # By which interface each of them reaches the others is found out there.
    return Hosts(tuple(names), 0, names[0], "", tuple(size for _, size in pairs))
