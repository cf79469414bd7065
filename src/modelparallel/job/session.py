"""The ambient object: what `smp.init()` found out about this process, and made.

One of the two ambient objects of the library (the other is `registry`). Only the public API and the wrappers read
`current()`; the parts get groups, configuration and device as arguments.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from modelparallel.comm import ending
from modelparallel.comm.authentication import MadeGroups
from modelparallel.comm.groups import Groups
from modelparallel.comm.lookout import Lookout
from modelparallel.comm.making import build_groups, connecting_seconds
from modelparallel.config.reading import Config, load_config, merge_second_init
from modelparallel.config.topology import Topology
from modelparallel.errors import CommunicationError, NotInitializedError, SMPConfigError, SMPError
from modelparallel.job import rendezvous
from modelparallel.job.discovery import ProcessIdentity, discover_process, job_marks, lonely_hint
from modelparallel.job.meeting import Meeting
from modelparallel.job.places import Places, find_places
from modelparallel.torch_compat.process_groups import set_timeout

logger = logging.getLogger("modelparallel")

#: "cpu" runs on the CPU although there is a GPU; the launcher's `--device` sets it.
DEVICE_VARIABLE = "MODELPARALLEL_DEVICE"


class SharedRuntime(Protocol):
    """What the step functions, models and optimizers of the process share; `training.runtime.Runtime` is one."""

    @property
    def models(self) -> Sequence[object]:
        """The wrapped models."""

    @property
    def is_pipelined(self) -> bool:
        """Whether there is more than one stage."""

    def in_group_call(self, what: str, group: str, stages: Sequence[int]) -> AbstractContextManager[None]:
        """The caller waits in a collective call outside the steps, which the other stages should know."""


@dataclass
class Session:
    """What `smp.init()` made."""

    config: Config
    topology: Topology
    identity: ProcessIdentity
    groups: Groups
    device: torch.device
    places: Places
    # All process groups, so that a second smp.init makes only those that are missing, and all are destroyed at the end.
    made_groups: MadeGroups
    # Made by the wrappers when it is first needed.
    runtime: SharedRuntime | None = None
    # Called at the end: first, with the seconds that each may take, those that finish what works in the background;
    # then, before the connections are closed, the others. The order does not matter.
    finishers: list[Callable[[float], None]] = field(default_factory=list)
    closers: list[Callable[[], None]] = field(default_factory=list)
    transports: list[ending.Leaving] = field(default_factory=list)
    # The process is known to end by an error, which `sys` does not say of an exit code.
    ends_by_error: bool = False
    _has_default_group: bool = False

    @property
    def made_default_group(self) -> bool:
        """Whether the default group of torch.distributed is the session's, and not the script's."""
        return self._has_default_group

    @property
    def message_group(self) -> dist.ProcessGroup:
        """The group of all ranks that carries objects, on the CPU."""
        return self.groups.message_process_group


_current: Session | None = None
_has_met_others = False


def current() -> Session:
    """The session of this process. Raises `NotInitializedError` before `smp.init()`."""
    if _current is None:
        raise NotInitializedError(
            "modelparallel is not initialized: call smp.init() first, once, on every process; it makes the groups"
        )
    return _current


def is_initialized() -> bool:
    """Whether `smp.init()` was called. Local."""
    return _current is not None


def initialize(parameters: Mapping[str, Any] | str | None = None, environ: Mapping[str, str] | None = None) -> Session:
    """Make the session; collective over the world. What `smp.init(parameters)` does (smp-api section 1).

    Finds rank and world size (smp-config section 5.7), loads and checks the configuration, initializes
    `torch.distributed` unless the script did, and makes all groups. A second call adds the keys that are new; keys
    that contradict the first call are ignored with a warning.

    Raises `SMPConfigError`, before anything is started, for values that are wrong or do not fit the number of
    processes.
    """
    global _current, _has_met_others
    environ = os.environ if environ is None else environ
    if _current is not None:
        _initialize_again(_current, parameters)
        return _current
    config = load_config(parameters, environ)
    identity = _identify(environ)
    config.check_world(identity.world_size)
    if identity.is_host_known:  # before anything is started
        _choose_device(identity, environ, may_share=config.shares_devices)
    has_default_group = not dist.is_initialized()
    lookout = Lookout(identity.global_rank, config.timeout_seconds)
    if identity.global_rank == 0:
        for notice in (*config.notices, *filter(None, [lonely_hint(identity, environ)])):
            logger.warning("%s", notice)
    _has_met_others = True
    try:
        session = _meet_all(config, identity, environ, lookout)
    except BaseException as error:
        lookout.close()
        if has_default_group and isinstance(error, SMPError) and dist.is_initialized():
            dist.destroy_process_group()
        raise
    session.closers.append(lookout.close)
    _current = session
    atexit.register(shutdown)
    ending.before_threads_end(_finish_background)
    return session


def shutdown() -> None:
    """Forget the session, say goodbye to the other ranks and let go of its process groups and threads. For tests, and
    at the end of the process. Not collective, but waits some seconds for ranks that come later.

    Without it torch's threads may abort the process at its end ([Note: the end of a process]).
    """
    global _current
    session, _current = _current, None
    atexit.unregister(shutdown)
    if session is not None and dist.is_initialized():
        ending.leave(session)


@atexit.register  # with the import of the library: what the script registers runs before
def _end_last() -> None:
    if _has_met_others:
        ending.keep_from_aborting()


def _finish_background() -> None:
    if _current is not None:
        ending.finish_background(_current)


def _initialize_again(session: Session, parameters: Mapping[str, Any] | str | None) -> None:
    """Merge the parameters of a later smp.init; new groups only if they change the topology."""
    if not parameters:
        return
    config, warnings = merge_second_init(session.config, parameters)
    world_size = session.identity.world_size
    config.check_world(world_size)
    if session.identity.global_rank == 0:
        for text in (*warnings, *(notice for notice in config.notices if notice not in session.config.notices)):
            logger.warning("%s", text)
    topology = _topology(config, world_size)
    if topology != session.topology:
        if session.runtime is not None and session.runtime.models:
            raise SMPConfigError(
                "smp.init was called again, after smp.DistributedModel, with parameters that change the groups "
                f"({session.topology} -> {topology}): call it before the first model is wrapped"
            )
        merged = _assemble(
            config, session.identity, session.places, session.device, session._has_default_group, session.made_groups
        )
        session.topology, session.groups = merged.topology, merged.groups
    session.config = config


def _assemble(
    config: Config,
    identity: ProcessIdentity,
    places: Places,
    device: torch.device,
    has_default_group: bool,
    made: MadeGroups,
) -> Session:
    topology = _topology(config, identity.world_size)
    backend = backend_for(config, device)
    world = dist.group.WORLD
    try:
        with places.named():
            if world is not None and _carries(backend):
                made.add("training", tuple(range(identity.world_size)), world)
            groups = build_groups(
                topology,
                identity.global_rank,
                backend=backend,
                timeout_seconds=_group_timeout(config),
                wait_seconds=config.timeout_seconds,
                settings=config.model_dump(),
                made=made,
            )
    except RuntimeError as error:
        if isinstance(error, SMPError):
            raise
        raise CommunicationError(
            f"global rank {identity.global_rank} of {identity.world_size}: the process groups could not be made, most "
            f"often because another process has ended or has not called smp.init ({str(error).splitlines()[0]})"
        ) from error
    return Session(config, topology, identity, groups, device, places, made, _has_default_group=has_default_group)


def _topology(config: Config, world_size: int) -> Topology:
    return Topology(
        world_size, config.pipeline_parallel_degree, config.tensor_parallel_degree, config.placement_strategy
    )


def _carries(backend: str) -> bool:
    """Whether the default group, which a script may have made, serves the tensors that our groups must carry."""
    available = dist.get_backend_config(dist.group.WORLD)
    if backend == "gloo":
        return "cpu:gloo" in available
    return "cpu:gloo" in available and "cuda:nccl" in available


def _identify(environ: Mapping[str, str]) -> ProcessIdentity:
    """Who this process is; a default group that a script made before smp.init has the last word."""
    identity = discover_process(environ)
    if not dist.is_initialized():
        return identity
    global_rank, world_size = dist.get_rank(), dist.get_world_size()
    if (identity.global_rank, identity.world_size) == (global_rank, world_size):
        return identity
    return ProcessIdentity(global_rank, world_size, -1, 0, "torch.distributed")


def _choose_device(identity: ProcessIdentity, environ: Mapping[str, str], *, may_share: bool) -> torch.device:
    """The process's own device, or one of fewer; torch.cuda.set_device is left to the script, as documented."""
    wanted = environ.get(DEVICE_VARIABLE, "auto").strip().lower() or "auto"
    if wanted not in ("auto", "cpu", "cuda"):
        raise SMPConfigError(
            f"environment variable {DEVICE_VARIABLE}: must be one of 'auto', 'cpu', 'cuda', got {wanted!r}"
        )
    # Looked at first: a rehearsal on the CPU lets scripts see CUDA as available.
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if may_share and num_devices:
        return torch.device("cuda", identity.local_rank % num_devices)
    if identity.local_rank >= num_devices:
        raise SMPConfigError(
            f"local rank {identity.local_rank} has no GPU: {identity.local_world_size} processes on {num_devices} GPUs "
            f"of this host: start at most {num_devices} processes per host, let them share GPUs (ddp_dist_backend "
            f"'gloo', slower), let each process see all of them (Slurm: --gpus-per-node, not --gpus-per-task), or set "
            f"{DEVICE_VARIABLE}=cpu"
        )
    return torch.device("cuda", identity.local_rank)


