"""What every test needs before it is imported, and ``--without-ranks``."""

import multiprocessing.forkserver
import multiprocessing.process
import subprocess
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

import pool  # sets the environment of all ranks and declares torchvision's operators; transformers breaks without
from modelparallel.job import session

__all__ = ["pool"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without-ranks",
        action="store_true",
        help="skip each test at the moment when it would start a process: ranks, jobs and commands (make test-fast)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # By what a test does, not by a list: a new test of ranks needs no mark, and one without ranks is never left out.
    if config.getoption("--without-ranks"):
        multiprocessing.process.BaseProcess.start = skip_instead
        multiprocessing.forkserver.ensure_running = skip_instead
        subprocess.Popen.__init__ = skip_instead


@pytest.fixture(autouse=True)
def no_session_stays() -> Iterator[None]:
    """A test that calls smp.init does so in a process of its own: the tests of a process share nothing."""
    yield
    assert not session.is_initialized(), "this test has left a session in the process of the tests"


def skip_instead(*args: Any, **kwargs: Any) -> NoReturn:
    """In place of whatever starts a process."""
    pytest.skip("starts a process")
