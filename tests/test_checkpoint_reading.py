"""Tensors of a checkpoint are read to where they belong, whatever part of them a rank wants."""

import io
import sys
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from modelparallel.checkpoints.partial import tensor_archives
from modelparallel.checkpoints.partial.dcp_storage import RecordedReader, read_metadata
from modelparallel.checkpoints.partial.pieces import Piece, whole_piece
from modelparallel.checkpoints.partial.planners import PieceLoadPlanner
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError
from modelparallel.torch_compat import tensor_in_archive

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

ROWS, COLUMNS = 300, 128


@pytest.fixture
def saved(tmp_path):
    """Tensors of plain DCP."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(ROWS, COLUMNS, generator=generator),
        "half": torch.randn(ROWS, COLUMNS, generator=generator).to(torch.bfloat16),
        "turned": torch.randn(COLUMNS, ROWS, generator=generator).T,
        "small": torch.randn(3, generator=generator),
        "number": torch.tensor(5.0),
    }
    dcp.save(tensors, checkpoint_id=str(tmp_path), no_dist=True)
    return open_store(tmp_path), tensors


def read(store, pieces, metadata=None):
    metadata = read_metadata(store) if metadata is None else metadata
    planner, reader = PieceLoadPlanner(pieces, [], lambda key, data: None), RecordedReader(store, metadata, None)
    planner.set_up_planner({}, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    copies, copy = [], torch.Tensor.copy_
    with mock.patch.object(torch.Tensor, "copy_", lambda target, source: copies.append(target) or copy(target, source)):
        reader.read_data(planner.finish_plan(plan), planner).wait()
    return len(copies)


def part(tensors, key, rows, columns, dtype=None):
    whole = tensors[key]
    room = torch.full((rows.stop - rows.start, columns.stop - columns.start), torch.nan, dtype=dtype or whole.dtype)
    return Piece(key, tuple(whole.shape), (rows.start, columns.start), room)


@pytest.mark.parametrize("key", ["wide", "half"])
def test_a_run_of_bytes_is_read_without_a_copy(saved, key):
    store, tensors = saved
    everything = whole_piece(key, torch.full_like(tensors[key], torch.nan))
    rows = part(tensors, key, slice(7, 290), slice(0, COLUMNS))
    assert read(store, [everything, rows]) == 0
    assert torch.equal(everything.tensor, tensors[key])
    assert torch.equal(rows.tensor, tensors[key][7:290])


def test_other_parts_are_copied(saved):
    store, tensors = saved
    columns = part(tensors, "wide", slice(0, ROWS), slice(3, 100))
    turned = whole_piece("turned", torch.full((ROWS, COLUMNS), torch.nan))
    wider = part(tensors, "half", slice(0, ROWS), slice(0, COLUMNS), torch.float32)
    assert read(store, [columns, turned, wider]) == 3
    assert torch.equal(columns.tensor, tensors["wide"][:, 3:100])
    assert torch.equal(turned.tensor, tensors["turned"])
    assert torch.equal(wider.tensor, tensors["half"].float())


def test_small_tensors_are_read_without_a_copy_too(saved):
    store, tensors = saved
    few = [whole_piece(key, torch.full_like(tensors[key], torch.nan)) for key in ("small", "number")]
    few.append(Piece("small", (3,), (2,), torch.full((1,), torch.nan)))
    assert read(store, few) == 0
    assert all(torch.equal(piece.tensor, tensors[piece.key]) for piece in few[:2])
    assert torch.equal(few[2].tensor, tensors["small"][2:])


def test_of_archives_that_begin_alike_only_the_first_is_opened(tmp_path):
    tensors = {f"{number}": torch.full((4, 3), float(number)) for number in range(20)}
    # As long as these, and different in what is said before their bytes.
    tensors["turned"] = torch.arange(12.0).view(3, 4).T
    tensors["other shape"] = torch.arange(12.0).view(3, 4)
    tensors["integers"] = torch.arange(12, dtype=torch.int32).view(4, 3)
    tensors["empty"] = torch.zeros(0, 3)
    dcp.save(tensors, checkpoint_id=str(tmp_path), no_dist=True)
    pieces = [whole_piece(key, torch.full_like(tensor, 77)) for key, tensor in tensors.items()]
    with mock.patch.object(tensor_archives, "tensor_in_archive", side_effect=tensor_in_archive) as opened:
        read(open_store(tmp_path), pieces)
    assert all(torch.equal(piece.tensor, tensors[piece.key]) for piece in pieces)
    assert opened.call_count == 4  # and none for the empty one


def test_what_torch_does_not_open_by_its_head_is_left_to_it(saved):
    store, tensors = saved
    pieces = [whole_piece(key, torch.full_like(tensor, torch.nan)) for key, tensor in tensors.items()]
    pieces.append(part(tensors, "wide", slice(5, 9), slice(2, 100)))
    with mock.patch.object(tensor_archives, "tensor_in_archive", return_value=None):
        assert read(store, pieces) == len(pieces)
    assert all(torch.equal(piece.tensor, tensors[piece.key]) for piece in pieces[:-1])
    assert torch.equal(pieces[-1].tensor, tensors["wide"][5:9, 2:100])


def test_a_view_of_other_memory_is_filled_and_nothing_beside_it(saved):
    store, tensors = saved
    memory = torch.zeros(ROWS + 2, COLUMNS)
    assert read(store, [Piece("wide", (ROWS, COLUMNS), (0, 0), memory[1:-1])]) == 0
    assert torch.equal(memory[1:-1], tensors["wide"])
    assert not memory[0].any() and not memory[-1].any()


def test_a_tensor_that_is_not_all_there_is_refused(saved):
    store, _ = saved
    metadata = read_metadata(store)
    chunk = metadata.state_dict_metadata["wide"].chunks[0]
    chunk.sizes = torch.Size((ROWS - 1, COLUMNS))
    with pytest.raises(CheckpointCorruptError, match=r"38272 of the 38400 elements of 'wide'"):
        read(store, [whole_piece("wide", torch.empty(ROWS, COLUMNS))], metadata)


def test_a_file_that_is_too_short_is_refused(saved, tmp_path):
    store, _ = saved
    metadata = read_metadata(store)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "wide")
    archive = (tmp_path / place.relative_path).read_bytes()[place.offset :][: place.length]
    head = tensor_archives.TensorArchives().head(io.BytesIO(archive), len(archive))
    assert head is not None
    end = place.offset + head.start + 4 * ROWS * COLUMNS
    # The head lies in memory, and the file behind it ends early.
    with (
        mock.patch.object(tensor_archives.TensorArchives, "head", return_value=head),
        open(tmp_path / place.relative_path, "r+b") as file,
    ):
        file.truncate(end - 1)
        with pytest.raises(CheckpointCorruptError, match="ends before its tensors do"):
            read(store, [whole_piece("wide", torch.empty(ROWS, COLUMNS))], metadata)


def test_bytes_of_another_kind_of_processor_are_not_taken_as_they_are():
    data = io.BytesIO()
    other = {"little": "big", "big": "little"}[sys.byteorder]
    with mock.patch.object(sys, "byteorder", other):
        torch.save(torch.arange(5.0), data)
    data.seek(0)
    assert tensor_in_archive(data) is None
    data = io.BytesIO()
    torch.save(torch.arange(5.0), data)
    data.seek(0)
    head, start = tensor_in_archive(data)
    assert head.device.type == "meta" and head.shape == (5,)
    assert data.getvalue()[start : start + 20] == torch.arange(5.0).numpy().tobytes()
