"""Draws the rooms of the source and who rests on whom, from its imports: a picture and a table of docs/architecture.md.

Run `python docs/draw_architecture.py` after a change of the imports; a test compares what it makes with what is there.
It needs nothing but Python.

A room is a folder directly in src/modelparallel, with all that is inside, or a file there. Every import counts, also
those in functions and those for the type checker alone. The floors are those of LADDER in tests/test_structure.py.
Arrows that follow from others are left out, and so are the files that only give a name to what is elsewhere.
"""

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "modelparallel"
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "architecture.svg"
BEGIN = "<!-- Written by `python docs/draw_architecture.py`; a test compares the two. -->"
END = "<!-- The end of what is written. -->"
LADDER = ROOT / "tests" / "test_structure.py"
#: The room of the package itself.
PACKAGE_ROOM = "__init__"

Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Floor:
    """A floor of the ladder: rooms that do not import each other, and ``reason``, why they stand there."""

    number: int
    name: str
    reason: str
    rooms: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """What the page says of a room: ``purpose`` is the first sentence of its docstring, ``parts`` its own folders."""

    name: str
    path: str
    purpose: str
    parts: tuple[tuple[str, str], ...] = ()


def purpose_of(path: Path) -> str:
    """The first sentence of the docstring of a file, in the words of a table's cell."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = " ".join(docstring.split("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
    return re.sub(r" \((?:smp-|docs/)[^)]*\)", "", first).split(". ")[0].rstrip(".")


def imported_at(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports of the package, by the dotted names below it ("" is the package), and in which line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == PACKAGE.name:
                yield rest, node.lineno


def imported(path: Path) -> Iterator[str]:
    """As `imported_at`, without the lines."""
    return (name for name, _ in imported_at(path))


def room_of(module: str) -> str:
    """The room of a dotted name below the package."""
    first = module.partition(".")[0]
    is_room = (PACKAGE / f"{first}.py").exists() or (PACKAGE / first / "__init__.py").exists()
    return first if first and is_room else PACKAGE_ROOM


def read_graph() -> Graph:
    """For every room the rooms that it imports."""
    graph: Graph = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        graph.setdefault(room, set()).update(room_of(module) for module in imported(path))
    graph = {room: others - {room} for room, others in graph.items()}
    # What only gives a name to what is elsewhere is one with the package.
    wanted = {other for room, others in graph.items() if room != PACKAGE_ROOM for other in others}
    thin = {room for room in graph if (PACKAGE / f"{room}.py").exists() and room not in wanted}
    thin |= {"patches"} & set(graph)
    for room in thin - {PACKAGE_ROOM}:
        graph[PACKAGE_ROOM] |= graph.pop(room)
    graph[PACKAGE_ROOM] -= {*thin, PACKAGE_ROOM}
    return graph


def reached(graph: Graph) -> Graph:
    """For every room all rooms below it, however far."""
    result: Graph = {}
    for room in graph:
        pending, seen = list(graph[room]), set()
        while pending:
            other = pending.pop()
            if other not in seen:
                seen.add(other)
                pending.extend(graph[other])
        result[room] = seen
    return result


def reduced(graph: Graph) -> Graph:
    """Without the arrows that follow from others."""
    below = reached(graph)
    return {
        room: {other for other in others if not any(other in below[middle] for middle in others - {other})}
        for room, others in graph.items()
    }


def read_floors(graph: Graph) -> list[Floor]:
    """The floors with rooms of the graph, the ground first."""
    tree = ast.parse(LADDER.read_text())
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    floors = [
        Floor(number, name, reason, tuple(room for room in rooms if room in graph))
        for number, (name, reason, rooms) in enumerate(ast.literal_eval(assigned["LADDER"]))
    ]
    return [floor for floor in floors if floor.rooms]


def describe(name: str) -> Room:
    """What there is to say of a room."""
    if (PACKAGE / f"{name}.py").exists():
        return Room(name, f"{name}.py", purpose_of(PACKAGE / f"{name}.py"))
    parts = tuple((path.parent.name, purpose_of(path)) for path in sorted((PACKAGE / name).glob("*/__init__.py")))
    return Room(name, f"{name}/", purpose_of(PACKAGE / name / "__init__.py"), parts)


def table(graph: Graph) -> str:
    """The rooms from the top floor down."""
    arrows = reduced(graph)
    lines = ["| floor | room | what it is for | rests on |", "|---|---|---|---|"]
    for floor in reversed(read_floors(graph)):
        first = f"{floor.number} **{floor.name}**: {floor.reason}"
        for name in floor.rooms:
            room = describe(name)
            inside = "; ".join(f"`{part}/`: {purpose}" for part, purpose in room.parts)
            rests_on = ", ".join(f"`{other}`" for other in sorted(arrows[name]))
            text = f"{room.purpose}. Inside: {inside}" if inside else room.purpose
            lines.append(f"| {first} | `{room.path}` | {text} | {rests_on} |")
            first = ""
    return "\n".join(lines)


# The picture

_WIDTH, _MARGIN, _GAP, _BETWEEN_LINES, _LINE = 860, 16, 14, 34, 14
_LEFT = 118  # where the boxes begin, right of the names of the floors
_SIGN = 7.6  # the width of a letter of a name
_SMALL_SIGN = 6.0


@dataclass
class Box:
    """A room in the picture."""

    name: str
    lines: list[str]
    x: float = 0.0
    y: float = 0.0

    @property
    def title(self) -> str:
        """What is written in it."""
        return PACKAGE.name if self.name == PACKAGE_ROOM else self.name

    @property
    def width(self) -> float:
        """As wide as its longest line."""
        return 20 + max(len(self.title) * _SIGN, *(len(line) * _SMALL_SIGN for line in self.lines), 40)

    @property
    def height(self) -> float:
        """As high as its lines."""
        return 28 + _LINE * len(self.lines)

    @property
    def middle(self) -> float:
        """Of its upper and lower side."""
        return self.x + self.width / 2


def laid_out(graph: Graph) -> tuple[list[Box], list[tuple[Floor, float]], float]:
    """The boxes, the top floor first; the middle of each floor; and the height of the picture."""
    placed: list[Box] = []
    middles: list[tuple[Floor, float]] = []
    y = float(_MARGIN)
    above: dict[str, float] = {}  # the middle of the rooms that rest on a room
    arrows = reduced(graph)
    for floor in reversed(read_floors(graph)):
        boxes = [_box(name) for name in floor.rooms]
        boxes.sort(key=lambda box: (above.get(box.name, _WIDTH / 2), box.name))
        top = y
        for line in _in_lines(boxes):
            free = _WIDTH - _LEFT - _MARGIN - sum(box.width for box in line)
            space = free / (len(line) + 1)
            x = _LEFT + space
            for box in line:
                box.x, box.y = x, y
                x += box.width + space
            y += max(box.height for box in line) + _BETWEEN_LINES
            placed.extend(line)
        middles.append((floor, (top + y - _BETWEEN_LINES) / 2))
        for box in boxes:
            for other in arrows[box.name]:
                above[other] = (above[other] + box.middle) / 2 if other in above else box.middle
    return placed, middles, y - _BETWEEN_LINES + _MARGIN


def _box(name: str) -> Box:
    inside = " ".join(f"{part}/" for part, _ in describe(name).parts)
    return Box(name, textwrap.wrap(inside, 26, break_long_words=False))


def _in_lines(boxes: list[Box]) -> Iterator[list[Box]]:
    line: list[Box] = []
    for box in boxes:
        if line and sum(other.width + _GAP for other in (*line, box)) > _WIDTH - _LEFT - _MARGIN:
            yield line
            line = []
        line.append(box)
    yield line


def picture(graph: Graph) -> str:
    """The rooms as an SVG: an arrow goes from a room to what it rests on."""
    boxes, middles, height = laid_out(graph)
    by_name = {box.name: box for box in boxes}
    title = "The rooms of src/modelparallel; an arrow leads to what a room rests on"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{title}" font-family="system-ui, sans-serif">',
        f"<title>{title}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#5b6b7b"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height:.0f}" rx="8" fill="#ffffff"/>',
    ]
    parts.extend(_arrows(reduced(graph), by_name))
    for floor, middle in middles:
        parts.append(_text(_LEFT / 2, middle + 4, f"{floor.number} {floor.name}", "12", "#5b6b7b"))
    for box in boxes:
        parts.append(
            f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6" '
            'fill="#eef3f8" stroke="#33506e"/>'
        )
        parts.append(_text(box.middle, box.y + 19, box.title, "13", "#10243a"))
        for index, line in enumerate(box.lines):
            parts.append(_text(box.middle, box.y + 34 + _LINE * index, line, "10.5", "#3c5168"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrows(arrows: Graph, boxes: dict[str, Box]) -> Iterable[str]:
    for name in sorted(arrows):
        for other in sorted(arrows[name]):
            upper, lower = boxes[name], boxes[other]
            start, end = upper.y + upper.height, lower.y - 1
            bend = (end - start) / 2
            yield (
                f'<path d="M{upper.middle:.0f} {start:.0f}C{upper.middle:.0f} {start + bend:.0f} {lower.middle:.0f} '
                f'{end - bend:.0f} {lower.middle:.0f} {end:.0f}" fill="none" stroke="#9fb0c2" stroke-width="1.2" '
                'marker-end="url(#tip)"/>'
            )


def _text(x: float, y: float, text: str, size: str, colour: str) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )


def page_with(block: str, page: str) -> str:
    """The page with ``block`` between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def block_of(graph: Graph) -> str:
    """What stands between the marks of the page."""
    picture_line = f"[![The rooms of the source, and what each rests on]({PICTURE.name})]({PICTURE.name})"
    return f"{picture_line}\n\n{table(graph)}"


def main() -> None:
    """Write the picture and the table."""
    graph = read_graph()
    PICTURE.write_text(picture(graph))
    PAGE.write_text(page_with(block_of(graph), PAGE.read_text()))


if __name__ == "__main__":
    main()
