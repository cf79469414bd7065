"""How a process leaves its job: it does not abort, and waits for nobody longer than it must.

[Note: the end of a process] Once the interpreter has begun to end, Python kills a thread that asks for it, in a way
that C++ answers by aborting the process ("terminate called without an active exception"): a script that had done its
work counts as crashed. Threads that may ask are those that listen to a peer, which wake when it says something or goes;
those that save in the background; and gloo's own, which report an operation first and let go of its tensors afterwards.
How late a peer comes to its end is up to the machine, so nothing may depend on it. The end is a row of steps:

1. What works in the background is finished, before Python waits for its thread without a limit (`finish_background`).
2. The peers are told goodbye, so that one which still waits for this process learns that nothing will come.
3. All ranks meet, so that no connection is closed under the last words of another. Not for long: what follows needs
   nobody.
4. This process closes its connections. That ends every wait in them, in any thread, whether the peer is stopped, slow
   or gone. So the threads can be joined, and are known to have ended.
5. The groups are destroyed, and gloo's threads get the interpreter until all sleep.

After an error nobody is met, since the others may never come. Should a thread be left all the same (it hangs in the
system, or is the script's own), the launcher's worker, which knows the exit code, ends the process without the end of
the interpreter (`leave_at_once`). Where something else has started the script, the code is known to the interpreter
alone: it ends as always, and a thread that C++ would abort the process for sleeps instead (`keep_from_aborting`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from modelparallel.config.reading import Config

logger = logging.getLogger("modelparallel")

#: How long a rank that has done its work waits for the others to come to their end.
MEETING_SECONDS = 10.0
#: How long a rank that has failed waits for what it cannot know to be possible.
AFTER_ERROR_SECONDS = 5.0
#: In which threads end whose waits are over, and gloo's let go of what they hold; far more than they need.
_THREAD_SECONDS = 30.0
#: In which the interpreter ends once nothing of the script is left to run.
_LAST_SECONDS = 120
_TAG_OF_NOTHING = 5299  # nobody sends by it


class Leaving(Protocol):
    """What has threads that listen to other ranks."""

    def say_goodbye(self) -> None:
        """Called before the ranks meet."""

    def close(self) -> None:
        """Called afterwards."""


class LeavingSession(Protocol):
    """What the end needs of the session of the process; `modelparallel.job.session.Session` is one."""

    ends_by_error: bool
    finishers: list[Callable[[float], None]]
    closers: list[Callable[[], None]]
    transports: list[Leaving]

    @property
    def config(self) -> Config: ...

    @property
    def made_groups(self) -> Mapping[Any, dist.ProcessGroup]: ...

    @property
    def message_group(self) -> dist.ProcessGroup: ...

    @property
    def made_default_group(self) -> bool: ...


def has_failed(session: LeavingSession) -> bool:
    """Whether this process ends because of an error."""
    seen = (sys.exc_info()[1], getattr(sys, "last_exc", None), getattr(sys, "last_value", None))
    return session.ends_by_error or any(error is not None for error in seen)


def before_threads_end(action: Callable[[], None]) -> None:
    """Have ``action`` called when the script is over, before Python waits for the threads of executors."""
    # Private, but there since Python 3.9 and used by concurrent.futures itself, whose handler came first: the last one
    # to be registered runs first.
    import concurrent.futures.thread  # noqa: F401

    register: Any = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):  # the interpreter ends already
            register(action)


def finish_background(session: LeavingSession) -> None:
    """Step 1 of the note. Local."""
    finishers, session.finishers = session.finishers, []
    seconds = AFTER_ERROR_SECONDS if has_failed(session) else session.config.timeout_seconds
    for finish in finishers:
        try:
            finish(seconds)
        except Exception as error:
            # At the end of a process nobody is there to catch it.
            logger.error("at the end of the process: %s: %s", type(error).__name__, error)


def leave(session: LeavingSession) -> None:
    """The whole end of the note, for a session that is not the current one any more. Local."""
    finish_background(session)
    is_failed = has_failed(session)
    groups = list({id(group): group for group in session.made_groups.values()}.values())
    steps: list[Callable[[], object]] = [
        *session.closers,
        *(transport.say_goodbye for transport in session.transports),
        *(() if is_failed else (lambda: meet(session),)),
        lambda: close_connections(groups),
        *(transport.close for transport in session.transports),
        lambda: destroy_groups(session, groups),
        let_threads_finish,
    ]
    for step in steps:
        try:
            step()
        except Exception:  # the others are due all the same
            logger.exception("at the end of the process")


def meet(session: LeavingSession) -> None:
    """Step 3: wait until all ranks have come to their end, for a few seconds at most."""
    group = session.message_group
    if group.size() > 1:
        with contextlib.suppress(RuntimeError):  # some have gone, or stay longer
            seconds = min(MEETING_SECONDS, session.config.timeout_seconds)
            group.allreduce([torch.zeros(1)]).wait(timedelta(seconds=seconds))


def close_connections(groups: Iterable[Any]) -> None:
    """Step 4: end all that this process waits for in these groups by an error. Local."""
    for group in groups:
        # NCCL has a call for it; gloo, where it does nothing, closes all connections of a group once a single receive
        # is given up. One from a peer that has gone fails otherwise, and closes nothing, so all are tried.
        with contextlib.suppress(RuntimeError):
            group.abort()
        for peer in range(group.size()):
            if peer == group.rank():
                continue
            try:
                group.recv([torch.empty(1)], peer, _TAG_OF_NOTHING).wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                if "timed out" in str(error).lower():
                    break


def join_threads(threads: Iterable[threading.Thread]) -> bool:
    """Wait for threads whose waits are over. Whether all have ended."""
    deadline = time.monotonic() + _THREAD_SECONDS
    left = []
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            left.append(thread.name)
    if left:
        logger.warning("at the end of the process these threads do not end: %s", ", ".join(left))
    return not left


def destroy_groups(session: LeavingSession, groups: Iterable[Any]) -> None:
    """Step 5: forget the groups that the session has made, and the default one if it is the session's."""
    if session.made_default_group:
        dist.destroy_process_group()
        return
    for group in groups:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def let_threads_finish() -> bool:
    """Give gloo's threads the interpreter until all sleep; whether they do.

    Destroying a group waits for its threads only if nothing refers to it any more, and scripts and models do.
    """
    folder = Path("/proc/self/task")
    if not folder.is_dir():
        time.sleep(0.4)
        return True
    deadline = time.monotonic() + _THREAD_SECONDS
    num_quiet = 0
    while num_quiet < 3:
        # Asleep, this thread leaves the interpreter to one that waits for it. Once is not enough: a thread may come to
        # wait for the interpreter, which looks like sleep, while this one is looking.
        time.sleep(0.002)
        num_quiet = 0 if _is_thread_running(folder) else num_quiet + 1
        if time.monotonic() > deadline:
            return False
    return True


