"""Files that somebody else may have written: read without trust, and shown without harm."""

import json
import math
import re
from typing import Any

#: Deeper than anything that this library or transformers writes, and shallow enough for every function that recurses.
_MOST_LEVELS = 100
_MOST_SHOWN = 20_000
# What moves the cursor, colours, rings, hides or turns round what a terminal shows; halves of characters.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def parse_json(data: bytes | str) -> Any:
    """As ``json.loads``. Raises ValueError for everything that is not whole JSON, and for absurd nesting."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def natural(value: Any, what: str, most: int = 2**63 - 1) -> int:
    """The value, if it is an int from 0 to ``most``. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{what} is {value!r:.100}, and no number from 0 to {most}")
    return value


def finite(value: Any, what: str) -> float:
    """The value, if it is a number that is not infinite. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r:.100}, and no finite number")
    return float(value)


def printable(text: str) -> str:
    """The text with all that a terminal would obey in place of showing it written out, as in ``\\x1b[2J``; lines and
    tabs stay.
    """
    if len(text) > _MOST_SHOWN * 50:
        text = text[: _MOST_SHOWN * 50] + " ..."
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def one_line(value: Any) -> str:
    """The value as text of one line that can be printed, not too long."""
    text = str(value)
    text = text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + " ..."
    return printable(text).replace("\n", "\\n").replace("\t", " ")
