"""All ranks come to the same end: what fails on one rank raises on every rank, and none is left waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modelparallel.checkpoints.stores.completion import new_token
from modelparallel.config.topology import CommGroup
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError, DivergenceError
from modelparallel.job.messages import told_by_all


@contextmanager
def agreed() -> Iterator[None]:
    """Work of each rank alone, after which all ranks hear of each other's failures. Collective over the world.

    A rank whose block raised raises that error; the others raise a CheckpointError of the same class with its text. No
    communication must be in the block that an error could keep a rank from.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    mine = None if error is None else (type(error).__name__, str(error))
    reports = told_by_all(mine, CommGroup.WORLD, "the ranks' agreement on a checkpoint")
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise error_class(report[0])(f"rank {rank} failed: {report[0]}: {report[1]}")


def agreed_token(function: str, **arguments: Any) -> str:
    """A text of rank 0 for this call of ``function``, which all ranks must make alike. Collective over the world.

    Raises DivergenceError on all ranks if the arguments differ.
    """
    answers = told_by_all((arguments, new_token()), CommGroup.WORLD, function)
    first = answers[0][0]
    for rank, (other, _) in enumerate(answers):
        if other != first:
            raise DivergenceError(
                f"{function} was called with {first} on rank 0 and {other} on rank {rank}: call it with equal "
                "arguments on all ranks"
            )
    return str(answers[0][1])


def error_class(name: str) -> type[CheckpointError]:
    """The class of an error that another rank has told the name of."""
    known: tuple[type[CheckpointError], ...] = (CheckpointNotFoundError, CheckpointCorruptError)
    return next((cls for cls in known if cls.__name__ == name), CheckpointError)
