"""Libraries of the engines, which the environment of the tests does without: installed beside it, once."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

#: Packages of hundreds of megabytes, on a busy machine.
INSTALL_SECONDS = 600


def folder_of(*requirements):
    """A folder with these packages and what they need, for `sys.path`. Skips the test where pip refuses."""
    return _made(requirements, _install_beside)


def python_of(*requirements):
    """The interpreter of an environment of their own. Skips the test where pip refuses."""
    return _made(requirements, _install_apart) / "bin" / "python"


def _made(requirements, install):
    digest = hashlib.sha256("\n".join((install.__name__, *requirements)).encode()).hexdigest()[:12]
    folder = Path(sys.prefix) / "clusters" / digest
    if not folder.exists():
        partial = folder.with_name(f"{digest}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        started = time.monotonic()
        try:
            install(partial, requirements)
        except (subprocess.SubprocessError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            said = getattr(error, "stderr", None) or b""
            pytest.skip(f"cannot install {', '.join(requirements)}: {error} {said.decode(errors='replace')[-500:]}")
        print(f"installed {', '.join(requirements)} in {time.monotonic() - started:.0f} s")
        # An environment knows its own path only in scripts, which are not used.
        partial.rename(folder)
    return folder


def _install_beside(folder, requirements):
    _pip(sys.executable, "--target", str(folder), *requirements)


def _install_apart(folder, requirements):
    venv.create(folder, with_pip=True)
    _pip(str(folder / "bin" / "python"), *requirements)


def _pip(python, *arguments):
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS)
