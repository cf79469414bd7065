"""What `modelparallel cluster-check` has found, as data and as text. Pure: nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.plan.partition import readable_bytes

#: Clocks that differ by more put the events of two hosts into the wrong order.
_CLOCK_SECONDS = 0.5
#: A group below this part of the usual bandwidth of its axis is named.
_SLOW = 0.5


@dataclass(frozen=True)
class RankFacts:
    """What one rank says of itself.

    Attributes:
        launcher: whose variables have told the rank.
        device: kind and name; ``device_id`` tells devices of one host apart, "" for the CPU.
        interface: where gloo listens, and why there; ``nccl_interface``: "" where NCCL is not in use.
        versions: of Python, torch, ...; all ranks should have the same.
        parameters: what the job was given; ``smp.init`` has seen to it that all ranks have the same.
    """

    global_rank: int
    host: str
    local_rank: int
    launcher: str
    device: str
    device_id: str
    interface: str
    nccl_interface: str
    versions: Mapping[str, str]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Reduction:
    """All-reduces of one size in one group: the median time, of the slowest rank; whether every sum was right."""

    axis: str
    ranks: tuple[int, ...]
    num_bytes: int
    seconds: float
    is_right: bool

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second over the links, as nccl-tests counts them: comparable between groups of any size."""
        size = len(self.ranks)
        return 2 * (size - 1) / size * self.num_bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Clock:
    """By how much the clock of a host is ahead of that of rank 0's host, known to within ``uncertainty``; seconds."""

    host: str
    ahead: float
    uncertainty: float


