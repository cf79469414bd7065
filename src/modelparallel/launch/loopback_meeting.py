"""The rendezvous of the one agent of a local job: a store that only processes of this machine can reach.

torch's own "static" rendezvous listens at all addresses. `smp.init` does not need the store (job/rendezvous.py); a
script that calls `torch.distributed.init_process_group` itself finds it at MASTER_ADDR and MASTER_PORT, as under
torchrun.
"""

import datetime

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from modelparallel.errors import LaunchError
from modelparallel.job.rendezvous import loopback_listener

NAME = "modelparallel-local"
_SECONDS = 60


def register() -> None:
    """Let torch's agent find it by its name."""
    rendezvous_handler_registry.register(NAME, _LoopbackMeeting)


class _LoopbackMeeting(RendezvousHandler):
    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._host, _, port = parameters.endpoint.rpartition(":")
        self._port = int(port)
        self._store: dist.Store | None = None

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            try:
                listening = loopback_listener(self._port)
            except OSError as error:
                raise LaunchError(f"port {self._port} was free and is not any more ({error}): start again") from error
            self._store = dist.TCPStore(
                self._host,
                self._port,
                is_master=True,
                timeout=datetime.timedelta(seconds=_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=listening,
            )
        store = dist.PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self._host, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """There is one agent, and nobody else to tell."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True
