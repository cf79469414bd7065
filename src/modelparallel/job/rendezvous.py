"""Where the processes of a job meet (meeting.py): the store through which they find each other, and the secret that
they share.

[Note: who may take part] Whoever reaches the store, or a port at which a process waits for its peers, could take the
place of a rank, and objects that ranks send each other are pickles: they run code. So the members of every process
group prove to each other that they know the secret of the job, before anything else is sent (comm/authentication.py).

- On one machine the secret is made here: rank 0 writes it into a file that its user alone can read, and tells the
  others the name. That no other user can read it, nor have written it, is what makes it one.
- The launcher of this library makes a folder that its user alone can enter. The store is a file in it: nothing listens.
  Where others have started the processes, the store of rank 0 listens at the loopback address; a store of torchrun's
  agent is torchrun's own, and listens where that does.
- On several hosts the secret is what `MODELPARALLEL_SECRET_FILE` holds, on each of them; without it there is none, and
  the network has to be one in which everybody is trusted.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import logging
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from modelparallel.config.reading import Config
from modelparallel.errors import CommunicationError, SMPConfigError, SMPError
from modelparallel.job.discovery import ProcessIdentity, master_host
from modelparallel.job.private_files import is_own, open_private
from modelparallel.torch_compat import default_store

logger = logging.getLogger("modelparallel")

#: `<MASTER_PORT>:<file>`: the store of a job of the launcher. What a rank starts itself, under another launcher, meets
#: at another port, and must not take this store for its own.
STORE_VARIABLE = "MODELPARALLEL_STORE"
#: A file with a secret that all processes of the job, and nobody else, can read.
SECRET_VARIABLE = "MODELPARALLEL_SECRET_FILE"

_LOOPBACK = "127.0.0.1"
_LEAST_SECRET_BYTES = 16
_MOST_SECRET_BYTES = 1 << 16
_MADE_SECRET = re.compile(rb"modelparallel secret [0-9a-f]{64}\n")
#: Of the rendezvous only; the processes of a job start within minutes of each other, or not at all.
_MOST_SECONDS = 300.0
_FIRST_PORT, _NUM_PORTS = 20000, 40000


@dataclass(frozen=True)
class Address:
    """Host and port of a store, and what says so, for errors."""

    host: str
    port: int
    reason: str = ""

    def __str__(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{shown}:{self.port}{f' ({self.reason})' if self.reason else ''}"


@dataclass(frozen=True)
class JobStore:
    """The store of the default process group, and where it is: its host as this process reaches it, empty if nothing
    listens. `is_of_rank_0`, `is_own`: see `Meeting`.
    """

    store: dist.Store
    place: str
    host: str = ""
    is_of_rank_0: bool = False
    is_own: bool = False


def most_seconds(config: Config) -> float:
    """How long the processes of a job wait for each other when they begin."""
    return min(config.timeout_seconds, _MOST_SECONDS)


def make_store(config: Config, identity: ProcessIdentity, environ: Mapping[str, str]) -> JobStore:
    """The store of the default process group; a single process uses no network.

    Raises CommunicationError, which names the host and the port, where it cannot be reached or served.
    """
    if identity.world_size == 1:
        return JobStore(dist.HashStore(), "no place", is_own=True)
    timeout = datetime.timedelta(seconds=most_seconds(config))
    port, _, path = environ.get(STORE_VARIABLE, "").partition(":")
    if path and port == environ.get("MASTER_PORT"):
        store = dist.FileStore(path, identity.world_size)
        store.set_timeout(timeout)
        return JobStore(store, path, is_own=True)
    return _tcp_store(_address(config, identity, environ), identity, environ, timeout)


def script_store(environ: Mapping[str, str]) -> JobStore:
    """The store of a default process group that the script has made; its processes have met there."""
    return JobStore(
        default_store(), "the store of the default process group", environ.get("MASTER_ADDR", ""), is_own=True
    )


def _tcp_store(
    address: Address, identity: ProcessIdentity, environ: Mapping[str, str], timeout: datetime.timedelta
) -> JobStore:
    # torchrun's agent may itself serve the store, and outlives a restart of the workers.
    is_served_by_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = identity.global_rank == 0 and not is_served_by_agent
    listening: int | None = None
    host = address.host
    try:
        # Where the launcher does not say who shares a host, MASTER_ADDR may.
        is_here = identity.is_one_host or (not identity.is_host_known and _is_loopback(host))
        if not is_served_by_agent and is_here:
            host = _LOOPBACK
            if is_master:
                listening = loopback_listener(address.port)
        store = dist.TCPStore(
            host,
            address.port,
            world_size=identity.world_size,
            is_master=is_master,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=listening,
            wait_for_workers=False,  # those who do not come are named where all meet
        )
    except (RuntimeError, ValueError, OSError) as error:
        if is_master:
            problem, remedy = "cannot serve the store at", "that port is in use, or not allowed: choose another one"
        else:
            problem = "cannot reach the store at"
            remedy = (
                "check that the process of global rank 0 was started and runs there, and that the host can be reached"
            )
        raise CommunicationError(
            f"global rank {identity.global_rank} of {identity.world_size} (from {identity.source}, on "
            f"{socket.gethostname()}) {problem} {address}: {str(error).splitlines()[0]}: {remedy} (MASTER_ADDR, "
            "MASTER_PORT or the parameter ddp_port)"
        ) from error
    return JobStore(store, str(address), host, is_of_rank_0=not is_served_by_agent)


def loopback_listener(port: int) -> int:
    """The descriptor of a socket at the port that only processes of this machine can reach. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen(2048)
        return listener.detach()


