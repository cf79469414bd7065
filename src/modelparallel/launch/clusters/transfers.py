"""Files between a node and what is behind a URL of fsspec (s3://, gs://, https://, ...), or another folder.

What is fetched is there whole or not at all. Names that object stores allow and that would lead out of the folder are
refused.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from modelparallel.checkpoints.stores.file_streams import shown
from modelparallel.errors import LaunchError, SMPError

#: Files that are asked for at once: the stores of fsspec answer at the same time, and an error is about few.
_AT_ONCE = 256
_REMEDY = "check the address, the credentials of the node and their permissions, and the network"


@dataclass(frozen=True)
class _Remote:
    """A file of a store; `size` is None where the store does not tell."""

    path: str
    size: int | None


def is_url(location: str) -> bool:
    """Whether fsspec is needed to reach it."""
    return "://" in location and not location.startswith("file://")


def fetch(url: str, folder: Path, what: str) -> int:
    """Put what is behind a URL into a new folder: all files below it, or the one file that it is. Returns the bytes.

    Args:
        folder: made; it is complete when it is there.
        what: whose data it is, for errors.

    Raises `LaunchError`: there is nothing, or it cannot be read; naming the URL, the cause and the remedy.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with _explained(what, "fetching", url):
        fs, base = _opened(url)
        files = _files(fs, base)
        if not files:
            raise LaunchError(f"{what}: there is no file at {shown(url)}: {_REMEDY}")
        try:
            for name in files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
            for names in _groups(files):
                # Lists are taken as they are, where a single name would be a pattern.
                fs.get([files[name].path for name in names], [str(partial / name) for name in names])
            for name, file in files.items():
                arrived = (partial / name).stat().st_size
                if file.size is not None and arrived != file.size:
                    raise LaunchError(
                        f"{what}: {name} of {shown(url)} has {file.size} bytes, and {arrived} have arrived: it may "
                        "have changed meanwhile; start the job again"
                    )
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def names_at(url: str, what: str) -> dict[str, int | None]:
    """The files below a URL or a folder, by their relative names, with their sizes; empty if it is not there."""
    if not is_url(url):
        root = Path(url.removeprefix("file://"))
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in files_below(root)}
    with _explained(what, "listing", url):
        fs, base = _opened(url)
        return {name: file.size for name, file in _files(fs, base).items()}


def send(root: Path, names: Iterable[str], location: str, what: str) -> int:
    """Put files of a folder below a URL or into another folder, under the same names, in this order. Returns how many.

    A link counts as what it leads to. Raises `LaunchError`.
    """
    names = list(names)
    with _explained(what, "writing to", location):
        if not is_url(location):
            for name in names:
                target = Path(location.removeprefix("file://"), name)
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
                try:
                    shutil.copyfile(root / name, partial)
                    partial.replace(target)
                finally:
                    partial.unlink(missing_ok=True)
            return len(names)
        fs, base = _opened(location)
        for some in _groups(names):
            if not fs.async_impl:  # stores without folders do without
                for parent in sorted({posixpath.dirname(name) for name in some}):
                    fs.makedirs(f"{base.rstrip('/')}/{parent}".rstrip("/"), exist_ok=True)
            fs.put([str(root / name) for name in some], [f"{base.rstrip('/')}/{name}" for name in some])
    return len(names)


def files_below(root: Path) -> Iterator[Path]:
    """All files, those behind links to files too; links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():
                yield path


def _opened(url: str) -> tuple[Any, str]:
    import fsspec  # takes a while, and is needed for URLs only

    fs, base = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return fs, base


def _files(fs: Any, base: str) -> dict[str, _Remote]:
    try:
        information = fs.info(base)
    except FileNotFoundError:
        return {}
    if information["type"] == "file":
        # Of https:// the path is the whole URL.
        name = unquote(posixpath.basename(urlsplit(base).path if "://" in base else base))
        return {_checked(name or "data", base): _Remote(base, information.get("size"))}
    prefix = base.strip("/")
    files = {}
    for path, entry in sorted(fs.find(base, detail=True).items()):
        name = path.strip("/")[len(prefix) :].strip("/") if path.strip("/").startswith(prefix) else path
        # Some tools put an empty file in the place of a folder.
        if entry.get("type", "file") == "file" and name and not path.endswith("/"):
            files[_checked(name, base)] = _Remote(path, entry.get("size"))
    return files


def _checked(name: str, base: str) -> str:
    if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise LaunchError(f"{name!r} in {shown(base)} is no name that a file can have: rename it there")
    return name


def _groups(names: Iterable[str]) -> Iterator[list[str]]:
    listed = list(names)
    for first in range(0, len(listed), _AT_ONCE):
        yield listed[first : first + _AT_ONCE]


@contextmanager
def _explained(what: str, action: str, location: str) -> Iterator[None]:
    try:
        yield
    except SMPError:
        raise
    except ImportError as error:
        package = "'modelparallel[s3]'" if location.startswith(("s3:", "s3a:")) else ""
        remedy = f"pip install {package} on the nodes" if package else str(error)
        raise LaunchError(f"{what}: {shown(location)} needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        raise LaunchError(
            f"{what}: {shown(location)} cannot be opened: {error}. Give a path, or a URL that fsspec knows, such as "
            "s3://bucket/folder"
        ) from error
    except Exception as error:  # each store has its own
        cause = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
        with suppress(AttributeError):
            cause = cause.replace(location, shown(location))
        raise LaunchError(f"{what}: {action} {shown(location)} failed: {cause}; {_REMEDY}") from error
