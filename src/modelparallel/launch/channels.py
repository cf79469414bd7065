"""Input channels: what `fit(...)` and `--channel` name: directories and files of this machine, and URLs."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.transfers import is_url

_MAX_NAME = 128
#: Of an input that is given without a name.
DEFAULT_CHANNEL = "training"


def input_channels(inputs: Any) -> dict[str, Path | str]:
    """The channels of `fit(inputs)`: a single location is the channel `training` (smp-config section 3).

    A URL that fsspec opens (s3://, gs://, https://, ...) stays a text. Raises `LaunchError` for a path that does not
    exist.
    """
    if inputs is None:
        return {}
    if isinstance(inputs, str | os.PathLike):
        inputs = {DEFAULT_CHANNEL: inputs}
    if not isinstance(inputs, Mapping):
        raise LaunchError(
            f"inputs: expected a path, a file:/// location or a dict of them, got {type(inputs).__name__} {inputs!r}"
        )
    check_channel_names(inputs)
    return {name: _location(location, f"channel {name!r}") for name, location in inputs.items()}


def _location(location: Any, what: str) -> Path | str:
    if isinstance(location, str) and is_url(location):
        return location
    return local_path(location, what)


def channel_options(texts: Sequence[str]) -> dict[str, str]:
    """Split each `NAME=PATH` of the command line."""
    locations: dict[str, str] = {}
    for text in texts:
        name, separator, location = text.partition("=")
        if not separator or not name or not location:
            raise LaunchError(f"--channel: expected NAME=PATH, got {text!r}: for example --channel train=data/train")
        if name in locations:
            raise LaunchError(f"--channel: {name!r} is given twice: give each channel a name of its own")
        locations[name] = location
    return locations


def local_path(location: Any, what: str, *, must_exist: bool = True) -> Path:
    """The absolute path of a plain path or a file:/// location."""
    if not isinstance(location, str | os.PathLike):
        raise LaunchError(f"{what}: expected a path or a file:/// location, got {type(location).__name__} {location!r}")
    text = os.fspath(location)
    if not isinstance(text, str) or not text or "\0" in text:
        raise LaunchError(f"{what}: {text!r} is no path: give a directory or file of this machine")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise LaunchError(f"{what}: {text!r} is no path or file:/// location ({error})") from error
    if "://" in text:
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise LaunchError(f"{what}: {text}: only plain paths and file:///absolute/path can be used")
        text = url2pathname(parts.path)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if must_exist and not path.exists():
        raise LaunchError(f"{what}: {path} does not exist: give a directory or file of this machine")
    return path


def check_channel_names(names: Iterable[Any]) -> None:
    """Each is the name of a directory and, in capitals, of a variable: SM_CHANNEL_<NAME>. Raises `LaunchError`."""
    variables: dict[str, str] = {}
    for name in names:
        is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9._-]+", name) and name.strip(".")
        if not is_name or len(name) > _MAX_NAME:
            raise LaunchError(
                f"channel name {name!r}: use letters, digits, '.', '_' and '-', at most {_MAX_NAME}, and not dots alone"
            )
        other = variables.setdefault(name.upper(), name)
        if other != name:
            raise LaunchError(
                f"channels {other!r} and {name!r} would both be SM_CHANNEL_{name.upper()}: rename one of them"
            )
