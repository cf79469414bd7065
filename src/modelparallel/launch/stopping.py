"""How a command of the command line stops with an error."""

import sys
from contextlib import suppress
from typing import NoReturn

import typer
from rich.console import Console


def stop(message: str, code: int) -> NoReturn:
    """Print the message to stderr and end the command with this exit code."""
    # The exit code counts, also where nothing can be shown: a full disk, a closed pipe.
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, ValueError, SystemExit):  # the last is what rich makes of a closed pipe
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("error:", style="bold red", end=" ")
        console.print(message, markup=False)
    raise typer.Exit(code)
