"""Packages that a job wants on its nodes: installed once, beside the job, on top of what the nodes have.

    FOLDER/env/<digest>/       a virtual environment; the digest is of the requirements and of the interpreter
    FOLDER/env/<digest>.log    what pip said

The environment sees the packages of the interpreter that runs this command, so that torch is not installed again, and
is used by PYTHONPATH and PATH of the processes. Where nodes share the folder, the first that comes installs and the
others wait; without locks on the file server they may all install, and the first that is ready counts.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from modelparallel.errors import LaunchError

#: Seconds for pip, and for waiting for the node that runs it.
INSTALL_SECONDS = 3600.0
_POLL_SECONDS = 5.0
_SAY_SECONDS = 60.0
_TAIL_LINES = 15


def install_requirements(
    code: Path, requirements: str, folder: Path, say: Callable[[str], None], *, seconds: float = INSTALL_SECONDS
) -> Path:
    """The environment with the packages of a requirements file, made if it is not there.

    Args:
        code: the directory of the code; paths in the file are relative to it.
        requirements: the file, relative to `code`.
        folder: the job folder.

    Raises `LaunchError`: pip fails, with its last words; or the node that installs is not ready in time.
    """
    file = code / requirements
    try:
        text = file.read_bytes()
    except OSError as error:
        raise LaunchError(f"requirements {file} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(text + f"{sys.executable} {platform.python_version()}".encode()).hexdigest()[:12]
    target = folder / "env" / digest
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _only_one(target, say, seconds):
            if not target.is_dir():
                say(f"installing {requirements} into {target}")
                _install(code, file, target, seconds)
    except OSError as error:
        raise LaunchError(f"{target} cannot be made: {error.strerror or error}") from error
    return target


def environment_with(env: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables with which processes find the packages of the environment, before all others."""
    packages = sysconfig.get_path("purelib", vars={"base": str(env), "platbase": str(env)})
    paths = {"PYTHONPATH": packages, "PATH": str(env / "bin")}
    return {name: os.pathsep.join(filter(None, (path, environ.get(name)))) for name, path in paths.items()}


class _only_one:
    """The lock of an installation. Who waits says for whom."""

    def __init__(self, target: Path, say: Callable[[str], None], seconds: float) -> None:
        self._lock = FileLock(target.with_name(f"{target.name}.lock"))
        self._holder = target.with_name(f"{target.name}.holder")
        self._target, self._say, self._seconds = target, say, seconds

    def __enter__(self) -> None:
        started, said = time.monotonic(), float("-inf")
        while True:
            try:
                self._lock.acquire(timeout=min(_POLL_SECONDS, self._seconds))
                break
            except NotImplementedError:  # a file server without locks
                return
            except Timeout:
                pass
            waited = time.monotonic() - started
            if waited >= said + _SAY_SECONDS:
                said = waited
                self._say(f"waiting for {self._who()}, which installs the requirements")
            if waited > self._seconds:
                raise LaunchError(
                    f"{socket.gethostname()} has waited {waited:.0f} s for {self._who()}, which installs the "
                    f"requirements of the job into {self._target}: look at {self._target}.log"
                )
        with suppress(OSError):
            self._holder.write_text(f"{socket.gethostname()} (process {os.getpid()})", encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _who(self) -> str:
        try:
            return self._holder.read_text(encoding="utf-8") or "another node"
        except OSError:
            return "another node"


def _install(code: Path, file: Path, target: Path, seconds: float) -> None:
    partial = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.partial")
    log = target.with_name(f"{target.name}.log")
    try:
        venv.EnvBuilder(with_pip=False, symlinks=True).create(partial)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(partial), "platbase": str(partial)}))
        # The interpreter may stand in a virtual environment itself, which another one does not see by its own means.
        outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "_outer_packages.pth").write_text(
            "".join(f"import site; site.addsitedir({path!r})\n" for path in outer), encoding="utf-8"
        )
        command = [str(partial / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        with open(log, "wb") as output:
            result = subprocess.run(
                [*command, "-r", str(file)], cwd=code, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=seconds,
            )  # fmt: skip
        if result.returncode != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
            raise LaunchError(
                f"requirements {file} cannot be installed on {socket.gethostname()} (pip has ended with "
                f"{result.returncode}; its log: {log}):\n" + "\n".join(lines)
            )
        with suppress(OSError):  # another node was faster; its environment is as good
            partial.rename(target)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"requirements {file}: pip was not ready after {seconds:.0f} s on {socket.gethostname()}; its log: {log}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
