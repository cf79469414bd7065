"""How many processes a job may have: `--nproc 4:8`, and which numbers of such a range fit the degrees of the model.

Pure functions; the numbers are decided before a process starts, and a restart only chooses among them.
"""

import re

from modelparallel.config.table import Config
from modelparallel.errors import LaunchError, SMPConfigError


def parse_process_counts(text: str, where: str = "--nproc") -> tuple[int, int]:
    """The least and the most processes of `8` or `4:8`. Raises `LaunchError`."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if match is None:
        raise LaunchError(f"{where} {text!r}: expected a number of processes or a range: 8, or 4:8 for 4 to 8 of them")
    least = int(match[1])
    most = least if match[2] is None else int(match[2])
    return checked_range(least, most, f"{where} {text}")


def checked_range(least: int, most: int, where: str) -> tuple[int, int]:
    """The range, if it is one. Raises `LaunchError`."""
    if least < 1:
        raise LaunchError(f"{where}: at least 1 process is needed")
    if least > most:
        raise LaunchError(f"{where}: the least number of processes, {least}, is more than the most, {most}")
    return least, most


def fitting_counts(config: Config, least: int, most: int, available: int, where: str) -> tuple[int, ...]:
    """The numbers of processes from `least` to `most` that the model can have, the largest first; at least one.

    Args:
        config: the checked parameters; their degrees decide.
        available: devices of this host, at most one process each; 0 on the CPU and where processes share them.
        where: what the user wrote, for the error.

    Raises `LaunchError` naming the degrees if there is none.
    """
    ceiling = min(most, available) if available else most
    counts = tuple(count for count in range(ceiling, least - 1, -1) if _fits(config, count))
    if counts:
        return counts
    shape = config.pipeline_parallel_degree * config.tensor_parallel_degree
    product = (
        f"pipeline_parallel_degree={config.pipeline_parallel_degree} * "
        f"tensor_parallel_degree={config.tensor_parallel_degree}"
    )
    unit = shape * config.sharded_data_parallel_degree
    if config.sharded_data_parallel_degree > 1:
        product += f" * sharded_data_parallel_degree={config.sharded_data_parallel_degree}"
    first = -(-least // unit) * unit
    if config.ddp:
        rule, remedy = f"a multiple of {unit} ({product})", f"use a range that holds {first}"
    else:
        rule = f"{shape} ({product}; more copies of the model need ddp: True)"
        remedy = f"use a range that holds {shape}, or set ddp: True"
    devices = f" on {available} devices, one process each" if available and available < most else ""
    raise LaunchError(
        f"{where}: no number of processes from {least} to {most} fits{devices}: it has to be {rule}; {remedy}"
        + (" and a host with as many devices, or rehearse on the CPU with device cpu" if devices else "")
    )


def _fits(config: Config, count: int) -> bool:
    try:
        config.check_world(count)
    except SMPConfigError:
        return False
    return True
