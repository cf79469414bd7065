"""The rendezvous of torch's agents: of the one of a local job, and of those of several hosts in an attempt.

torch's own "static" rendezvous listens at all addresses. `smp.init` does not need the store of a local job
(job/rendezvous.py); a script that calls `torch.distributed.init_process_group` itself finds it at MASTER_ADDR and
MASTER_PORT, as under torchrun.
"""

import datetime

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from modelparallel.errors import LaunchError
from modelparallel.job.rendezvous import loopback_listener

_SECONDS = 60


class AgentMeeting(RendezvousHandler):
    """A meeting whose members are known before: ``node_rank`` of ``num_nodes``, by the keys of ``store``, which the
    processes find at the address and port, too.
    """

    def __init__(
        self, name: str, store: dist.Store | None, node_rank: int, num_nodes: int, address: str, port: int
    ) -> None:
        self._name = name
        self._store = store
        self._node_rank, self._num_nodes = node_rank, num_nodes
        self._address, self._port = address, port

    def get_backend(self) -> str:
        return "modelparallel"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            self._store = _loopback_store(self._address, self._port)
        store = dist.PrefixStore(self._name, self._store)
        return RendezvousInfo(store, self._node_rank, self._num_nodes, RendezvousStoreInfo(self._address, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Who takes part is not decided here."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._name

    def shutdown(self) -> bool:
        return True


def local_meeting(name: str, address: str, port: int) -> AgentMeeting:
    """The meeting of the one agent of a local job, with a store that only processes of this machine can reach."""
    return AgentMeeting(name, None, 0, 1, address, port)


def _loopback_store(address: str, port: int) -> dist.Store:
    try:
        listening = loopback_listener(port)
    except OSError as error:
        raise LaunchError(f"port {port} was free and is not any more ({error}): start again") from error
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=datetime.timedelta(seconds=_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening,
    )