def _address(config: Config, identity: ProcessIdentity, environ: Mapping[str, str]) -> Address:
    """Host and port of the store."""
    reasons = []
    host = environ.get("MASTER_ADDR")
    if not host and identity.local_world_size == identity.world_size:
        host = _LOOPBACK
    if not host:
        host = master_host(environ)
        reasons += ["MASTER_ADDR is not set, and this is the first node of Slurm's list"] if host else []
        if host and identity.global_rank == 0 and identity.slurm_step and environ.get("SLURM_NODEID", "0") != "0":
            raise SMPConfigError(
                f"MASTER_ADDR is not set, and task 0 of the step {identity.slurm_step} is not on the first node, "
                f"{host}, but on {socket.gethostname()}: set MASTER_ADDR to that host on all tasks"
            )
    if not host and not identity.is_host_known:
        host, reasons = _LOOPBACK, ["MASTER_ADDR is not set"]
    if not host:
        raise SMPConfigError(
            f"MASTER_ADDR is not set, and {identity.source} does not tell the host of rank 0 of {identity.world_size} "
            "processes on several hosts: set MASTER_ADDR to that host on all processes"
        )
    port = environ.get("MASTER_PORT") or str(config.ddp_port)
    if not port.isdigit() or int(port) > 65535:
        raise SMPConfigError(f"environment variable MASTER_PORT: expected int 0..65535, got {port!r}")
    number = int(port)
    if identity.slurm_step and not environ.get("MASTER_PORT") and config.sources["ddp_port"] == "default":
        number = port_of_step(identity.slurm_step)
        reasons.append(f"the port of Slurm's job and step {identity.slurm_step}")
    return Address(host, number, "; ".join(reasons))


def port_of_step(step: str) -> int:
    """A port for a step of Slurm, such as 1234.0: those that share a host have different ones, but by bad luck."""
    job, _, number = step.partition(".")
    return _FIRST_PORT + (int(job) * 31 + int(number)) % _NUM_PORTS


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


@contextlib.contextmanager
def named(identity: ProcessIdentity, place: str) -> Iterator[None]:
    """Say who failed to meet whom, instead of an error of a socket."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, SMPError):
            raise
        raise CommunicationError(
            f"global rank {identity.global_rank} of {identity.world_size} (from {identity.source}, on "
            f"{socket.gethostname()}) could not meet the other processes, which it has found at {place}: {error}: most "
            "often because one of them has ended, or cannot be reached from this host; see its output"
        ) from error


@contextlib.contextmanager
def shared_secret(
    store: dist.Store, identity: ProcessIdentity, environ: Mapping[str, str], place: str
) -> Iterator[bytes]:
    """The secret of the job; empty if there is none. Collective over the world, which has met at the store, and meets
    once more inside.

    Raises `CommunicationError` for a file that cannot be the secret, `SMPConfigError` for one that was given.
    """
    path = environ.get(SECRET_VARIABLE)
    if path:
        yield _given_secret(path)
    elif identity.world_size == 1:
        yield b""
    elif not identity.is_one_host:
        if identity.global_rank == 0:
            logger.info(
                "several hosts, and %s is not set: every process that reaches the ports of this job can take part in "
                "it (docs/launching.md, networks)",
                SECRET_VARIABLE,
            )
        yield b""
    else:
        key = "secret"
        with named(identity, place):
            if identity.global_rank != 0:
                secret = _told_secret(os.fsdecode(bytes.fromhex(store.get(key).decode())), identity.global_rank)
            else:
                secret, written = _new_secret()
                store.set(key, os.fsencode(written).hex())
        try:
            yield secret
        finally:
            if identity.global_rank == 0:
                os.unlink(written)


def _new_secret() -> tuple[bytes, str]:
    """A secret, and the file that it is in."""
    text = f"modelparallel secret {secrets.token_hex(32)}\n".encode()
    descriptor, path = tempfile.mkstemp(prefix="modelparallel-secret-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(text)
    return hashlib.sha256(text).digest(), path


def _told_secret(path: str, global_rank: int) -> bytes:
    """The secret in a file that rank 0 has named, if it was rank 0: what comes by the store may be anybody's."""
    try:
        text = _read_own(path)
    except OSError as error:
        raise CommunicationError(
            f"global rank {global_rank} cannot read {path!r}, where global rank 0 says that the secret of this job is "
            f"({error}): all processes of a job on one machine belong to one user and see the same temporary directory "
            f"(TMPDIR). If they do not, write a secret into a file of mode 0600 and set {SECRET_VARIABLE} to it"
        ) from error
    if not _MADE_SECRET.fullmatch(text):
        raise CommunicationError(f"global rank {global_rank}: {path!r} is not a secret that a rank 0 has written")
    return hashlib.sha256(text).digest()


def _given_secret(path: str) -> bytes:
    try:
        text = _read_own(path)
    except OSError as error:
        raise SMPConfigError(
            f"environment variable {SECRET_VARIABLE}: {path!r} cannot be used ({error}): it must be a file of your "
            "own, no link, that others can neither read nor write (chmod 600)"
        ) from error
    if len(text) < _LEAST_SECRET_BYTES:
        raise SMPConfigError(
            f"environment variable {SECRET_VARIABLE}: {path!r} holds {len(text)} bytes: at least {_LEAST_SECRET_BYTES} "
            "are needed, for example of `openssl rand -hex 32`"
        )
    return hashlib.sha256(text).digest()


def _read_own(path: str) -> bytes:
    descriptor = open_private(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not is_own(descriptor):
            raise PermissionError("it is not a file of this user that nobody else can read")
        return os.read(descriptor, _MOST_SECRET_BYTES)
    finally:
        os.close(descriptor)
