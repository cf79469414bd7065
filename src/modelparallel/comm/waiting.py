"""Saying who is waited for, while a wait lasts that may be a long one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("modelparallel")

#: After so many seconds a wait is said, and again when it has lasted twice as long, four times as long, ...
SAY_AFTER_SECONDS = 10.0


@contextmanager
def said(describe: Callable[[], str]) -> Iterator[None]:
    """While the block lasts, log what it waits for after 10 s, 20 s, 40 s, ...

    ``describe`` is called in a thread of its own, and may itself wait; the block is not held up by it.
    """
    is_over = threading.Event()
    start = time.monotonic()

    def say() -> None:
        next_at = SAY_AFTER_SECONDS
        while not is_over.wait(start + next_at - time.monotonic()):
            text = describe()
            if not is_over.is_set():
                logger.warning("%s (for %.0f s so far)", text, time.monotonic() - start)
            next_at *= 2

    thread = threading.Thread(target=say, name="say-who-is-waited-for", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(1.0)
