"""All models of the zoo, and their table in docs/models.md, which ``python tests/zoo_catalogue.py`` writes."""

from __future__ import annotations

from pathlib import Path

from zoo import PLAIN, Entry
from zoo_media import AUDIO, MIXED, TORCH, VISION
from zoo_text import DECODERS, ENCODER_DECODERS, ENCODERS, EXPERTS, STATE_SPACE

ZOO: dict[str, Entry] = {
    **DECODERS, **ENCODERS, **ENCODER_DECODERS, **EXPERTS, **STATE_SPACE, **VISION, **AUDIO, **MIXED, **TORCH, **PLAIN,
}  # fmt: skip
NUM_STAGES = (2, 4)
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table: written by tests/zoo_catalogue.py -->\n", "<!-- end of the table -->\n"


def table() -> str:
    """The models as Markdown, by family."""
    lines = ["| Family | Class | Stages | Remarks |", "| --- | --- | --- | --- |"]
    stages = ", ".join(map(str, NUM_STAGES))
    lines += [f"| {entry.family} | `{entry.class_name}` | {stages} | {entry.remarks} |" for entry in ZOO.values()]
    return "\n".join(lines) + "\n"


def split_document() -> tuple[str, str, str]:
    """docs/models.md before, in and after the table."""
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = split_document()
    DOCUMENT.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