def backend_for(config: Config, device: torch.device) -> str:
    """The backends of the process groups, as torch names them."""
    # CPU tensors always need gloo: objects and the messages between stages travel on the CPU.
    if device.type == "cuda" and config.ddp_dist_backend != "gloo" and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def _group_timeout(config: Config) -> float:
    """The time limit of torch's groups, in seconds: each wait sets its own, shorter or equal, limit."""
    return max(config.timeout_seconds, config.message_timeout_seconds)


def _meet_all(config: Config, identity: ProcessIdentity, environ: Mapping[str, str], lookout: Lookout) -> Session:
    """All processes meet, find out where they are, and make the default process group, unless the script has, and all
    others: through a store on the host of global rank 0; a single process uses no network.
    """
    seconds = rendezvous.most_seconds(config)
    has_default_group = not dist.is_initialized()
    found = rendezvous.make_store(config, identity, environ) if has_default_group else rendezvous.script_store(environ)
    with rendezvous.named(identity, found.place):
        store = Meeting(
            found.store,
            identity,
            marks=job_marks(identity, environ),
            settings=config.model_dump(),
            place=found.place,
            is_of_rank_0=found.is_of_rank_0,
            is_own=found.is_own,
            seconds=seconds,
            lookout=lookout,
        ).hold()
        places = Places.of_one_host(identity.world_size)
        if not identity.is_one_host:
            identity, places = find_places(
                store, identity, os.environ, found.host, seconds, may_choose=has_default_group
            )
    device = _choose_device(identity, environ, may_share=config.shares_devices)
    backend = backend_for(config, device)
    if identity.global_rank == 0 and config.ddp_dist_backend == "nccl" and device.type != "cuda":
        logger.warning("ddp_dist_backend='nccl': gloo is used instead, since this process has no GPU")
    if has_default_group:
        with places.named(), rendezvous.named(identity, found.place):
            dist.init_process_group(
                backend,
                store=store,
                rank=identity.global_rank,
                world_size=identity.world_size,
                timeout=datetime.timedelta(seconds=connecting_seconds(seconds)),
            )
        set_timeout(None, _group_timeout(config))
    with rendezvous.shared_secret(store, identity, environ, found.place) as secret:
        made = MadeGroups(secret, lookout, seconds, store)
        return _assemble(config, identity, places, device, has_default_group, made)
