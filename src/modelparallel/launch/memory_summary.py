"""What the ranks of a job took, in a line for each stage: said when the job has finished."""

from collections.abc import Mapping
from typing import Any

from modelparallel.errors.foreign_text import natural, parse_json
from modelparallel.launch.folder import JobFolder
from modelparallel.plan.partition import readable_bytes

_MAX_LINES = 16


def memory_summary(folder: JobFolder) -> list[str]:
    """A line for each stage, of its rank with the highest peak; none if no rank has updated a model.

    What is held after the first update is compared with the prediction; the peak is that of the CUDA allocator, without
    CUDA that of the process, libraries included.
    """
    by_stage: dict[int, list[Mapping[str, Any]]] = {}
    paths = [path for part in folder.of_nodes() for path in part.events.glob("rank*.memory.json")]
    for path in sorted(paths):
        try:
            record = parse_json(path.read_text(encoding="utf-8"))
            for name in ("stage", "global_rank", "held", "predicted", "device_peak", "resident_peak"):
                if record[name] is not None:
                    natural(record[name], name)
            by_stage.setdefault(natural(record["stage"], "stage"), []).append(record)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a process was killed while it wrote
    lines = [_line(stage, records) for stage, records in sorted(by_stage.items())]
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"... and {len(lines) - _MAX_LINES} more stages"]
    return lines


def _line(stage: int, records: list[Mapping[str, Any]]) -> str:
    largest = max(records, key=_peak)
    device, process = largest["device_peak"], largest["resident_peak"]
    peaks = [f"CUDA peak {readable_bytes(device)}"] if device else []
    peaks += [f"process peak {readable_bytes(process)}"] if process else []
    ranks = "1 rank" if len(records) == 1 else f"{len(records)} ranks, most on rank {largest['global_rank']}"
    return (
        f"memory of stage {stage} ({ranks}): {readable_bytes(largest['held'])} held after the first update, "
        f"{readable_bytes(largest['predicted'])} predicted" + "".join(f", {peak}" for peak in peaks)
    )


def _peak(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["device_peak"] or 0, record["resident_peak"] or 0
