"""The signals by which a launcher is asked to have the script save, and by which it is ended; see [Note: preemption] in
job/preemption.py. Only in the main thread: a program that runs jobs in other threads handles its signals itself.
"""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from modelparallel.errors import LaunchError
from modelparallel.launch.failures import JobInterrupted
from modelparallel.launch.supervision import RankMonitor

#: How long a script has, after SIGTERM, to save and leave: as long as the service gives that sends it.
SECONDS_VARIABLE = "MODELPARALLEL_PREEMPTION_SECONDS"
_SECONDS = 120.0


@contextmanager
def asked_by_signal(monitor: RankMonitor) -> Iterator[None]:
    """SIGUSR1 asks the script to save and leave, in all attempts. A handler that this program had stays."""

    def ask(signal_number: int, frame: FrameType | None) -> None:
        monitor.request_preemption("SIGUSR1")

    with _handled({signal.SIGUSR1: ask} if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL else {}):
        yield


@contextmanager
def ended_by_signal(monitor: RankMonitor) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `JobInterrupted`. The first SIGTERM only asks a script that can save and leave."""
    seconds = _seconds()
    was_asked = False

    def end(signal_number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        if signal_number == signal.SIGTERM and monitor.script_asks and not was_asked:
            was_asked = True
            monitor.request_preemption("SIGTERM", ends_after=seconds)
            return
        raise JobInterrupted(signal_number)

    with _handled({signal.SIGTERM: end, signal.SIGHUP: end}):
        yield


def _seconds() -> float:
    text = os.environ.get(SECONDS_VARIABLE)
    try:
        seconds = _SECONDS if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise LaunchError(f"environment variable {SECONDS_VARIABLE}: expected a number of seconds, got {text!r}")
    return seconds


@contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
