"""What the step functions, models and optimizers of one process share: the engine, the running step, the registered
objects.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from modelparallel.comm.stages.channels import PairChannels
from modelparallel.comm.stages.gloo import GlooTransport
from modelparallel.job import session
from modelparallel.job.preemption import PreemptionNotice
from modelparallel.parameters.index import ParameterIndex
from modelparallel.pipeline.engine import PipelineEngine
from modelparallel.recomputation.offload import HostStore
from modelparallel.training.data_of_ranks import InputChecks
from modelparallel.training.decisions import Decisions
from modelparallel.training.event_files import EventFile

if TYPE_CHECKING:
    from modelparallel.config.reading import Config
    from modelparallel.parameters.table import ParameterTable
    from modelparallel.training.participants import BackgroundSave, ParameterHolder, Participant, RunningStep

logger = logging.getLogger("modelparallel")


class Runtime:
    """One per session."""

    def __init__(self, of: session.Session) -> None:
        self.session = of
        self._event_file = EventFile.from_environment(of.identity.global_rank)
        #: Where the memory of this rank is written for the launcher; None: nowhere.
        self.memory_path = None if self._event_file is None else self._event_file.memory_path
        self.has_noted_memory = False
        self._has_failed = False
        transport = None
        if of.groups.pp.size > 1:
            transport = GlooTransport(
                of.groups.pp.rank_in_group,
                of.groups.pp.ranks,
                of.groups.pipeline_process_group,
                of.config.timeout_seconds,
                self._pair_channels(of),
            )
            of.transports.append(transport)
        self.engine = PipelineEngine(
            of.device, transport, of.config.push_limit_bytes, of.config.pipeline, of.config.active_microbatches
        )
        self._unused_store: HostStore | None = None  # until the first training step
        if of.config.offload_activations:
            self._unused_store = HostStore(of.device, of.config.activation_loading_horizon)
            self.engine.activation_store = self._unused_store
        self._decided: tuple[Config, Decisions] = of.config, Decisions.of(of.config, of.groups)
        self.engine.plans.lockstep_group = self.decisions.lockstep
        self.engine.plans.are_logged = of.groups.world.rank_in_group == 0  # not by every copy of the first stage
        self._transport = transport
        if self._event_file is not None and self._event_file.is_written_at_exit:
            of.closers.append(self._write_at_exit)
        #: The wrapped models of this process, in the order of wrapping.
        self.models: list[Participant] = []
        self.index: ParameterIndex[Participant] = ParameterIndex(self.models, self.engine.replace_tensor)
        self.step: RunningStep | None = None
        self.input_checks = InputChecks()
        self.num_steps = 0
        #: Calls of step functions that went backward, or failed; calls of ``step`` of wrapped optimizers. Both are the
        #: same on all data-parallel ranks.
        self.num_training_steps = 0
        self.num_updates = 0
        #: The unit of weighted losses; None before the first step with some.
        self.weight_unit: float | None = None
        # What earlier processes of a resumed job have run: random numbers count from the job's first step, and
        # messages from this process's.
        self.num_earlier_steps = 0
        self.optimizers: list[weakref.ref[ParameterHolder]] = []
        #: The checkpoint that was last saved in the background.
        self.background_save: BackgroundSave | None = None
        #: Made when the script asks for the first time.
        self.preemption: PreemptionNotice | None = None

    @staticmethod
    def _pair_channels(of: session.Session) -> PairChannels | None:
        """Where NCCL is in use, which wants a GPU of its own for every process."""
        if "nccl" not in session.backend_for(of.config, of.device):
            return None
        pipeline = of.groups.pp
        return PairChannels(pipeline.rank_in_group, pipeline.ranks, "nccl", of.device, of.config.timeout_seconds)

    def check_offload(self) -> None:
        """After a step with a backward: say so if ``offload_activations`` had nothing to move."""
        store, self._unused_store = self._unused_store, None
        if store is not None and not store.counts.stored:
            logger.warning(
                "offload_activations: nothing was moved to host memory in the first training step, since no module has "
                "activation checkpointing: mark modules with smp.set_activation_checkpointing"
            )

    def note_failure(self, error: BaseException) -> None:
        """A call of a step function has failed: write down what led to it, where that is asked for."""
        self._has_failed = True
        self._write_events(error)

    def _write_at_exit(self) -> None:
        if not self._has_failed:  # what is written then is worth more
            self._write_events(None)

    def _write_events(self, error: BaseException | None) -> None:
        if self._event_file is not None:
            global_rank, pipeline = self.session.identity.global_rank, self.session.groups.pp.ranks
            self._event_file.write(global_rank, pipeline, self.num_steps, self._transport, error)

    @property
    def is_pipelined(self) -> bool:
        """Whether there is more than one stage."""
        return self.engine.num_stages > 1

    def in_group_call(self, what: str, group: str, stages: Sequence[int]) -> AbstractContextManager[None]:
        """While the caller waits in a collective call outside the steps; see `StageTransport`."""
        return self.engine.transport.in_group_call(what, group, stages)

    @property
    def decisions(self) -> Decisions:
        """What the configuration means; made anew if another ``smp.init`` has added to it."""
        config = self.session.config
        if self._decided[0] is not config:
            self._decided = config, Decisions.of(config, self.session.groups)
        return self._decided[1]

    def live_optimizers(self) -> list[ParameterHolder]:
        """The wrapped optimizers that still exist."""
        alive = [(reference, optimizer) for reference in self.optimizers if (optimizer := reference()) is not None]
        self.optimizers = [reference for reference, _ in alive]
        return [optimizer for _, optimizer in alive]

    def optimizers_of(self, table: ParameterTable) -> list[ParameterHolder]:
        """The wrapped optimizers that hold parameters of the model of this table."""
        return [
            optimizer
            for optimizer in self.live_optimizers()
            if any(table.row_of(parameter) is not None for parameter in optimizer.all_parameters())
        ]


def current() -> Runtime:
    """The runtime of this process; raises NotInitializedError before smp.init()."""
    active = session.current()
    if not isinstance(active.runtime, Runtime):
        active.runtime = Runtime(active)
    return active.runtime


def init(config: Mapping[str, Any] | str | None = None) -> None:
    """Initialise the library: the first call of a script. Collective over the world.

    A later call adds parameters that were not given before. Does not select the CUDA device: call
    ``torch.cuda.set_device(smp.local_rank())``.

    Args:
        config: parameters as in docs/configuration.md, as a dict or the path of a JSON file; equal ones delivered by a
            launcher override them.

    Raises:
        SMPConfigError: a wrong parameter, or one that does not fit the number of processes.
        CommunicationError: the processes do not find each other.

    Source: smp-api section 1.
    """
    _show_log_lines()
    session.initialize(config)


def is_initialized() -> bool:
    """Whether ``smp.init()`` was called. Local."""
    return session.is_initialized()


def _show_log_lines() -> None:
    """Print our log (the partition, notices) unless the script has set up logging itself."""
    logger = logging.getLogger("modelparallel")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