@dataclass(frozen=True)
class ClusterReport:
    """Everything; ranks ascending, the first clock is that of rank 0's host."""

    ranks: tuple[RankFacts, ...]
    reductions: tuple[Reduction, ...]
    clocks: tuple[Clock, ...]
    may_share_devices: bool = False

    def problems(self) -> list[str]:
        """What has to be mended before a job runs; empty if the ranks agree and all sums are right."""
        found = []
        for name in dict.fromkeys(name for facts in self.ranks for name in facts.versions):
            found += self._differing(name, [facts.versions.get(name, "not installed") for facts in self.ranks])
        found += self._differing("kind of device", [facts.device.split(":")[0] for facts in self.ranks])
        found += self._differing("launcher", [facts.launcher for facts in self.ranks])
        owners: dict[tuple[str, str], list[int]] = {}
        for facts in self.ranks:
            if facts.device_id and not self.may_share_devices:
                owners.setdefault((facts.host, facts.device_id), []).append(facts.global_rank)
        for (host, device_id), ranks in sorted(owners.items()):
            if len(ranks) > 1:
                found.append(
                    f"{_who(ranks)} of host {host} have the same device {device_id}: each needs one of its own"
                )
        wrong = sorted({(one.axis, one.ranks) for one in self.reductions if not one.is_right})
        found += [f"wrong sums in the {axis} group of {_who(ranks)}" for axis, ranks in wrong]
        return found

    def notes(self) -> list[str]:
        """What is odd, and keeps no job from running."""
        found = []
        for clock in self.clocks[1:]:
            if abs(clock.ahead) - clock.uncertainty > _CLOCK_SECONDS:
                found.append(
                    f"the clock of {clock.host} is {_ahead(clock)} {self.clocks[0].host}'s: what these hosts log "
                    "cannot be put in order; let chrony or ntpd set both"
                )
        for axis, largest in self._largest_by_axis().items():
            usual = statistics.median(one.bus_bandwidth for one in largest)
            slow = [one for one in largest if one.bus_bandwidth < _SLOW * usual]
            for one in slow:
                found.append(
                    f"{axis}: the group of {_who(one.ranks)} ({', '.join(self._hosts_of(one.ranks))}) has "
                    f"{_rate(one.bus_bandwidth)}, the usual one {_rate(usual)}"
                )
        if len(self.ranks) == 1:
            found.append("one process has nobody to talk to: start one for each device, on all hosts")
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything, with the conclusions."""
        return {
            "format": 1,
            "is_good": not self.problems(),
            "problems": self.problems(),
            "notes": self.notes(),
            "ranks": [asdict(facts) for facts in self.ranks],
            "reductions": [{**asdict(one), "bus_bandwidth": one.bus_bandwidth} for one in self.reductions],
            "clocks": [asdict(clock) for clock in self.clocks],
        }

    def __str__(self) -> str:
        hosts = list(dict.fromkeys(facts.host for facts in self.ranks))
        first = self.ranks[0]
        given = ", ".join(f"{name} {value}" for name, value in first.parameters.items()) or "no parameters"
        lines = [
            f"cluster check: {_count(len(self.ranks), 'rank')} on {_count(len(hosts), 'host')}, started by "
            f"{first.launcher}; {given}",
            "",
            *_table(["ranks", "host", "local", "device", "gloo", *(["NCCL"] * self._has_nccl())], self._rows()),
            "",
            "versions  " + ", ".join(f"{name} {value}" for name, value in first.versions.items()),
        ]
        for clock in self.clocks[1:]:
            lines.append(
                f"clocks    {clock.host} is {_ahead(clock)} {self.clocks[0].host}'s, to within "
                f"{1000 * clock.uncertainty:.1f} ms"
            )
        if self.reductions:
            lines += ["", "all-reduce, the slowest group of each axis: time, bus bandwidth", *self._bandwidths()]
        lines += ["", *(f"note: {text}" for text in self.notes())]
        problems = self.problems()
        lines += [f"PROBLEM: {text}" for text in problems]
        lines.append("not good: see above" if problems else "good: all ranks agree, and all sums are right")
        return "\n".join(lines)

    def _differing(self, what: str, values: Sequence[str]) -> list[str]:
        """``values`` of the ranks should be equal."""
        ranks: dict[str, list[int]] = {}
        for facts, value in zip(self.ranks, values, strict=True):
            ranks.setdefault(value, []).append(facts.global_rank)
        if len(ranks) < 2:
            return []
        return [f"{what}: " + "; ".join(f"{value} on {_who(who)}" for value, who in ranks.items())]

    def _largest_by_axis(self) -> dict[str, list[Reduction]]:
        """The reductions of the largest size, by axis."""
        largest = max((one.num_bytes for one in self.reductions), default=0)
        found: dict[str, list[Reduction]] = {}
        for one in self.reductions:
            if one.num_bytes == largest:
                found.setdefault(one.axis, []).append(one)
        return found

    def _hosts_of(self, ranks: Iterable[int]) -> list[str]:
        return list(dict.fromkeys(self.ranks[rank].host for rank in ranks))

    def _has_nccl(self) -> bool:
        return any(facts.nccl_interface for facts in self.ranks)

    def _rows(self) -> list[list[str]]:
        """Neighbours that differ in nothing but rank and device number share a row."""
        rows: list[tuple[list[RankFacts], tuple[str, ...]]] = []
        for facts in self.ranks:
            shown = (facts.host, facts.device, facts.interface, facts.nccl_interface)
            if rows and rows[-1][1] == shown:
                rows[-1][0].append(facts)
            else:
                rows.append(([facts], shown))
        return [
            [
                spans(facts.global_rank for facts in members),
                host,
                spans(facts.local_rank for facts in members),
                device,
                interface,
                *([nccl] * self._has_nccl()),
            ]
            for members, (host, device, interface, nccl) in rows
        ]

    def _bandwidths(self) -> list[str]:
        sizes = sorted({one.num_bytes for one in self.reductions})
        rows = []
        for axis in dict.fromkeys(one.axis for one in self.reductions):
            groups = dict.fromkeys(one.ranks for one in self.reductions if one.axis == axis)
            row = [axis, f"{len(groups)} of {len(next(iter(groups)))}"]
            for size in sizes:
                slowest = min(
                    (one for one in self.reductions if (one.axis, one.num_bytes) == (axis, size)),
                    key=lambda one: one.bus_bandwidth,
                )
                row.append(f"{_time(slowest.seconds)}, {_rate(slowest.bus_bandwidth)}")
            row.append(_who(slowest.ranks) if len(groups) > 1 else "")
            rows.append(row)
        columns = [*map(readable_bytes, sizes)]
        slowest_column = f"slowest at {columns[-1]}" if any(row[-1] for row in rows) else ""
        return _table(["axis", "groups", *columns, slowest_column], rows)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Numbers of bytes, ascending. Raises `LaunchError`."""
    try:
        sizes = sorted({int(size) for size in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 4 or any(size % 4 for size in sizes):
        raise LaunchError(f"--sizes {text!r}: expected numbers of bytes, multiples of 4, separated by commas")
    return tuple(sizes)


def spans(ranks: Iterable[int]) -> str:
    """`0-3, 8`: numbers in ascending order."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _who(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + spans(ranks)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _ahead(clock: Clock) -> str:
    milliseconds = 1000 * abs(clock.ahead)
    shown = f"{milliseconds / 1000:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.1f} ms"
    return f"{shown} {'ahead of' if clock.ahead > 0 else 'behind'}"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.2f} GB/s" if bandwidth >= 1e8 else f"{bandwidth / 1e6:.1f} MB/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _table(title: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [title, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(title))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
