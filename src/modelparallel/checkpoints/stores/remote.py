"""Files of checkpoints behind a URL of fsspec: object stores such as S3, and what else fsspec opens."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import fsspec

from modelparallel.checkpoints.stores.file_streams import WriteStream, checked_name, shown, write_failure
from modelparallel.checkpoints.stores.local import Store
from modelparallel.errors import CheckpointError, CheckpointNotFoundError, SMPError


class RemoteStore(Store):
    """Files below a URL that fsspec opens. Retries of passing faults are those of fsspec's file system."""

    is_remote = True

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/") if not url.endswith("://") else url
        try:
            self.fs, base = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = "s3fs" if url.startswith(("s3:", "s3a:")) else ""
            remedy = f"pip install {package}" if package else str(error)
            raise CheckpointError(f"{shown(url)!r} needs a package that is not installed: {remedy}") from error
        except ValueError as error:
            raise CheckpointError(
                f"{shown(url)!r} cannot be opened: {error}. Give a local path, or a URL that fsspec knows, such as "
                "s3://bucket/folder"
            ) from error
        self._base = base.rstrip("/")

    def __repr__(self) -> str:
        return f"RemoteStore({shown(self.root)!r})"

    def path_of(self, name: str = "") -> str:
        checked_name(name, self.root, may_be_empty=True)
        return "/".join(filter(None, (self.root.removesuffix("/"), name))) if name else self.root

    def child(self, name: str, syncs_names: bool = True) -> Store:
        return RemoteStore(self.path_of(name))

    def _key(self, name: str) -> str:
        checked_name(name, self.root, may_be_empty=True)
        return f"{self._base}/{name}" if name else self._base

    @contextmanager
    def _explaining(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except SMPError:
            raise
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"there is no file {shown(self.path_of(name))!r}: check path and tag (and that the bucket exists)"
            ) from error
        except Exception as error:
            raise CheckpointError(
                f"{action} {shown(self.path_of(name))!r} failed: {type(error).__name__}: {error}. Check the address, "
                "the credentials and their permissions, and the network"
            ) from error

    def _information(self, name: str) -> dict[str, Any] | None:
        # `exists` of fsspec says no when the server does not answer; that must not look like a missing file.
        with self._explaining("looking up", name):
            self.fs.invalidate_cache()
            try:
                information = self.fs.info(self._key(name))
            except FileNotFoundError:
                return None
        # Some servers go on showing a folder whose last file was removed.
        return None if information["type"] == "directory" and not self.sizes(name) else information

    def exists(self, name: str = "") -> bool:
        return self._information(name) is not None

    def is_folder(self, name: str = "") -> bool:
        information = self._information(name)
        return information is not None and information["type"] == "directory"

    def size_of(self, name: str) -> int | None:
        information = self._information(name)
        return int(information["size"]) if information is not None and information["type"] == "file" else None

    def names(self, folder: str = "") -> list[str]:
        with self._explaining("listing", folder):
            self.fs.invalidate_cache()
            key = self._key(folder)
            try:
                entries = self.fs.ls(key, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        prefix = f"{key.strip('/')}/".lstrip("/")
        paths = [entry["name"].strip("/") for entry in entries]
        return sorted({path[len(prefix) :] for path in paths if path.startswith(prefix) and path != prefix})

    def sizes(self, folder: str = "") -> dict[str, int]:
        with self._explaining("listing", folder):
            self.fs.invalidate_cache()
            key = self._key(folder)
            try:
                details = self.fs.find(key, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        prefix = f"{key.strip('/')}/".lstrip("/")
        paths = {path.lstrip("/"): entry for path, entry in details.items()}
        return {path[len(prefix) :]: int(entry["size"]) for path, entry in paths.items() if path.startswith(prefix)}

    def modified(self, name: str) -> float:
        with self._explaining("looking up", name):
            self.fs.invalidate_cache()
            times = [0.0]
            for path in self.fs.find(self._key(name)):
                with suppress(NotImplementedError, FileNotFoundError):
                    times.append(self.fs.modified(path).timestamp())
            return max(times)

    def make_folder(self, name: str = "") -> None:
        self._key(name)

    def remove(self, name: str, missing_ok: bool = False) -> None:
        with self._explaining("removing", name):
            try:
                self.fs.invalidate_cache()
                self.fs.info(self._key(name))  # object stores remove what is not there without a word
                self.fs.rm_file(self._key(name))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_folder(self, name: str) -> None:
        # One by one: `rm(recursive=True)` would take a name with brackets for a pattern.
        for file in sorted(self.sizes(name)):
            self.remove(f"{name}/{file}", missing_ok=True)
        with suppress(CheckpointError, NotImplementedError), self._explaining("removing", name):
            self.fs.rmdir(self._key(name))

    def rename_file(self, old: str, new: str) -> None:
        with self._explaining("renaming", old):
            self.fs.cp_file(self._key(old), self._key(new))
            self.fs.rm_file(self._key(old))

    def rename_folder(self, old: str, new: str) -> None:
        raise CheckpointError(
            f"{shown(self.path_of(old))!r} cannot be renamed to {new!r}: object stores have no folders to rename"
        )

    def sync_folder(self, name: str = "") -> None:
        self._key(name)

    @contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes]]:
        with self._explaining("reading", name):
            self.fs.invalidate_cache()
            try:
                stream = self.fs.open(self._key(name), "rb")
            except (NotADirectoryError, FileExistsError) as error:  # something above it is a file
                raise FileNotFoundError(str(error)) from error
        with stream:
            yield stream

    @contextmanager
    def _writing(self, name: str) -> Iterator[WriteStream]:
        with self._explaining("writing", name):
            raw = self.fs.open(self._key(name), "wb")
        stream = WriteStream(raw)
        try:
            yield stream
            if stream.failure is not None:
                raise stream.failure
            stream._guarded(raw.close)
        except BaseException:
            # Closing would put the half file there. Files that have no way to be given up stay half; no completion
            # record names them.
            with suppress(Exception):
                raw.discard()
            with suppress(AttributeError):
                raw.closed = True
            if stream.failure is not None:
                raise write_failure(self.path_of(name), stream.size, stream.failure) from stream.failure
            raise
