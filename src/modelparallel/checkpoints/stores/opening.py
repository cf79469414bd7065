"""Which store a path or a URL leads to."""

import os

from modelparallel.checkpoints.stores.local import LocalStore, Store


def open_store(path: str | os.PathLike[str]) -> Store:
    """The store under a local path, or under a URL that fsspec knows (`s3://bucket/folder`, `memory://x`). Local.

    The root need not exist; it comes into being with the first file.

    Raises:
        CheckpointError: the URL's protocol is unknown or needs a package that is not installed.
        TypeError: not a path.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"a path of a checkpoint is a str or a path of str, not {type(path).__name__}")
    if text.startswith(("file://", "local://")):
        text = text.split("://", 1)[1]
    if "://" not in text:
        return LocalStore(text)
    from modelparallel.checkpoints.stores.remote import RemoteStore  # brings fsspec, which local paths do without

    return RemoteStore(text)
