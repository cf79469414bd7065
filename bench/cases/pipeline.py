"""pp=2: the planned schedules against those of torch.distributed.pipelining, in the same two processes."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.cases.case import Case
from bench.harness import Result, measure_pairs, paired_result
from bench.models import token_batch
from bench.pipelines import BATCH, NUM_STAGES, SIZE, PeerPipeline, Setting, check_equal, our_model, train_step
from bench.ranks import run_on_ranks

LOOPED = (0, 1, 0, 1)
SETTINGS = {
    "pipeline_gpt_1f1b": Setting("interleaved", "Schedule1F1B"),
    "pipeline_gpt_gpipe": Setting("simple", "ScheduleGPipe"),
    "pipeline_gpt_virtual": Setting("interleaved", "ScheduleInterleaved1F1B", LOOPED, active_microbatches=4),
    "pipeline_gpt_zero_bubble": Setting("zero_bubble", "ScheduleInterleavedZeroBubble"),
    "pipeline_gpt_zero_bubble_virtual": Setting(
        "zero_bubble", "ScheduleInterleavedZeroBubble", LOOPED, active_microbatches=3
    ),
    "pipeline_gpt_zero_bubble_v": Setting("zero_bubble", "ScheduleZBVZeroBubble", (0, 1, 1, 0), active_microbatches=3),
}
TARGETS = {"pipeline_gpt_1f1b": "ratio <= 1.02", "pipeline_gpt_gpipe": "ratio <= 1.02"}
OTHER_TARGET = "ratio <= 1.00"


def compare_on_rank(setting: Setting, num_pairs: int) -> tuple[list[float], list[float]]:
    """On each of the two ranks."""
    ids, targets = token_batch(SIZE, BATCH)
    model, peer = our_model(setting), PeerPipeline(setting)

    def ours() -> Any:
        model.zero_grad()
        return train_step(model, ids, targets)

    def theirs() -> Any:
        peer.module.zero_grad()
        return peer.step(ids, targets)

    ours()  # in discovery order; what is measured comes after it
    check_equal(model, ours().reduce_mean(), peer, theirs())
    return measure_pairs(ours, theirs, num_pairs)


def measure(name: str, num_pairs: int) -> list[Result]:
    """Seconds per step, forward and backward of all microbatches."""
    setting = SETTINGS[name]
    ours, peer = run_on_ranks(compare_on_rank, NUM_STAGES, setting, num_pairs, parameters=setting.parameters())[0]
    return [paired_result(name, "s/step", ours, peer, TARGETS.get(name, OTHER_TARGET))]


def describe(setting: Setting) -> str:
    """For the document."""
    pieces = ", ".join(str(pp_rank) for pp_rank in setting.layout)
    return (
        f"pp=2, GPT of 8 layers x 512, 8 microbatches: `pipeline: {setting.pipeline}` with `active_microbatches: "
        f"{setting.active_microbatches}` against `{setting.peer}`; the model in {len(setting.layout)} equal pieces on "
        f"the processes {pieces}, for both."
    )


CASES = [Case(name, describe(setting), partial(measure, name)) for name, setting in SETTINGS.items()]
