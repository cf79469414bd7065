"""An exception of one rank, for the others to raise: of the user's own type, so that a script catches it on all."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RaisedError:
    """``state`` is pickled: the exception, or where that cannot be read back its class, or the nearest base that can be
    found by its name on another rank, its arguments and its attributes. ``names`` are of the class and its module.
    """

    text: str
    names: tuple[str, str]
    state: bytes

    @staticmethod
    def of(error: BaseException) -> RaisedError:
        """What another rank must know of ``error``."""
        text, names = f"{type(error).__name__}: {error}", (type(error).__name__, type(error).__module__)
        # Its constructor is called with what it has made of its arguments, and may make something else of that.
        if _is_found(error) and str(pickle.loads(pickle.dumps(error))) == str(error):
            return RaisedError(text, names, pickle.dumps(error))
        known = next(cls for cls in type(error).__mro__ if _is_found(cls))
        arguments = error.args if _is_found(error.args) else (str(error),)
        attributes = {name: value for name, value in vars(error).items() if _is_found(value)}
        return RaisedError(text, names, pickle.dumps((known, arguments, attributes)))

    def rebuilt(self) -> BaseException:
        """The exception. Its constructor is not called, which may want other arguments than the exception keeps."""
        state = pickle.loads(self.state)
        if isinstance(state, BaseException):
            return state
        known, arguments, attributes = state
        name, module = self.names
        cls: Any = known if known.__name__ == name else type(name, (known,), {"__module__": module})
        error: BaseException = cls.__new__(cls, *arguments)
        error.args = arguments
        for name, value in attributes.items():
            setattr(error, name, value)
        return error


def _is_found(value: Any) -> bool:
    """Whether another rank can read it."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # a class may do anything when it is pickled
        return False
    return True
