"""Draws the rooms of the source and who rests on whom, from its imports: a picture and a table of docs/architecture.md.

Run `python docs/draw_architecture.py` after a change of the imports; a test compares what it makes with what is there.
It needs nothing but Python.

A room is a folder directly in src/modelparallel, with all that is inside, or a file there. Every import counts, also
those in functions and those for the type checker alone. A room stands one floor above the highest one that it rests on;
rooms that import each other stand on one floor. Arrows that follow from others are left out.
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
#: The room of the names that scripts import: the package itself, and files that no other room imports.
NAMES = "modelparallel"

Graph = dict[str, set[str]]


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
    return first if first and is_room and not first.startswith("__") else NAMES


def read_graph() -> Graph:
    """For every room the rooms that it imports."""
    graph: Graph = {NAMES: set()}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        graph.setdefault(room, set()).update(room_of(module) for module in imported(path))
    graph = {room: others - {room} for room, others in graph.items()}
    # Files that only give a name to what is elsewhere are one with the package.
    wanted = {other for room, others in graph.items() if room != NAMES for other in others}
    thin = {room for room in graph if (PACKAGE / f"{room}.py").exists() and room not in wanted}
    for room in thin:
        graph[NAMES] |= graph.pop(room)
    graph[NAMES] -= {*thin, NAMES}
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
    """Without the arrows that follow from others; among rooms that import each other, all of them."""
    below = reached(graph)
    return {
        room: {
            other
            for other in others
            if room in below[other]
            or not any(
                other in below[middle] and middle not in below[other] and room not in below[middle]
                for middle in others - {other}
            )
        }
        for room, others in graph.items()
    }


def floors_of(graph: Graph) -> list[list[str]]:
    """The rooms of each floor, the ground first."""
    below = reached(graph)
    heights: dict[str, int] = {}
    while len(heights) < len(graph):
        ready = [
            room
            for room in graph
            if room not in heights and all(other in heights or room in below[other] for other in below[room])
        ]
        for room in ready:
            lower = [heights[other] for other in below[room] if room not in below[other]]
            heights[room] = 1 + max(lower, default=-1)
    return [sorted(room for room in graph if heights[room] == floor) for floor in range(max(heights.values()) + 1)]


def describe(name: str) -> Room:
    """What there is to say of a room."""
    if name == NAMES:
        return Room(name, "__init__.py", purpose_of(PACKAGE / "__init__.py"))
    if (PACKAGE / f"{name}.py").exists():
        return Room(name, f"{name}.py", purpose_of(PACKAGE / f"{name}.py"))
    parts = tuple((path.parent.name, purpose_of(path)) for path in sorted((PACKAGE / name).glob("*/__init__.py")))
    return Room(name, f"{name}/", purpose_of(PACKAGE / name / "__init__.py"), parts)


def table(graph: Graph) -> str:
    """The rooms from the top floor down."""
    arrows = reduced(graph)
    floors = floors_of(graph)
    lines = ["| floor | room | what it is for | rests on |", "|---|---|---|---|"]
    for floor in range(len(floors) - 1, -1, -1):
        for name in floors[floor]:
            room = describe(name)
            inside = "; ".join(f"`{part}/`: {purpose}" for part, purpose in room.parts)
            rests_on = ", ".join(f"`{other}`" for other in sorted(arrows[name]))
            text = f"{room.purpose}. Inside: {inside}" if inside else room.purpose
            lines.append(f"| {floor} | `{room.path}` | {text} | {rests_on} |")
    return "\n".join(lines)


# The picture

_WIDTH, _MARGIN, _GAP, _BETWEEN_LINES, _LINE = 800, 16, 14, 34, 14
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
    def width(self) -> float:
        """As wide as its longest line."""
        return 20 + max(len(self.name) * _SIGN, *(len(line) * _SMALL_SIGN for line in self.lines), 40)

    @property
    def height(self) -> float:
        """As high as its lines."""
        return 28 + _LINE * len(self.lines)

    @property
    def middle(self) -> float:
        """Of its upper and lower side."""
        return self.x + self.width / 2


def laid_out(graph: Graph) -> tuple[list[Box], float]:
    """The boxes, the top floor first, and the height of the picture."""
    placed: list[Box] = []
    y = float(_MARGIN)
    above: dict[str, float] = {}  # the middle of the rooms that rest on a room
    arrows = reduced(graph)
    for floor in reversed(floors_of(graph)):
        boxes = [_box(name) for name in floor]
        boxes.sort(key=lambda box: (above.get(box.name, _WIDTH / 2), box.name))
        for line in _in_lines(boxes):
            free = _WIDTH - 2 * _MARGIN - sum(box.width for box in line)
            space = free / (len(line) + 1)
            x = _MARGIN + space
            for box in line:
                box.x, box.y = x, y
                x += box.width + space
            y += max(box.height for box in line) + _BETWEEN_LINES
            placed.extend(line)
        for box in boxes:
            for other in arrows[box.name]:
                above[other] = (above[other] + box.middle) / 2 if other in above else box.middle
    return placed, y - _BETWEEN_LINES + _MARGIN


def _box(name: str) -> Box:
    inside = " ".join(f"{part}/" for part, _ in describe(name).parts)
    return Box(name, textwrap.wrap(inside, 26, break_long_words=False))


def _in_lines(boxes: list[Box]) -> Iterator[list[Box]]:
    line: list[Box] = []
    for box in boxes:
        if line and sum(other.width + _GAP for other in (*line, box)) > _WIDTH - 2 * _MARGIN:
            yield line
            line = []
        line.append(box)
    yield line


def picture(graph: Graph) -> str:
    """The rooms as an SVG: an arrow goes from a room to what it rests on."""
    boxes, height = laid_out(graph)
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
    for box in boxes:
        parts.append(
            f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6" '
            'fill="#eef3f8" stroke="#33506e"/>'
        )
        parts.append(_text(box.middle, box.y + 19, box.name, "13", "#10243a"))
        for index, line in enumerate(box.lines):
            parts.append(_text(box.middle, box.y + 34 + _LINE * index, line, "10.5", "#3c5168"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrows(arrows: Graph, boxes: dict[str, Box]) -> Iterable[str]:
    for name in sorted(arrows):
        for other in sorted(arrows[name]):
            upper, lower = boxes[name], boxes[other]
            if lower.y <= upper.y:
                continue  # of rooms that import each other one arrow says it
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
