"""The code of a job on its way to other machines: one archive for a service, or a copy in a folder that they share.

The archive has the shape that the training toolkit of SageMaker expects (sourcedir.tar.gz: the entry point at its root,
`requirements.txt` beside it), and the same files give the same bytes, whoever packs them and when.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from modelparallel.errors import LaunchError
from modelparallel.launch.clusters.code_tree import CodeEntry, code_entries
from modelparallel.launch.clusters.description import ClusterJob
from modelparallel.launch.clusters.library_wheel import library_requirement, library_wheel

#: How the library itself gets there: it is in the image (or the environment) already; as a wheel in the package; or by
#: a line `modelparallel==<version>` that pip looks up in its index.
Library = Literal["image", "wheel", "index"]
ARCHIVE_NAME = "sourcedir.tar.gz"
#: The only file that the training toolkit installs from.
REQUIREMENTS = "requirements.txt"


@dataclass(frozen=True)
class PackedCode:
    """An archive that was written.

    Attributes:
        names: of what is in it, sorted.
        size: of the archive, in bytes.
        digest: sha256 of the archive, in hex.
    """

    path: Path
    names: tuple[str, ...]
    size: int
    digest: str


def pack_code(
    job: ClusterJob, target: Path, *, library: Library = "image", extra: Mapping[str, bytes] | None = None
) -> PackedCode:
    """Write the code of the job, its dependencies and requirements as a gzipped tar; equal files give equal bytes.

    Args:
        target: the archive, written whole or not at all; its folder is made.
        library: how the library itself gets into the environment of the job.
        extra: further files at the root of the archive, by name.

    Raises `LaunchError`: see `code_entries`; a name of `extra` is in use; the archive cannot be written.
    """
    entries = package_entries(job, library=library, extra=extra)
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            _write_archive(file, entries.values())
        os.replace(partial, target)
        content = target.read_bytes()
    except OSError as error:
        raise LaunchError(f"the code of job {job.name} cannot be packed into {target}: {error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return PackedCode(target, tuple(entries), len(content), hashlib.sha256(content).hexdigest())


def archive_bytes(job: ClusterJob) -> bytes:
    """The archive of `pack_code` in memory, with the library in the image. Only reads. Raises as `pack_code`."""
    stream = io.BytesIO()
    _write_archive(stream, package_entries(job).values())
    return stream.getvalue()


def package_entries(
    job: ClusterJob, *, library: Library = "image", extra: Mapping[str, bytes] | None = None
) -> dict[str, CodeEntry]:
    """What `pack_code` writes, by name and sorted. Only reads. Raises as `pack_code`."""
    if library not in get_args(Library):
        raise LaunchError(f"library {library!r}: expected one of {', '.join(get_args(Library))}")
    entries = code_entries(job)
    made = dict(extra or {})
    lines = []
    if library == "wheel":
        name, content = library_wheel()
        made[name] = content
        lines.append(f"./{name}")
    elif library == "index":
        lines.append(library_requirement())
    for name in made:
        if name in entries:
            raise LaunchError(f"{entries[name].source}: {name!r} is written by the launcher itself: rename the file")
    entries |= {name: CodeEntry.made(name, content) for name, content in made.items()}
    _add_requirements(job, entries, lines)
    return dict(sorted(entries.items()))


def copy_code(job: ClusterJob, folder: Path, *, jobs: Path | None = None) -> tuple[str, ...]:
    """Make `folder` a copy of the code of the job and its dependencies, as rsync does: what is there and equal stays,
    what is gone goes. Returns the names, sorted.

    Args:
        jobs: a folder that holds jobs, `folder` among them; it is no code, if it lies in `source_dir`.

    Raises `LaunchError`: see `code_entries`; or `folder` is in the way or cannot be written.
    """
    entries = code_entries(job, without=jobs)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise LaunchError(f"{folder} is no folder: remove it; the code of job {job.name} is copied there")
    real, source = Path(os.path.realpath(folder)), Path(os.path.realpath(job.source_dir))
    is_apart = jobs is not None and source in Path(os.path.realpath(jobs)).parents
    if real == source or real in source.parents or (source in real.parents and not is_apart):
        raise LaunchError(
            f"the code of job {job.name} would be copied from {source} to {real}, one inside the other: "
            "choose a folder for jobs that has nothing to do with source_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_others(folder, entries)
        for entry in entries.values():
            _copy(entry, folder / entry.name)
    except OSError as error:
        raise LaunchError(f"the code of job {job.name} cannot be copied to {folder}: {error}") from error
    return tuple(entries)


def _add_requirements(job: ClusterJob, entries: dict[str, CodeEntry], lines: list[str]) -> None:
    given = None if job.requirements is None else os.path.normpath(job.requirements)
    present = entries.get(REQUIREMENTS)
    if given not in (None, REQUIREMENTS):
        if present is not None:
            raise LaunchError(
                f"requirements {job.requirements}: {present.source} is there, too, and the training toolkit installs "
                f"from {REQUIREMENTS} alone: name that one, or rename it"
            )
        lines = [f"-r {given}", *lines]
    if not lines:
        return
    text = b"" if present is None else present.read()
    text += b"" if not text or text.endswith(b"\n") else b"\n"
    entries[REQUIREMENTS] = CodeEntry.made(REQUIREMENTS, text + "".join(f"{line}\n" for line in lines).encode())


def _write_archive(file: BinaryIO, entries: Iterable[CodeEntry]) -> None:
    # No name and no time of the archive itself; of the files neither times nor owners.
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
        with tarfile.open(mode="w", fileobj=stream, format=tarfile.PAX_FORMAT) as archive:
            for entry in entries:
                information = tarfile.TarInfo(entry.name)
                information.mode = 0o755 if entry.kind != "file" or entry.is_executable else 0o644
                if entry.kind == "file":
                    content = entry.read()  # a file may grow while it is packed
                    information.size = len(content)
                    archive.addfile(information, io.BytesIO(content))
                    continue
                information.type = tarfile.DIRTYPE if entry.kind == "folder" else tarfile.SYMTYPE
                information.linkname = entry.link
                archive.addfile(information)


def _remove_others(folder: Path, entries: Mapping[str, CodeEntry]) -> None:
    """Remove what is not in the code, or is of another kind there. No link is followed."""
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            kind = "link" if path.is_symlink() else "folder" if name in folders else "file"
            entry = entries.get(path.relative_to(folder).as_posix())
            if entry is not None and entry.kind == kind:
                continue
            if kind == "folder":
                shutil.rmtree(path)
                folders.remove(name)
            else:
                path.unlink()


def _copy(entry: CodeEntry, target: Path) -> None:
    if entry.kind == "folder":
        target.mkdir(exist_ok=True)
    elif entry.kind == "link":
        if target.is_symlink():
            if os.readlink(target) == entry.link:
                return
            target.unlink()
        target.symlink_to(entry.link)
    elif entry.source is not None:
        status = entry.source.stat()
        mode = 0o755 if entry.is_executable else 0o644
        if target.exists():
            there = target.stat()
            if (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
                if stat.S_IMODE(there.st_mode) != mode:
                    target.chmod(mode)
                return
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(entry.source, partial)
        partial.chmod(mode)
        os.utime(partial, ns=(status.st_atime_ns, status.st_mtime_ns))
        partial.replace(target)
