"""Whether a checkpoint is whole: its record, sizes and digests, and that the pieces of each tensor cover it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from modelparallel.checkpoints.huggingface.safetensors_reading import stored_tensors
from modelparallel.checkpoints.huggingface.weights import INDEX_ENDING, weight_map
from modelparallel.checkpoints.partial.dcp_storage import METADATA_NAME, read_metadata
from modelparallel.checkpoints.partial.metadata_checks import coverage_problems
from modelparallel.checkpoints.partial.torch_files import store_of_file
from modelparallel.checkpoints.partial.user_content import read_restricted
from modelparallel.checkpoints.stores import completion
from modelparallel.checkpoints.stores.file_streams import checked_name
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.tools.catalogue import RECORDED_KINDS, ListedCheckpoint, rank_file
from modelparallel.checkpoints.tools.inspection import files_of
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError


@dataclass(frozen=True)
class Verdict:
    """``problems``: what keeps the checkpoint from being whole. ``limits``: what could not be looked at."""

    place: str
    kind: str
    num_files: int
    num_bytes: int
    problems: Sequence[str]
    limits: Sequence[str]


def verify(checkpoint: ListedCheckpoint) -> Verdict:
    """Read every file of a checkpoint and compare it with what was written. Local; reads only.

    Files without a record are looked at as far as they can be: the checksums in files of ``torch.save``, the header of
    safetensors, the names in an index.

    Raises CheckpointError if the store cannot be asked.
    """
    limits: list[str] = []
    if checkpoint.kind in RECORDED_KINDS:
        problems = completion.problems_of(checkpoint.store, checkpoint.name, is_full=checkpoint.kind == "full")
        if checkpoint.kind == "partial" and not any(repr(METADATA_NAME) in text for text in problems):
            problems += _problems_of_index(checkpoint.folder, files_of(checkpoint))
    else:
        limits.append("it has no completion record: whether its files are those that were written cannot be told")
        problems = list(_PROBLEMS_OF[checkpoint.kind](checkpoint))
    try:
        files = files_of(checkpoint)
    except CheckpointCorruptError:  # an index that cannot be read, which is among the problems
        files = {}
    return Verdict(checkpoint.place, checkpoint.kind, len(files), sum(files.values()), problems, limits)


def _problems_of_index(folder: Store, sizes: Mapping[str, int]) -> list[str]:
    try:
        metadata = read_metadata(folder)
    except CheckpointError as error:
        return [str(error)]
    result: list[str] = []
    for key, described in metadata.state_dict_metadata.items():
        if isinstance(described, BytesStorageMetadata):
            result.extend(_problems_of_place(metadata, MetadataIndex(key), f"the object '{key}'", sizes))
            continue
        shape = tuple(described.size)
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in described.chunks]
        result.extend(f"the tensor '{key}' {problem}" for problem in coverage_problems(shape, chunks))
        for chunk in described.chunks:
            what = f"the piece of '{key}' at {tuple(chunk.offsets)}"
            result.extend(_problems_of_place(metadata, MetadataIndex(key, chunk.offsets), what, sizes))
    return result


def _problems_of_place(metadata: Metadata, index: MetadataIndex, what: str, sizes: Mapping[str, int]) -> Iterator[str]:
    place: Any = (metadata.storage_data or {}).get(index)
    if place is None:
        yield f"{what} lies in no file"
    elif place.relative_path not in sizes:
        yield f"{what} should lie in {place.relative_path!r}, which is missing"
    elif place.offset < 0 or place.offset + place.length > sizes[place.relative_path]:
        yield f"{what} lies behind the end of {place.relative_path!r}"


# Without a record


def _problems_of_dcp(checkpoint: ListedCheckpoint) -> list[str]:
    return _problems_of_index(checkpoint.folder, checkpoint.folder.sizes())


def _problems_of_original(checkpoint: ListedCheckpoint) -> Iterator[str]:
    for name in checkpoint.folder.names():
        if rank_file(name) is not None:
            yield from _problems_of_torch_file(checkpoint.folder, name)


def _problems_of_file(checkpoint: ListedCheckpoint) -> Iterator[str]:
    names: dict[str, list[str]] = {checkpoint.name: []}
    if checkpoint.name.endswith(INDEX_ENDING):
        names = {}
        try:
            for tensor, file in weight_map(checkpoint.path, checkpoint.name).items():
                names.setdefault(checked_name(file, checkpoint.path), []).append(tensor)
        except CheckpointError as error:
            yield str(error)
            return
    for name, tensors in names.items():
        path = f"{checkpoint.path.rstrip('/')}/{name}"
        store, file = store_of_file(path)
        if store.size_of(file) is None:
            yield f"{name!r} is missing"
            continue
        if not name.endswith(".safetensors"):
            yield from _problems_of_torch_file(store, file)
            continue
        try:
            header = stored_tensors(path)
        except CheckpointError as error:
            yield str(error)
            continue
        missing = [tensor for tensor in tensors if tensor not in header]
        if missing:
            yield f"{name!r} lacks {', '.join(missing[:5])}, which the index says it holds"


def _problems_of_torch_file(store: Store, name: str) -> Iterator[str]:
    """Reads the checksums that the file has of its own parts, or all of a file in the format of before torch 1.6."""
    try:
        with store.open(name) as stream:
            if stream.read(4) == b"PK\x03\x04":
                stream.seek(0)
                damaged = zipfile.ZipFile(stream).testzip()
                if damaged is not None:
                    yield f"{name!r} was changed: the checksum of its part {damaged!r} is another one"
                return
        read_restricted(store, name, f"the file {name!r}")
    except CheckpointNotFoundError:
        yield f"{name!r} is missing"
    except CheckpointError as error:
        yield str(error)
    except Exception as error:  # zipfile raises nearly anything for a damaged one
        yield f"{name!r} is not a whole file of torch.save ({type(error).__name__}: {error})"


_PROBLEMS_OF: Mapping[str, Any] = {
    "dcp": _problems_of_dcp,
    "original": _problems_of_original,
    "huggingface": _problems_of_file,
    "torch": _problems_of_file,
    "safetensors": _problems_of_file,
}
