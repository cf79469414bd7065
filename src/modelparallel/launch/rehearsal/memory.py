"""Memory statistics: the memory of the process stands for that of its GPU, so that logs and limits show real numbers.

"Allocated" and "reserved" are the resident memory of the process; peaks are the kernel's high-water mark.
"""

import collections
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from modelparallel.launch.rehearsal.mapping import Installation

_PEAK_KEY, _CURRENT_KEY = "VmHWM:", "VmRSS:"
#: Written to clear_refs, it sets the high-water mark back to the present use (proc(5)).
_RESET_PEAK = "5"


def resident_bytes(device: Any = None) -> int:
    """Memory that the process uses now."""
    return _from_status(_CURRENT_KEY)


def peak_bytes(device: Any = None) -> int:
    """Most memory that the process used since its start or the last reset."""
    return max(_from_status(_PEAK_KEY), resident_bytes())


def reset_peak(device: Any = None) -> None:
    """Start a new measurement of the peak, where the kernel lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        # Without it peaks count from the start of the process: an upper limit, which is the safe side.
        return


def memory_stats(device: Any = None) -> dict[str, Any]:
    """The keys that scripts read; every other key is 0."""
    stats: dict[str, Any] = collections.defaultdict(int)
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes"):
        stats[f"{kind}.all.current"] = resident_bytes()
        stats[f"{kind}.all.peak"] = peak_bytes()
    stats.update(num_alloc_retries=0, num_ooms=0)
    return stats


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    return f"CPU rehearsal: the process uses {resident_bytes() >> 20} MiB, at most {peak_bytes() >> 20} MiB"


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total memory of this machine."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:  # macOS
        return total_bytes() - resident_bytes(), total_bytes()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), total_bytes()


def total_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _from_status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _no_snapshot(*args: Any, **kwargs: Any) -> list[Any]:
    return []


def _whole_fraction(*args: Any, **kwargs: Any) -> float:
    return 1.0


def install(installation: Installation) -> None:
    table = {
        "memory_allocated": (resident_bytes, "resident memory of the process"),
        "memory_reserved": (resident_bytes, "resident memory of the process"),
        "memory_cached": (resident_bytes, "resident memory of the process"),
        "max_memory_allocated": (peak_bytes, "peak of the resident memory"),
        "max_memory_reserved": (peak_bytes, "peak of the resident memory"),
        "max_memory_cached": (peak_bytes, "peak of the resident memory"),
        "reset_peak_memory_stats": (reset_peak, "starts a new peak"),
        "reset_max_memory_allocated": (reset_peak, "starts a new peak"),
        "reset_max_memory_cached": (reset_peak, "starts a new peak"),
        "reset_accumulated_memory_stats": (_nothing, "does nothing"),
        "memory_stats": (memory_stats, "resident memory and its peak; other keys are 0"),
        "memory_summary": (memory_summary, "one line of text"),
        "memory_snapshot": (_no_snapshot, "an empty list"),
        "mem_get_info": (mem_get_info, "free and total memory of the machine"),
        "empty_cache": (_nothing, "does nothing"),
        "set_per_process_memory_fraction": (_nothing, "does nothing"),
        "get_per_process_memory_fraction": (_whole_fraction, "1.0"),
    }
    for name, (replacement, meaning) in table.items():
        installation.module_name(torch.cuda, name, replacement, meaning)
        installation.module_name(torch.cuda.memory, name, replacement, meaning)
