"""Opening what ``torch.save`` has pickled, without running code that somebody has put there."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import IO, Any

import torch

from modelparallel.errors import CheckpointCorruptError, CheckpointError


def open_object(
    data: IO[bytes], what: str, allowed: Sequence[Any] = (), *, trusts_pickles: bool = False, map_location: Any = "cpu"
) -> Any:
    """The saved object. Local. ``what`` names it in errors.

    Tensors and plain types open always, objects of the classes ``allowed`` too; ``trusts_pickles`` opens any, which
    runs code that is in the file. Raises CheckpointError for others, CheckpointCorruptError for what is no saved
    object.
    """
    if trusts_pickles:
        return torch.load(data, map_location=map_location, weights_only=False)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(data, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" not in text and "allow" not in text.lower():
            raise CheckpointCorruptError(f"{what} is no saved object: {_first_line(text)}") from error
        raise CheckpointError(
            f"{what} holds objects that are not opened without being asked to, since opening them can run code "
            f"({_unsupported(text)}). If you know where the file comes from, name their classes "
            "(allowed_types=[...]), or pass trust_pickles=True"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointCorruptError(f"{what} is no saved object: {_first_line(str(error))}") from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "it is empty"


def _unsupported(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "GLOBAL" in line or "global" in line]
    return lines[-1] if lines else _first_line(text)
