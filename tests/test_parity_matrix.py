"""Everything together: {pp} x {tp} x {sharding} x {precision} x {recomputation}, on 4 and 8 processes.

A sample that meets every value with every other runs always; all cells with ``make test-all``. The table of cells is in
docs/memory.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from training_cells import Cell, all_cells, verify

SAMPLE = [
    Cell(4, 2, 1, "ddp", "fp32", True),
    Cell(4, 1, 2, "ddp", "bf16", False),
    Cell(4, 2, 1, "optimizer", "fp16", True),
    Cell(4, 1, 2, "optimizer", "bf16", True),
    Cell(4, 1, 2, "sdp", "fp16", False),
    Cell(4, 2, 1, "sdp", "bf16", True),
    Cell(4, 1, 1, "sdp", "fp32", False),
    Cell(4, 2, 2, "sdp", "fp32", False),
    Cell(8, 2, 2, "sdp", "fp32", True),
]


@pytest.mark.parametrize("cell", SAMPLE, ids=str)
def test_a_sample_of_the_matrix(cell):
    verify(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in all_cells() if cell not in SAMPLE], ids=str)
def test_the_whole_matrix(cell):
    verify(cell)


def test_the_table_of_cells_is_in_the_documents():
    document = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in document.splitlines() if line.count("|") == 7]
    table = {tuple(int(value) for value in line[:3]): line[3:] for line in lines if line[0].isdigit()}
    for cell in all_cells():
        said = table[cell.num_ranks, cell.pp, cell.tp][("ddp", "optimizer", "sdp").index(cell.sharding)]
        assert said == ("trains" if cell.refusal is None else "refused"), cell
    assert len(table) == 8
