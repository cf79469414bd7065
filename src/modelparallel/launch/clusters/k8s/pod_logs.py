"""What the pods of a job print: one reader for each pod, their lines as they come, the rank in front."""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.k8s.client import ApiServer, LogPaused
from modelparallel.launch.clusters.k8s.progress import has_ended, has_output, newest_pods, node_of

#: Between two looks at the pods.
_LOOK_SECONDS = 2.0
#: Before a log that has ended is asked for again.
_PAUSE_SECONDS = 1.0
_RANK = re.compile(r"\[(?:\S+ )?rank (\d+)\] ")
_LAUNCHER = re.compile(r"\[(?:(?P<host>\S+) )?launcher\] ")
#: A server that is not in UTC writes its offset, and then lines that are read again are shown again.
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z ?")


def shown_line(line: str, node: int, rank: int | None) -> str | None:
    """A line of a node's log with its source in front; None if another rank was asked for."""
    found = _RANK.match(line)
    if rank is not None and (found is None or int(found[1]) != rank):
        return None
    if found is not None:
        return line
    return f"[node {node}] {_LAUNCHER.sub('', line, count=1)}"


def read_logs(api: ApiServer, pods: Sequence[Any], rank: int | None) -> Iterator[str]:
    """What is there now, node by node."""
    for pod in newest_pods(pods):
        if has_output(pod):
            for _, line in _lines(api.log(pod["metadata"]["name"], follow=False, since=None)):
                shown = shown_line(line, node_of(pod), rank)
                if shown is not None:
                    yield shown


def follow_logs(
    api: ApiServer,
    find_pods: Callable[[], Sequence[Any]],
    is_over: Callable[[], bool],
    rank: int | None,
    look_seconds: float = _LOOK_SECONDS,
) -> Iterator[str]:
    """All lines, as they come, until the job is over; pods that are made later, too.

    Raises `LaunchError` if a log cannot be read.
    """
    lines: queue.Queue[str | LaunchError] = queue.Queue()
    readers: dict[str, threading.Thread] = {}
    while True:
        was_over = is_over()  # before the pods are looked at, so that the last ones are seen
        for pod in find_pods():
            identity = pod["metadata"].get("uid") or pod["metadata"]["name"]
            if identity not in readers and has_output(pod):
                arguments = (api, pod["metadata"]["name"], node_of(pod), rank, lines)
                readers[identity] = threading.Thread(target=_read_all, args=arguments, daemon=True)
                readers[identity].start()
        deadline = time.monotonic() + look_seconds
        is_done = was_over and not any(reader.is_alive() for reader in readers.values())
        while True:
            try:
                line = lines.get(timeout=None if is_done else max(0.0, deadline - time.monotonic()), block=not is_done)
            except queue.Empty:
                break
            if isinstance(line, LaunchError):
                raise line
            yield line
        if is_done:
            return


def _read_all(api: ApiServer, pod: str, node: int, rank: int | None, lines: queue.Queue[str | LaunchError]) -> None:
    """Read the log of a pod until the pod has ended: over connections that end before it, and containers that are
    started again.
    """
    last, since = "", None
    while True:
        seen = last
        try:
            for moment, line in _lines(api.log(pod, follow=True, since=since)):
                if moment and moment <= seen:
                    continue  # was read over the connection before
                last = moment or last
                shown = shown_line(line, node, rank)
                if shown is not None:
                    lines.put(shown)
        except LogPaused:
            pass
        except LaunchError as error:
            lines.put(error)
            return
        found = _pod_or_none(api, pod, lines)
        if found is None or has_ended(found):
            return
        since = _seconds_since(last)
        time.sleep(_PAUSE_SECONDS)


def _pod_or_none(api: ApiServer, pod: str, lines: queue.Queue[str | LaunchError]) -> Any:
    try:
        return api.read_pod(pod)
    except LaunchError as error:
        lines.put(error)
        return None


def _lines(pieces: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """Whole lines, each as its time and its text."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from map(_split, whole)
    if rest:
        yield _split(rest)


def _split(line: bytes) -> tuple[str, str]:
    """The time of a line, so that times compare as texts, and its text."""
    text = line.decode(errors="replace").rstrip("\r")
    found = _MOMENT.match(text)
    return ("", text) if found is None else (f"{found[1]}.{(found[2] or ''):0<9}Z", text[found.end() :])


def _seconds_since(moment: str) -> int | None:
    """How long ago that was, rounded up, and a second more; None if nobody knows."""
    if not moment:
        return None
    then = datetime.strptime(moment[:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
    return max(1, math.ceil((datetime.now(timezone.utc) - then).total_seconds()) + 1)
