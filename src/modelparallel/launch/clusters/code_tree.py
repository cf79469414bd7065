"""What the code of a job consists of: the files, folders and links that other machines are to get, and nothing else.

Only looks at files. packing.py writes them.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.ignored_files import OWN_FILE, IgnoreRules

#: Bytes of all files together, before compression. More is data, which belongs into a channel.
MOST_BYTES = 500 * 10**6
_MOST_SHOWN = 5


@dataclass(frozen=True)
class CodeEntry:
    """One file, folder or link.

    Attributes:
        name: where it is put, relative, with `/`.
        source: what is copied; None if `content` is.
        link: of a link: the target, relative to the link's folder and inside the tree.
        content: of a file that is made.
    """

    name: str
    kind: Literal["file", "folder", "link"]
    source: Path | None = None
    size: int = 0
    is_executable: bool = False
    link: str = ""
    content: bytes | None = None

    @staticmethod
    def made(name: str, content: bytes) -> CodeEntry:
        """A file that does not lie in the source directory."""
        return CodeEntry(name, "file", size=len(content), content=content)

    def read(self) -> bytes:
        """The bytes of a file. Raises `LaunchError`."""
        if self.content is not None or self.source is None:
            return self.content or b""
        try:
            return self.source.read_bytes()
        except OSError as error:
            raise LaunchError(f"{self.source} cannot be read: {error.strerror}") from error


def code_entries(job: ClusterJob, *, without: Path | None = None) -> dict[str, CodeEntry]:
    """All of the code of a job, by name and sorted: `source_dir`, and the dependencies beside it.

    Left out are what the ignore files name (ignored_files.py), what is neither a file, a folder nor a link, and the
    folder `without`.

    Raises `LaunchError`: entry point or requirements are missing or left out, a link leads out, two trees have a name
    in common, a file cannot be read, or all is more than 500 MB.
    """
    root = _directory(job.source_dir, "source_dir")
    rules = IgnoreRules(root, without)
    entries = {entry.name: entry for entry in _tree(root, root, "", rules, "source_dir")}
    for name, what in ((job.entry_point, "entry point"), (job.requirements, "requirements")):
        if name is not None:
            _check_present(name, what, root, entries, rules)
    for dependency in job.dependencies:
        added = list(_dependency(Path(dependency), without))
        top = added[0].name
        if top in entries:
            raise LaunchError(
                f"dependency {dependency}: {top!r} is there already, from {entries[top].source}: dependencies are put "
                "beside the code under their own names; rename one of them"
            )
        entries |= {entry.name: entry for entry in added}
    total = sum(entry.size for entry in entries.values())
    if total > MOST_BYTES:
        raise LaunchError(
            f"the code of job {job.name} in {root} has {_megabytes(total)}, more than {_megabytes(MOST_BYTES)}: "
            f"{_biggest(entries)}. Name what is not code in {root / OWN_FILE} (patterns as in .gitignore), and give "
            "data as channels"
        )
    return dict(sorted(entries.items()))


def _directory(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise LaunchError(f"{what} {path} is no directory: give the directory of the code")
    return Path(os.path.realpath(path))


def _dependency(path: Path, without: Path | None) -> Iterator[CodeEntry]:
    """A file or a directory, under its own name."""
    name = Path(os.path.abspath(path)).name
    real = Path(os.path.realpath(path))
    if not name or not real.exists():
        raise LaunchError(f"dependency {path} does not exist: give a file or directory of this machine")
    if real.is_dir():
        yield CodeEntry(name, "folder", real)
        yield from _tree(real, real, f"{name}/", IgnoreRules(real, without), f"dependency {path}")
    else:
        yield _file(real, name)


def _tree(folder: Path, root: Path, prefix: str, rules: IgnoreRules, what: str) -> Iterator[CodeEntry]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise LaunchError(f"{what}: {folder} cannot be read: {error.strerror}: leave it out by {OWN_FILE}") from error
    for entry in entries:
        path, name = folder / entry.name, prefix + entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        rule = rules.rule_for(path, is_folder)
        if rule is not None and rule.leaves_out:
            continue
        if entry.is_symlink():
            yield CodeEntry(name, "link", path, link=_target(path, root, what))
        elif is_folder:
            yield CodeEntry(name, "folder", path)
            yield from _tree(path, root, f"{name}/", rules, what)
        elif entry.is_file(follow_symlinks=False):
            yield _file(path, name)


def _file(path: Path, name: str) -> CodeEntry:
    status = path.stat()
    return CodeEntry(name, "file", path, status.st_size, bool(status.st_mode & 0o100))


def _target(link: Path, root: Path, what: str) -> str:
    target = Path(os.path.realpath(link))
    if target != root and root not in target.parents:
        raise LaunchError(
            f"{what}: the link {link} leads out, to {target}, which other machines do not have: put the files in its "
            f"place, name them in dependencies, give data as a channel, or leave the link out by {root / OWN_FILE}"
        )
    return os.path.relpath(target, os.path.realpath(link.parent))


def _check_present(name: str, what: str, root: Path, entries: Mapping[str, CodeEntry], rules: IgnoreRules) -> None:
    path = posixpath.normpath(name)
    if os.path.isabs(path) or path.startswith(".."):
        raise LaunchError(f"{what} {name!r} is outside of source_dir {root}: give it relative to source_dir")
    if path in entries and entries[path].kind != "folder":
        return
    source = root / path
    if source.is_dir():
        raise LaunchError(f"{what} {source} is a directory: name a file")
    if not source.exists():
        raise LaunchError(f"{what} {source} does not exist: check the name and source_dir")
    for part in (*(folder for folder in reversed(source.parents) if root in folder.parents), source):
        rule = rules.rule_for(part, part != source)
        if rule is not None and rule.leaves_out:
            raise LaunchError(
                f"{what} {name} is left out of the package by {rule.line!r} of {rule.file}: "
                f"add !{part.relative_to(root)} to {root / OWN_FILE}"
            )
    raise LaunchError(f"{what} {source} is no file that can be packed: name a file")


def _biggest(entries: Mapping[str, CodeEntry]) -> str:
    files = sorted(entries.values(), key=lambda entry: -entry.size)[:_MOST_SHOWN]
    return "the biggest are " + ", ".join(f"{entry.name} ({_megabytes(entry.size)})" for entry in files)


def _megabytes(count: int) -> str:
    return f"{count / 10**6:.1f} MB"
