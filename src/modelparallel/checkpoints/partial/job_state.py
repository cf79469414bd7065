"""What a job needs beside weights to go on where it stopped: random states, the number of steps, the place in the data.

[Note: randomness on another shape] Random states are kept for each place in the job (pp, tp, rdp). A rank of a job of
another shape takes those of the place that its own has modulo the saved sizes: scripts that seed all ranks alike go on
alike. On the same shape a job goes on with the numbers that it would have drawn.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from modelparallel.errors import CheckpointError, SMPConfigError

if TYPE_CHECKING:
    from modelparallel.comm.groups import Groups
    from modelparallel.training.runtime import Runtime

RANDOM_KEY = "job.random"
LOADER_KEY = "job.data_loader"
STEPS_KEY = "job.num_steps"
NUMPY_NAME, NUMPY_FIELDS = "MT19937", ("keys", "position", "has_gauss", "gauss")


def coordinates(groups: Groups) -> tuple[int, int, int]:
    """(pp_rank, tp_rank, rdp_rank) of the caller. Local."""
    return groups.pp.rank_in_group, groups.tp.rank_in_group, groups.rdp.rank_in_group


def sizes(groups: Groups) -> tuple[int, int, int]:
    """(pp_size, tp_size, rdp_size). Local."""
    return groups.pp.size, groups.tp.size, groups.rdp.size


def job_objects(runtime: Runtime, data_loader: Any) -> dict[str, Any]:
    """The entries of this rank: random states, steps, and where the data loader stands. Local."""
    groups = runtime.session.groups
    place = "_".join(map(str, coordinates(groups)))
    num_steps = runtime.num_steps + runtime.num_earlier_steps
    result = {f"{RANDOM_KEY}.{place}": random_states(runtime.session.device), STEPS_KEY: num_steps}
    if data_loader is not None:
        result[f"{LOADER_KEY}.{groups.dp.rank_in_group}"] = data_loader.state_dict()
    return result


def check_loader(data_loader: Any) -> None:
    """Raise SMPConfigError for a data loader that cannot say where it stands."""
    missing = [name for name in ("state_dict", "load_state_dict") if not callable(getattr(data_loader, name, None))]
    if data_loader is not None and missing:
        raise SMPConfigError(
            f"data_loader={type(data_loader).__name__}: it has no {' and no '.join(missing)}: give a "
            "torchdata.stateful_dataloader.StatefulDataLoader, a smp.GlobalBatchSampler, or another object of that "
            "protocol"
        )


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators of torch, Python and numpy, of plain types. Local."""
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        if name == NUMPY_NAME:
            states["numpy"] = {
                "keys": [int(key) for key in keys],
                "position": int(position),
                "has_gauss": int(has_gauss),
                "gauss": float(gauss),
            }
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse. Local."""
    torch.set_rng_state(states["torch"].cpu())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    if "numpy" in states:
        import numpy

        numpy.random.set_state((NUMPY_NAME, *(states["numpy"][field] for field in NUMPY_FIELDS)))


def wanted_keys(groups: Groups, facts: Mapping[str, Any], keys: Mapping[str, Any], data_loader: Any) -> dict[str, str]:
    """Which entries this rank takes: by "random", "steps" and "data_loader". Local. ``facts``: of the completion
    record.

    Raises CheckpointError if a data loader is given and its place cannot be told from the checkpoint.
    """
    saved_sizes = tuple(int(facts["shape"][axis]) for axis in ("pp", "tp", "rdp"))
    place = "_".join(str(own % saved) for own, saved in zip(coordinates(groups), saved_sizes, strict=True))
    wanted = {"random": f"{RANDOM_KEY}.{place}", "steps": STEPS_KEY}
    if data_loader is not None:
        wanted["data_loader"] = _loader_key(groups, saved_sizes[1] * saved_sizes[2], keys, data_loader)
    return {what: key for what, key in wanted.items() if key in keys}


def _loader_key(groups: Groups, saved_dp_size: int, keys: Mapping[str, Any], data_loader: Any) -> str:
    own = f"{LOADER_KEY}.{groups.dp.rank_in_group}"
    first = f"{LOADER_KEY}.0"
    if first not in keys:
        raise CheckpointError(
            "the checkpoint does not say where the data loader stood: save it with smp.save_checkpoint(..., "
            "data_loader=loader), or resume without data_loader"
        )
    if getattr(data_loader, "is_global", False):
        return first
    if saved_dp_size != groups.dp.size:
        raise CheckpointError(
            f"the data loaders of {saved_dp_size} data-parallel ranks were saved and this job has {groups.dp.size}: "
            "where each stands among its own samples does not tell what the others take next. Use "
            "smp.GlobalBatchSampler, whose place is that of the whole job, or the same number of data-parallel ranks"
        )
    return own


def take_job_state(runtime: Runtime, wanted: Mapping[str, str], read: Callable[[str], Any], data_loader: Any) -> None:
    """Put the entries of :func:`wanted_keys` back. Local. ``read`` gives the object of a key."""
    if "random" in wanted:
        set_random_states(read(wanted["random"]), runtime.session.device)
    if "steps" in wanted:
        runtime.num_earlier_steps = int(read(wanted["steps"])) - runtime.num_steps
    if "data_loader" in wanted:
        data_loader.load_state_dict(read(wanted["data_loader"]))
