"""Streams and events: on a CPU work is done when the call returns, so a stream only has a name and an event a time."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from modelparallel.launch.rehearsal.devices import CPU
from modelparallel.launch.rehearsal.mapping import Installation


class RehearsedStream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, **others: Any) -> None:
        self.device = CPU
        self.priority = priority
        self.cuda_stream = 0

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """All work is done already."""

    def wait_event(self, event: "RehearsedEvent") -> None:
        """All work is done already."""

    def wait_stream(self, stream: "RehearsedStream") -> None:
        """All work is done already."""

    def record_event(self, event: "RehearsedEvent | None" = None) -> "RehearsedEvent":
        event = RehearsedEvent() if event is None else event
        event.record(self)
        return event


class RehearsedEvent:
    """Stands for torch.cuda.Event; measures wall-clock time."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **others: Any
    ) -> None:
        self._is_timed = enable_timing
        self._time: float | None = None

    def record(self, stream: RehearsedStream | None = None) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """All work is done already."""

    def wait(self, stream: RehearsedStream | None = None) -> None:
        """All work is done already."""

    def elapsed_time(self, end_event: "RehearsedEvent") -> float:
        """Milliseconds from this event to `end_event`."""
        if not (self._is_timed and end_event._is_timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._time is None or end_event._time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end_event._time - self._time) * 1000.0


class _Streams:
    """The current stream of the process."""

    def __init__(self) -> None:
        self.default = RehearsedStream()
        self.current = self.default

    def current_stream(self, device: Any = None) -> RehearsedStream:
        return self.current

    def default_stream(self, device: Any = None) -> RehearsedStream:
        return self.default

    def set_stream(self, stream: RehearsedStream | None) -> None:
        if stream is not None:
            self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: RehearsedStream | None) -> Iterator[None]:
        previous = self.current
        self.set_stream(stream)
        try:
            yield
        finally:
            self.current = previous


def install(installation: Installation) -> None:
    streams = _Streams()
    cuda = torch.cuda
    add = installation.module_name
    add(cuda, "Stream", RehearsedStream, "a stream whose work is always done")
    add(cuda, "ExternalStream", RehearsedStream, "a stream whose work is always done")
    add(cuda, "Event", RehearsedEvent, "an event that measures wall-clock time")
    add(cuda, "stream", streams.stream, "makes a stream the current one")
    add(cuda, "StreamContext", streams.stream, "makes a stream the current one")
    add(cuda, "current_stream", streams.current_stream, "the current stream")
    add(cuda, "default_stream", streams.default_stream, "the default stream")
    add(cuda, "set_stream", streams.set_stream, "makes a stream the current one")
