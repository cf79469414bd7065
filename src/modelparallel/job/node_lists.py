"""Lists of nodes as Slurm writes them: `n[03-05,9],rack[1-2]n[1-4],tux[1-3,7]-ib`."""

import itertools
import re
import shutil
import subprocess

from modelparallel.errors import SMPConfigError

_SECONDS = 30.0
# Brackets hold numbers and ranges; names and brackets may follow each other in any order.
_NODE = re.compile(r"(?:[^\s,\[\]]+|\[[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*\])+")
_PART = re.compile(r"\[([^\]]*)\]|([^\[]+)")


def expand_nodes(text: str) -> list[str]:
    """The names of all nodes, in the order of the list: by `scontrol show hostnames` if there is one, else here.

    Raises `SMPConfigError` for what is no list of nodes.
    """
    text = text.strip()
    if "[" not in text:
        nodes = [name for name in text.split(",") if name]
    else:
        nodes = _by_scontrol(text) or list(_expanded(text))
    if not nodes:
        raise SMPConfigError(f"{text!r} is not a list of nodes, such as n[01-04],m1")
    return nodes


def _by_scontrol(text: str) -> list[str]:
    """Slurm's own answer; none where there is no scontrol, or it fails."""
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        return []
    try:
        result = subprocess.run(
            [scontrol, "show", "hostnames", text], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.split() if result.returncode == 0 else []


def _expanded(text: str) -> list[str]:
    names: list[str] = []
    end = 0
    for match in _NODE.finditer(text):
        if text[end : match.start()] not in ("", ","):
            break
        end = match.end()
        choices = [_numbers(inside, text) if inside else [outside] for inside, outside in _PART.findall(match.group())]
        names += ["".join(parts) for parts in itertools.product(*choices)]
    if end != len(text):
        raise SMPConfigError(f"{text!r} is not a list of nodes, such as n[01-04],m1: cannot read {text[end:]!r}")
    return names


def _numbers(inside: str, text: str) -> list[str]:
    """`03-05,9` -> 03, 04, 05, 9."""
    numbers: list[str] = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise SMPConfigError(f"{text!r} is not a list of nodes: {part!r} counts backwards")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers
