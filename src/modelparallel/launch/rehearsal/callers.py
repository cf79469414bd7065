"""Who is asking: the user's script, or a library?

A frame belongs to the script if its code comes from a file below one of the script's directories, and not from a
standard library, an installed package or this library; or if it has no file and runs in `__main__`. A file of a
library counts as the script's where the library chooses CUDA for a job of this kind without asking whether it is there.
"""

import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

#: Names of functions that hand a request on as it came: a library's own `to` that calls `super().to`, a comprehension
#: in it, a decorator around it.
_PASSING = frozenset(
    {"to", "cuda", "pin_memory", "wrapper", "inner", "wrapped", "<lambda>", "<listcomp>", "<dictcomp>", "<genexpr>"}
)
_MAX_PASSING = 12

#: Files of libraries that take CUDA for granted in a job of ours: `TrainingArguments` makes each process's GPU the
#: current device.
_CUDA_BY_DEFAULT = (os.path.join(os.sep, "transformers", "training_args.py"),)


class ScriptCode:
    """Decides by file name, and remembers the decision."""

    def __init__(self, directories: Iterable[str | os.PathLike[str]]) -> None:
        self.directories = tuple(_with_separator(directory) for directory in directories)
        self._excluded = tuple(sorted(_library_directories()))
        self._decided: dict[str, bool] = {}

    def owns(self, frame: FrameType) -> bool:
        """Whether the frame runs code of the script."""
        name = frame.f_code.co_filename
        decided = self._decided.get(name)
        if decided is None:
            if name.startswith("<"):  # exec, -c, generated code: it is whose module it runs in
                return frame.f_globals.get("__name__") in ("__main__", "__mp_main__")
            decided = self._decided[name] = self._is_script_file(name)
        return decided

    def asks_through(self, frame: FrameType | None) -> bool:
        """Whether the script asks, directly or through library functions that only pass the request on."""
        for _ in range(_MAX_PASSING):
            if frame is None:
                return False
            if self.owns(frame):
                return True
            if frame.f_code.co_name not in _PASSING:
                return False
            frame = frame.f_back
        return False

    def _is_script_file(self, name: str) -> bool:
        path = os.path.realpath(name)
        if path.endswith(_CUDA_BY_DEFAULT):
            return True
        if not path.startswith(self.directories):
            return False
        return not path.startswith(self._excluded) and not {"site-packages", "dist-packages"} & set(Path(path).parts)


def _library_directories() -> set[str]:
    names = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    names |= {*site.getsitepackages(), site.getusersitepackages()}
    own = Path(__file__).resolve().parents[2]
    names |= {str(own), str(own.parent / "smdistributed")}
    torch = sys.modules.get("torch")
    if torch is not None and torch.__file__ is not None:
        names.add(os.path.dirname(torch.__file__))
    return {_with_separator(name) for name in names if name}


def _with_separator(directory: str | os.PathLike[str]) -> str:
    return os.path.join(os.path.realpath(directory), "")
