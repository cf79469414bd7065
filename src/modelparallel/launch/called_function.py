"""The script of a job that was started by `notebook`; see [Note: a call in a job]."""

import sys

# Started by path: its neighbours must not be importable as top-level modules.
if __name__ == "__main__":
    del sys.path[0]

import linecache
import os
import pickle
from pathlib import Path

from modelparallel.errors import LaunchError
from modelparallel.job.discovery import discover_process
from modelparallel.launch.notebooks import CALL_VARIABLE, dumped, globals_of, result_file


def main() -> None:
    call = Path(os.environ[CALL_VARIABLE])
    description = pickle.loads((call / "call.pickle").read_bytes())
    # Where the caller finds its modules, this process finds them.
    sys.path[:] = [*description["sys_path"], *(path for path in sys.path if path not in description["sys_path"])]
    for name, text in description["sources"].items():
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    function, args, kwargs = pickle.loads(description["content"])
    # Classes of cells are found by name where something pickles their objects: a checkpoint, a message, a data loader.
    known, own = globals_of(function), vars(sys.modules["__main__"])
    if known.get("__name__") == "__main__":
        own.update((name, value) for name, value in known.items() if name not in own)
    returned = function(*args, **kwargs)
    global_rank = discover_process(os.environ).global_rank
    if global_rank and not description["all_ranks"]:
        return
    try:
        content = dumped(returned)
    except Exception as error:
        raise LaunchError(
            f"notebook: what the function returned on rank {global_rank}, a {type(returned).__name__}, cannot be "
            f"copied back ({type(error).__name__}: {error}): return numbers, tensors or a state dict"
        ) from error
    result_file(call, global_rank).write_bytes(content)


if __name__ == "__main__":
    main()
