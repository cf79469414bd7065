"""How a command of the command line stops with an error."""

import sys
from typing import NoReturn

import typer
from rich.console import Console


def stop(message: str, code: int) -> NoReturn:
    """Print the message to stderr and end the command with this exit code."""
    sys.stdout.flush()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False)
    raise typer.Exit(code)
