"""All models of the zoo, and their table in docs/models.md, which ``python tests/zoo_catalogue.py`` writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from zoo import PLAIN, Entry
from zoo_media import AUDIO, MIXED, TORCH, VISION
from zoo_text import DECODERS, ENCODER_DECODERS, ENCODERS, EXPERTS, STATE_SPACE

ZOO: dict[str, Entry] = {
    **DECODERS, **ENCODERS, **ENCODER_DECODERS, **EXPERTS, **STATE_SPACE, **VISION, **AUDIO, **MIXED, **TORCH, **PLAIN,
}  # fmt: skip
NUM_STAGES = (2, 4)

# What classes of transformers record when they are asked for all that they can, which is compared with one process
# (test_recorded_values.py, which also proves that each records just this).
_NO_ATTENTIONS = (
    "fnet mamba mamba2 falcon_mamba convnext convnextv2 convnext_drop_path resnet regnet mobilenet_v1 poolformer cvt "
    "levit focalnet patch_tsmixer"
).split()
_ROUTED = "mixtral qwen2_moe qwen3_moe olmoe phimoe granitemoe dbrx gpt_oss switch jamba deepseek_v2 llama4".split()
RECORDED: dict[str, str] = {
    **{
        name: "hidden states, attentions"
        for name, entry in ZOO.items()
        if "." not in entry.class_name and entry.family != "plain torch"
    },
    **dict.fromkeys(_NO_ATTENTIONS, "hidden states"),
    **dict.fromkeys(_ROUTED, "hidden states, attentions, router logits"),
}
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table: written by tests/zoo_catalogue.py -->\n", "<!-- end of the table -->\n"


@contextlib.contextmanager
def as_entry_wants(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(ZOO[name].default_dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(7)
    return ZOO[name].make_model().double().train()


def table() -> str:
    """The models as Markdown, by family."""
    lines = ["| Family | Class | Stages | Recorded | Remarks |", "| --- | --- | --- | --- | --- |"]
    stages = ", ".join(map(str, NUM_STAGES))
    lines += [
        f"| {entry.family} | `{entry.class_name}` | {stages} | {RECORDED.get(name, '')} | {entry.remarks} |"
        for name, entry in ZOO.items()
    ]
    return "\n".join(lines) + "\n"


def split_document() -> tuple[str, str, str]:
    """docs/models.md before, in and after the table."""
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after


if __name__ == "__main__":
    before, _, after = split_document()
    DOCUMENT.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
