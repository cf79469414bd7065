"""Ctrl-C while a job is submitted: until the engine is asked it ends the submission, with nothing submitted.

From then on it waits until the answer has been written down, so that no job runs of which nobody here knows. A second
one does not wait.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger("modelparallel.launch")


class _Submission:
    is_asked = False
    was_interrupted = False


_current: _Submission | None = None


@contextmanager
def written_down() -> Iterator[None]:
    """Around a submission and the writing of its record. Raises `KeyboardInterrupt` after it, if that had to wait.

    Only in the main thread: others are not interrupted.
    """
    global _current
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    submission = _Submission()

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        if submission.is_asked and not submission.was_interrupted:
            submission.was_interrupted = True
            logger.warning("interrupted while the cluster is asked: its answer is waited for; Ctrl-C again: it is not")
            return
        previous(signal_number, frame)

    _current = submission
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        _current = None
    if submission.was_interrupted:
        raise KeyboardInterrupt


@contextmanager
def engine_asked() -> Iterator[None]:
    """Around the request that makes the job, by the kind of cluster. An exception says that there is no job."""
    submission = _current
    if submission is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    submission.is_asked = True
    try:
        yield
    except BaseException:
        submission.is_asked = False
        raise
