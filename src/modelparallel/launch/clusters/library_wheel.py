"""The library as a wheel, made from what is installed here: so that a job runs with the very code that submitted it.

pip can make a wheel of a source tree only, and needs an index for it; what is installed is Python files and metadata,
which is all that a wheel of ours has.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.version import Version

from modelparallel import version
from modelparallel.errors import LaunchError
from modelparallel.version import __version__

#: The folder of the packages that this process runs: `src` of a source tree, or site-packages.
_BASE = Path(version.__file__).parent.parent

NAME = "modelparallel"
_TAG = "py3-none-any"
_PACKAGES = ("modelparallel", "smdistributed")
#: The earliest time that a zip file can hold: equal files give equal bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def library_requirement() -> str:
    """The line of a requirements file for this version. Raises `LaunchError` if it is none that an index can have."""
    parsed = Version(__version__)
    if parsed.is_devrelease or parsed.local:
        raise LaunchError(
            f'modelparallel {__version__} is no release, which an index could have: use library="wheel", which sends '
            "the installed one along"
        )
    return f"{NAME}=={__version__}"


def library_wheel() -> tuple[str, bytes]:
    """(name of the file, content) of a wheel of the installed library. Raises `LaunchError` if it is not installed."""
    try:
        installed = distribution(NAME)
    except PackageNotFoundError as error:
        raise LaunchError(
            f"{NAME} runs from {_BASE}, which is not installed, so that what it depends "
            "on is not written down anywhere: pip install -e its source tree"
        ) from error
    information = f"{NAME}-{__version__}.dist-info"
    files = _files(installed)
    # The metadata may be of another version, if a source tree stands before the installed one.
    metadata = (installed.read_text("METADATA") or "").replace(
        f"\nVersion: {installed.version}\n", f"\nVersion: {__version__}\n", 1
    )
    files[f"{information}/METADATA"] = metadata.encode()
    files[f"{information}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: modelparallel\nRoot-Is-Purelib: true\nTag: {_TAG}\n".encode()
    )
    if entry_points := installed.read_text("entry_points.txt"):
        files[f"{information}/entry_points.txt"] = entry_points.encode()
    record = f"{information}/RECORD"
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in sorted(files.items())]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return f"{NAME}-{__version__}-{_TAG}.whl", stream.getvalue()


def _files(installed: Distribution) -> dict[str, bytes]:
    """The Python files of the library: of the tree that this process runs."""
    recorded = {
        file.as_posix(): Path(str(installed.locate_file(file)))
        for file in installed.files or ()
        if file.parts[0] in _PACKAGES and file.suffix not in (".pyc", ".pyo")
    }
    # An editable installation records none of them, and a source tree may stand before the installed one on the path.
    first = recorded.get(f"{NAME}/__init__.py")
    if first is None or first.parent.parent.resolve() != _BASE.resolve():
        recorded = {
            path.relative_to(_BASE).as_posix(): path
            for package in _PACKAGES
            for path in (_BASE / package).rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".pyo")
        }
    try:
        return {name: path.read_bytes() for name, path in recorded.items()}
    except OSError as error:
        raise LaunchError(f"the files of the library cannot be read: {error}") from error


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
