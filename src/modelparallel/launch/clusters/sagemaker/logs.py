"""What the containers of a job print, read from CloudWatch: one stream a node, in the order of time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from modelparallel.launch.clusters.sagemaker.service import asked

GROUP = "/aws/sagemaker/TrainingJobs"
#: Seconds between two readings, and how often a job that has ended is still read: lines come late.
POLL_SECONDS = 5.0
LAST_READINGS = 3
# mpirun's tag, as it is ([1,3]<stdout>:, [prterun-algo-1-77@1,3]<stderr>:) or as the toolkit rewrites it.
_MPIRUN = re.compile(r"\[[^\[\],]*,(?:mpirank:)?(\d+)(?:,algo-\d+)?\]<(?:stdout|stderr|stddiag)>: ?(.*)", re.S)
# That of our own node command.
_OWN = re.compile(r"\[(?:\S+ )?rank (\d+)\] ?(.*)", re.S)
_NODE = re.compile(r"/algo-(\d+)")


@dataclass
class Stream:
    """The output of one container, and how far it was read."""

    name: str
    token: str | None = None
    pending: list[dict[str, Any]] = field(default_factory=list)

    @property
    def node(self) -> int:
        """Of the node, from 0; `algo-1` is the first."""
        match = _NODE.search(self.name)
        return int(match[1]) - 1 if match else 0


def log_lines(
    logs: Any,
    name: str,
    has_ended: Callable[[], bool],
    *,
    rank: int | None = None,
    node: int | None = None,
    follow: bool = False,
) -> Iterator[str]:
    """The lines of a job, the rank in front, else the node.

    Args:
        logs: the client of CloudWatch Logs.
        has_ended: whether the service says so.
        rank: of this one alone.
        node: of this one alone, from 0.
        follow: go on until the job has ended and no more lines come.
    """
    streams: dict[str, Stream] = {}
    empty_readings = 0
    while True:
        is_over = not follow or has_ended()
        for found in _streams(logs, name):
            streams.setdefault(found, Stream(found))
        read = [
            (event["timestamp"], number, stream, event["message"])
            for stream in sorted(streams.values(), key=lambda stream: stream.node)
            if node is None or stream.node == node
            for number, event in enumerate(_new_events(logs, stream))
        ]
        for _, _, stream, message in sorted(read, key=lambda item: item[:2]):
            for text in message.splitlines() or [""]:
                found_rank, line = line_of(text, stream.node)
                if rank is None or found_rank == rank:
                    yield line
        empty_readings = 0 if read else empty_readings + 1
        if not follow or (is_over and empty_readings >= LAST_READINGS):
            return
        time.sleep(POLL_SECONDS)


def line_of(text: str, node: int) -> tuple[int | None, str]:
    """(rank, what is shown): the rank that mpirun or our node command put in front, in our form."""
    for pattern in (_MPIRUN, _OWN):
        match = pattern.match(text)
        if match:
            return int(match[1]), f"[rank {match[1]}] {match[2]}"
    return None, f"[algo-{node + 1}] {text}"


def _streams(logs: Any, name: str) -> list[str]:
    from botocore.exceptions import ClientError

    with asked(f"logs of {name} in {GROUP}"):
        try:
            pages = logs.get_paginator("describe_log_streams").paginate(
                logGroupName=GROUP, logStreamNamePrefix=f"{name}/"
            )
            return [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
        except ClientError as error:
            # The group comes with the first job of an account that prints something.
            if error.response.get("Error", {}).get("Code") == "ResourceNotFoundException":
                return []
            raise


def _new_events(logs: Any, stream: Stream) -> list[dict[str, Any]]:
    """What came since the last reading; the token that comes back twice says that there is no more."""
    events: list[dict[str, Any]] = []
    while True:
        place = {} if stream.token is None else {"nextToken": stream.token}
        with asked(f"log stream {stream.name}"):
            answer = logs.get_log_events(logGroupName=GROUP, logStreamName=stream.name, startFromHead=True, **place)
        events += answer["events"]
        token, stream.token = stream.token, answer["nextForwardToken"]
        if stream.token == token or not answer["events"]:
            return events
