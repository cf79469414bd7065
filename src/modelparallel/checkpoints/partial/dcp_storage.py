"""The storage side of ``torch.distributed.checkpoint``: its file format, in files of the documented names.

[Note: files of a partial checkpoint] DCP writes the tensors of a rank one after another into one file, and says in
``.metadata`` where each lies, so files may have any name. They have those of the documented layout (smp-api section
14): ``model_<pp>_<tp>.pt``, ``optimizer_<pp>_<tp>.pt`` and, for masters and loss scales, ``fp16_states_<pp>_<tp>.pt``;
ranks with rdp_rank > 0 append ``_<rdp>``. ``.metadata`` is a pickle; it is read with an allow-list of classes.

[Note: one pass over a tensor] Each tensor in a file is an archive of ``torch.save``. They are written without its
CRC32, which takes as long as writing and which ``torch.load`` does not look at: the digest of the file, made in the
same pass, is what counts. On the way back only heads of archives are opened (tensor_archives.py), and the bytes are
read to where they belong, where a run of them in the file is one in memory; ``torch.load`` would make a tensor of its
own first, and read all of it for a part.
"""

from __future__ import annotations

import dataclasses
import queue
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import (
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization_config

from modelparallel.checkpoints.partial.contents import MASTER_KEY
from modelparallel.checkpoints.partial.metadata_checks import checked_metadata
from modelparallel.checkpoints.partial.pieces import rectangle_of
from modelparallel.checkpoints.partial.tensor_archives import TensorArchives, fill
from modelparallel.checkpoints.partial.unpickling import DCP_METADATA_NAMES, load_pickle
from modelparallel.checkpoints.stores.completion import Draft
from modelparallel.checkpoints.stores.file_streams import FileRecord, shown
from modelparallel.checkpoints.stores.local import HashingFileSystem, Store
from modelparallel.errors import CheckpointCorruptError, CheckpointError
from modelparallel.optimizer.states import SCALER_KEY

METADATA_NAME = ".metadata"
#: The key of what ranks tell the coordinator beside the places of their tensors.
_RECORDS = "modelparallel file records"


@dataclass(frozen=True)
class RankInfo:
    """Where a rank stands; the part of its files' names that tells them apart."""

    pp_rank: int
    tp_rank: int
    rdp_rank: int

    @property
    def suffix(self) -> str:
        """As in ``model_<suffix>.pt``."""
        return f"{self.pp_rank}_{self.tp_rank}" + (f"_{self.rdp_rank}" if self.rdp_rank else "")


def file_group(key: str) -> str:
    """The noun of the file that the entry ``key`` is in."""
    first, _, rest = key.partition(".")
    noun = first.partition("_")[0]
    if noun == "optimizer" and (rest.endswith(f".{MASTER_KEY}") or rest == SCALER_KEY):
        return "fp16_states"
    return noun


class DraftWriter(FileSystemWriter):
    """Writes into a draft; the coordinator makes it a checkpoint when all ranks are done."""

    def __init__(
        self,
        draft: Draft,
        rank: RankInfo,
        extra_files: Mapping[str, bytes],
        facts: Mapping[str, Any],
        after: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        """``extra_files`` are written by the coordinator, ``facts`` go into the completion record, ``after`` is called
        when the checkpoint is in place, ``note`` where this rank is (`SaveProgress.note`).
        """
        super().__init__("unused", sync_files=False)
        self._draft = draft
        self._rank_info = rank
        self._extra_files = extra_files
        self._facts = facts
        self._after = after
        self._note = note
        self._files = HashingFileSystem(draft.store)
        self.fs: Any = self._files
        self.path: Any = ""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing is made before every rank has a plan."""
        self._note("planned")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, when all ranks wait: what an earlier attempt left goes away."""
        self._draft.start()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's files. Local."""
        self._note("writing")
        is_written = False
        try:
            records = self._write_files(plan, planner)
            is_written = True
        finally:
            self._note("written" if is_written else "failed")
        return records

    def _write_files(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        by_group: dict[str, list[Any]] = {}
        for item in plan.items:
            by_group.setdefault(file_group(item.index.fqn), []).append(item)
        files: queue.Queue[Any] = queue.Queue()
        for group, items in by_group.items():
            name = f"{group}_{self._rank_info.suffix}.pt"
            files.put((name, name, items))
        with serialization_config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # of this thread
            written = self._write_data(planner, files)
        self._files.raise_failure()
        self._draft.store.sync_names()
        records = WriteResult(MetadataIndex(_RECORDS), 0, dict(self._files.records))
        result: Future[list[WriteResult]] = Future()
        result.set_result([*written.value(), records])
        return result

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: the index, the remaining files and the completion record."""
        records: dict[str, FileRecord] = {}
        for result in results:
            for entry in [entry for entry in result if entry.index.fqn == _RECORDS]:
                result.remove(entry)
                repeated = records.keys() & entry.storage_data.keys()
                if repeated:
                    raise CheckpointError(f"two ranks have written {sorted(repeated)} of one checkpoint")
                records.update(entry.storage_data)
        super().finish(metadata, results)
        for name, data in self._extra_files.items():
            records[name] = self._draft.store.write(name, data)
        self._draft.commit({**records, METADATA_NAME: self._files.records[METADATA_NAME]}, self._facts)
        self._after()


class RecordedReader(FileSystemReader):
    """Reads a checkpoint whose ``.metadata`` is known, from the files of its completion record alone."""

    def __init__(self, store: Store, metadata: Metadata, expected: Mapping[str, FileRecord] | None) -> None:
        super().__init__("unused")
        self.fs: Any = HashingFileSystem(store, expected)
        self.path: Any = ""
        self._known = metadata
        self._archives: defaultdict[str, TensorArchives] = defaultdict(TensorArchives)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was read before. Local."""
        return self._known

    def fill(self, planner: LoadPlanner) -> None:
        """Fill what the planner asks for: what ``dcp.load`` does on a rank, which also sends all plans to one rank and
        back, as they are. Local.
        """
        planner.set_up_planner({}, self._known)
        self.set_up_storage_reader(self._known, is_coordinator=False)
        plan = self.prepare_local_plan(planner.create_local_plan())
        with torch.no_grad():
            self.read_data(planner.finish_plan(plan), planner).wait()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors. Local. Raises CheckpointError for files that cannot be read."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        others = []
        for name, items in by_file.items():
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            try:
                with self.fs.create_stream(name, "rb") as stream:
                    others += [item for item in items if not self._is_read(stream, item, planner)]
            except (CheckpointError, MemoryError):
                raise
            except Exception as error:  # whatever an archive that is none makes torch and zipfile raise
                raise CheckpointCorruptError(
                    f"{shown(self.fs.store.path_of(name))!r} does not hold what its index says "
                    f"({type(error).__name__}: {error}): load another checkpoint"
                ) from error
        return super().read_data(dataclasses.replace(plan, items=others), planner)

    def _is_read(self, stream: Any, item: ReadItem, planner: LoadPlanner) -> bool:
        """Read a tensor, or the part of it that is asked for; False for what is left to ``torch.load``."""
        place = self.storage_data[item.storage_index]
        if item.type == LoadItemType.BYTE_IO or getattr(place, "transform_descriptors", None):
            return False
        head = self._archives[place.relative_path].head(self._slice_file(stream, place), place.length)
        if head is None:
            return False
        target = planner.resolve_tensor(item).detach()
        part = rectangle_of(head.tensor, item.storage_offsets, item.lengths)
        if part.shape != target.shape:
            return False
        start = place.offset + head.start
        if _is_same_run(part, target):
            self._fill(target, stream, start + part.storage_offset() * part.itemsize, place)
        else:
            storage = torch.empty(head.tensor.untyped_storage().nbytes() // part.itemsize, dtype=part.dtype)
            self._fill(storage, stream, start, place)
            target.copy_(storage.as_strided(part.size(), part.stride(), part.storage_offset()))
        planner.commit_tensor(item, target)
        return True

    def _fill(self, memory: torch.Tensor, stream: Any, start: int, place: Any) -> None:
        stream.seek(start)
        if not fill(memoryview(memory.view(-1).view(torch.uint8).numpy()), stream):  # type: ignore[arg-type]
            where = self.fs.store.path_of(place.relative_path)
            raise CheckpointCorruptError(f"{shown(where)!r} ends before its tensors do: load another checkpoint")


def _is_same_run(part: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the bytes of ``part`` lie in the file as they belong into the memory of ``target``."""
    return (
        target.device.type == "cpu" and target.dtype == part.dtype and target.is_contiguous() and part.is_contiguous()
    )


def read_metadata(store: Store, trusts_pickles: bool = False) -> Metadata:
    """The index of the checkpoint in ``store``. Local. Raises CheckpointError for what is none."""
    with store.open(METADATA_NAME, "rb") as stream:
        where = repr(store.path_of(METADATA_NAME))
        metadata = load_pickle(stream, None if trusts_pickles else DCP_METADATA_NAMES, where)
    return checked_metadata(metadata, where)
