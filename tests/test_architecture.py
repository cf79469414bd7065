"""docs/architecture.md is true: its paths exist, its picture is that of the imports, and a reader finds the way."""

import functools
import re
from pathlib import Path

import pytest

from scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"

# What a reader must find on the page: (what is to be changed, (file, name in it) that it leads to).
ANSWERS = {
    "a new placement strategy": ("NAMED_STRATEGIES =", "def strategy_letters", "placement_strategy: Strategy"),
    "a new schedule": ("def make_schedule", "SCHEDULE_KINDS =", "BACKWARD_FIRST =", "def check_schedule"),
    "another compression of gradients": (
        "class CommHook",
        "class HookedBucket",
        "class Bucket",
        "HookedBucket(members",
    ),
    "the error for a batch of unequal length": (
        "which does not divide into",
        "batches of different length",
        "to equal lengths",
    ),
    "the format of a partial checkpoint": ("[Note: files of a partial checkpoint]", "[Note: keys]", "FORMAT = "),
}


drawing = load_script("docs/draw_architecture.py")
read_graph = functools.cache(drawing.read_graph)


def paths_in(text):
    """The paths in backticks that name something of the repository."""
    return [path for path in re.findall(r"`([\w./-]+)`", text) if re.match(r"(src|tests|docs|bench|examples)/", path)]


def test_every_path_exists():
    paths = paths_in(PAGE.read_text())
    assert len(paths) > 60
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("change", ANSWERS)
def test_a_reader_finds_where_to_change(change):
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {change} |")]
    assert len(rows) == 1
    files = [ROOT / path for path in paths_in(rows[0]) if path.endswith(".py")]
    for wanted in ANSWERS[change]:
        assert any(wanted in path.read_text() for path in files), f"{wanted!r} is in none of the files of {change!r}"
    # Names of the code in the row are in one of its files.
    names = [name for name in re.findall(r"`([\w.]+)`", rows[0]) if not name.endswith(".py")]
    for name in names:
        assert any(name in path.read_text() for path in files), f"{name!r} is in none of the files of {change!r}"


def test_the_picture_is_that_of_the_imports():
    graph = read_graph()
    hint = "the imports have changed: run python docs/draw_architecture.py"
    assert drawing.page_with(drawing.block_of(graph), PAGE.read_text()) == PAGE.read_text(), hint
    assert drawing.PICTURE.read_text() == drawing.picture(graph), hint


def test_every_room_is_drawn_once_on_its_floor():
    floors = drawing.read_floors(read_graph())
    rooms = [room for floor in floors for room in floor.rooms]
    folders = {path.parent.name for path in drawing.PACKAGE.glob("*/__init__.py")}
    assert len(rooms) == len(set(rooms)) and set(rooms) == set(read_graph())
    assert folders - {"patches"} <= set(rooms), "patches gives a name to what is elsewhere"
    names = [line for line in drawing.PICTURE.read_text().splitlines() if line.startswith("<text")]
    assert all(sum(f">{floor.number} {floor.name}<" in line for line in names) == 1 for floor in floors)


def test_what_rests_on_whom():
    """roof -> walls -> ground, and roof -> ground, which follows."""
    graph = {"roof": {"walls", "ground"}, "walls": {"ground", "door"}, "door": set(), "ground": set()}
    assert drawing.reduced(graph) == {"roof": {"walls"}, "walls": {"ground", "door"}, "door": set(), "ground": set()}


def test_imports_of_every_kind_count(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nimport modelparallel.comm.groups\n"
        "if TYPE_CHECKING:\n    from modelparallel.model import DistributedModel\n"
        "def late():\n    from modelparallel import session\n"
    )
    assert sorted(drawing.imported(path)) == ["comm.groups", "model.DistributedModel", "session"]
