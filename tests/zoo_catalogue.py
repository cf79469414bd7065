"""All models of the zoo."""

from __future__ import annotations

from zoo import PLAIN, Entry
from zoo_media import AUDIO, MIXED, TORCH, VISION
from zoo_text import DECODERS, ENCODER_DECODERS, ENCODERS, EXPERTS, STATE_SPACE

TEXT = DECODERS | ENCODERS | ENCODER_DECODERS | EXPERTS | STATE_SPACE
ZOO: dict[str, Entry] = TEXT | VISION | AUDIO | MIXED | TORCH | PLAIN
