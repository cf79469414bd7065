"""What the library logs on this rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Keep(logging.Handler):
    def __init__(self, lines: list[str], level: int) -> None:
        super().__init__(level)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@contextmanager
def logged_lines(level: int = logging.NOTSET) -> Iterator[list[str]]:
    """The lines that the library logs inside, of at least the level."""
    lines: list[str] = []
    handler = _Keep(lines, level)
    logging.getLogger("modelparallel").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("modelparallel").removeHandler(handler)
