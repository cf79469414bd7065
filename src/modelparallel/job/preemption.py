"""A job that has to make room for another one, or whose time is nearly over: it is asked, and its script saves.

[Note: preemption] Whoever ends the job says so some time before: a batch system by a signal, a cloud by a notice. What
stands between that and the script is a file on each host, at `FILE_VARIABLE`: the launcher makes it when it has got
the signal, and ranks look for it when the script asks. One rank that has seen it is enough, since the answer is agreed.
The script then saves and leaves with `EXIT_PREEMPTED`: the launcher passes that on, and the batch system puts the job
back into its queue. It is no failure: no attempt counts, and no rank is ended by the launcher.

Batch systems signal every process on a host, so a rank which asks survives the signals, too. Where no launcher of this
library has started it (srun, torchrun, plain Python), they are what it learns the request from.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

#: What a script exits with that has saved its state because the job is preempted (smp.EXIT_PREEMPTED).
EXIT_PREEMPTED = 85
#: The file that the launcher makes when the job is to be preempted.
FILE_VARIABLE = "MODELPARALLEL_PREEMPTION_FILE"
#: Added to the name of that file: what a rank makes when the script asks for the first time, for the launcher to know.
ASKS_SUFFIX = ".asks"

#: How long a rank that was told to end waits for the launcher to say that it is a preemption: both get the signal.
_LAUNCHER_SECONDS = 2.0
_POLL_SECONDS = 0.05


class PreemptionNotice:
    """What this process knows of a preemption by itself. One per session, made by the first question."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get(FILE_VARIABLE)
        self._path = path or None
        self._was_signalled = False
        self.is_agreed = False
        self._replaced: dict[signal.Signals, signal.Handlers] = {}
        if self._path is not None:
            with suppress(OSError):  # a full disk: the launcher then ends the job as any other
                os.close(os.open(self._path + ASKS_SUFFIX, os.O_WRONLY | os.O_CREAT, 0o600))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                if signal.getsignal(number) is signal.SIG_DFL:  # a script's own handler knows better
                    signal.signal(number, self._note_signal)
                    self._replaced[number] = signal.SIG_DFL

    @property
    def is_seen(self) -> bool:
        """Whether this rank has been told, by the file or by a signal."""
        return self._was_signalled or (self._path is not None and os.path.exists(self._path))

    def close(self) -> None:
        """Put back what signals did before."""
        replaced, self._replaced = self._replaced, {}
        for number, handler in replaced.items():
            with suppress(ValueError):  # not the main thread
                signal.signal(number, handler)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        """SIGUSR1 asks. SIGTERM does so once, unless a launcher ends the job by it: that one answers for itself."""
        if self._path is None:
            if number == signal.SIGTERM and self._was_signalled:
                self._end_by(number)
            self._was_signalled = True
        elif number == signal.SIGTERM:
            deadline = time.monotonic() + _LAUNCHER_SECONDS
            while not os.path.exists(self._path):
                if time.monotonic() > deadline:
                    self._end_by(number)
                time.sleep(_POLL_SECONDS)

    def _end_by(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