def _is_thread_running(folder: Path) -> bool:
    """Whether a thread of this process other than the caller's wants a processor, or a disk (Linux)."""
    for task in folder.iterdir():
        if int(task.name) == threading.get_native_id():
            continue
        try:
            # "pid (name) state ..."; the name may contain anything but is followed by the last bracket.
            if (task / "stat").read_text().rpartition(")")[2].split()[0] in "RD":
                return True
        except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
            continue
    return False


def keep_from_aborting() -> None:
    """The last resort, when nothing of the script is left to run but threads are: let the thread that would abort the
    process sleep, so that the interpreter ends with the exit code of the script. Where it waits for that thread, it is
    killed after some time (SIGALRM). Linux.
    """
    if threading.active_count() == 1 and let_threads_finish():
        return
    if (processes := sys.modules.get("multiprocessing")) is not None:
        # They are waited for anyway, and may take longer than the interpreter is given below.
        for child in processes.active_children():
            if not child.daemon:
                child.join()
    try:
        library, system = ctypes.CDLL("libstdc++.so.6"), ctypes.CDLL(None)
        set_terminate = library._ZSt13set_terminatePFvvE  # std::set_terminate(void (*)())
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LAST_SECONDS)
    except (OSError, AttributeError, ValueError):  # not there, or not called in the main thread
        return
    set_terminate.argtypes = [ctypes.c_void_p]
    set_terminate(ctypes.cast(system.pause, ctypes.c_void_p))


def leave_at_once(exit_code: int) -> NoReturn:
    """End the process now; the interpreter does not come to its end. What the script wrote is not lost."""
    for kept in gc.get_objects():
        if issubclass(type(kept), io.IOBase):  # a file that the script has not closed
            with contextlib.suppress(Exception):
                kept.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)
