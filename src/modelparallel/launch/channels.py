"""Input channels: what `fit(...)` and `--channel` name, as directories or files of this machine."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from modelparallel.errors import LaunchError, NotBuiltError


def input_channels(inputs: Any) -> dict[str, Path]:
    """The channels of `fit(inputs)`: a single location is the channel `training` (smp-config section 3).

    Raises `LaunchError` for a location that does not exist and `NotBuiltError` for s3://.
    """
    if inputs is None:
        return {}
    if isinstance(inputs, str | os.PathLike):
        inputs = {"training": inputs}
    if not isinstance(inputs, Mapping):
        raise LaunchError(
            f"inputs: expected a path, a file:/// location or a dict of them, got {type(inputs).__name__} {inputs!r}"
        )
    return {_checked_name(name): local_path(location, f"channel {name!r}") for name, location in inputs.items()}


def channel_option(text: str) -> tuple[str, str]:
    """Split `NAME=PATH` of the command line."""
    name, separator, location = text.partition("=")
    if not separator or not name or not location:
        raise LaunchError(f"--channel: expected NAME=PATH, got {text!r}: for example --channel train=data/train")
    return name, location


def local_path(location: Any, what: str, *, must_exist: bool = True) -> Path:
    """The absolute path of a plain path or a file:/// location."""
    if not isinstance(location, str | os.PathLike):
        raise LaunchError(f"{what}: expected a path or a file:/// location, got {type(location).__name__} {location!r}")
    text = os.fspath(location)
    parts = urlsplit(text)
    if parts.scheme == "s3":
        raise NotBuiltError(f"{what}: {text}: reading from s3:// is not built yet: copy it and give the local path")
    if "://" in text:
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise LaunchError(f"{what}: {text}: only plain paths and file:///absolute/path can be used")
        text = url2pathname(parts.path)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if must_exist and not path.exists():
        raise LaunchError(f"{what}: {path} does not exist: give a directory or file of this machine")
    return path


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise LaunchError(f"channel name {name!r}: use letters, digits, '.', '_' and '-'")
    return name
