"""How the processes of a job meet: the store through which they find each other, and the secret that they share.

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

import torch.distributed as dist

from modelparallel.config.reading import Config
from modelparallel.errors import CommunicationError, SMPConfigError
from modelparallel.job.discovery import ProcessIdentity, master_host
from modelparallel.job.private_files import is_own, open_private

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


def most_seconds(config: Config) -> float:
    """How long the processes of a job wait for each other when they begin."""
    return min(config.timeout_seconds, _MOST_SECONDS)


def make_store(config: Config, identity: ProcessIdentity, environ: Mapping[str, str]) -> dist.Store:
    """The store of the default process group; a single process uses no network."""
    if identity.world_size == 1:
        return dist.HashStore()
    timeout = datetime.timedelta(seconds=most_seconds(config))
    port, _, path = environ.get(STORE_VARIABLE, "").partition(":")
    if path and port == environ.get("MASTER_PORT"):
        store: dist.Store = dist.FileStore(path, identity.world_size)
        store.set_timeout(timeout)
    else:
        store = _tcp_store(config, identity, environ, timeout)
    return dist.PrefixStore(f"modelparallel/attempt_{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _tcp_store(
    config: Config, identity: ProcessIdentity, environ: Mapping[str, str], timeout: datetime.timedelta
) -> dist.Store:
    host, number = _address(config, identity, environ)
    # torchrun's agent may itself serve the store, and outlives a restart of the workers: keys that the workers of an
    # earlier attempt left behind would lead to processes that are gone. Hence the attempt in the prefix.
    is_served_by_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = identity.global_rank == 0 and not is_served_by_agent
    listening: int | None = None
    if not is_served_by_agent and is_one_host(identity, environ):
        host = _LOOPBACK
        if is_master:
            listening = loopback_listener(number)
    return dist.TCPStore(
        host,
        number,
        world_size=identity.world_size,
        is_master=is_master,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listening,
        wait_for_workers=False,  # those who do not come are named where all meet
    )


def loopback_listener(port: int) -> int:
    """The descriptor of a socket at the port that only processes of this machine can reach. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen(2048)
        return listener.detach()


def _address(config: Config, identity: ProcessIdentity, environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of the store."""
    host = environ.get("MASTER_ADDR")
    if not host and identity.local_world_size == identity.world_size:
        host = _LOOPBACK
    host = host or master_host(environ)
    if not host:
        raise SMPConfigError(
            f"MASTER_ADDR is not set, and {identity.source} does not tell the host of rank 0 of {identity.world_size} "
            "processes on several hosts: set MASTER_ADDR to that host on all processes"
        )
    port = environ.get("MASTER_PORT") or str(config.ddp_port)
    if not port.isdigit() or int(port) > 65535:
        raise SMPConfigError(f"environment variable MASTER_PORT: expected int 0..65535, got {port!r}")
    return host, int(port)


def is_one_host(identity: ProcessIdentity, environ: Mapping[str, str]) -> bool:
    """Whether all processes are on this machine, as far as the launcher has said."""
    if identity.local_world_size != identity.world_size:
        return False
    host = environ.get("MASTER_ADDR", "")
    return identity.is_host_known or (identity.source != "torch.distributed" and _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


@contextlib.contextmanager
def named(identity: ProcessIdentity, environ: Mapping[str, str]) -> Iterator[None]:
    """Say who failed to meet whom, instead of an error of a socket."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, SMPConfigError | CommunicationError):
            raise
        raise CommunicationError(
            f"global rank {identity.global_rank} of {identity.world_size} (from {identity.source}) could not meet the "
            f"other processes at MASTER_ADDR={environ.get('MASTER_ADDR')!r}, "
            f"MASTER_PORT={environ.get('MASTER_PORT')!r}: {error}: check that all processes were started, that the "
            "host can be reached and that the port is free"
        ) from error


@contextlib.contextmanager
def shared_secret(store: dist.Store, identity: ProcessIdentity, environ: Mapping[str, str]) -> Iterator[bytes]:
    """The secret of the job; empty if there is none. Collective over the world, which meets once more inside.

    Raises `CommunicationError` for a file that cannot be the secret, `SMPConfigError` for one that was given.
    """
    path = environ.get(SECRET_VARIABLE)
    if path:
        yield _given_secret(path)
    elif identity.world_size == 1:
        yield b""
    elif not is_one_host(identity, environ):
        if identity.global_rank == 0:
            logger.info(
                "several hosts, and %s is not set: every process that reaches the ports of this job can take part in "
                "it (docs/launching.md, networks)",
                SECRET_VARIABLE,
            )
        yield b""
    else:
        with named(identity, environ):  # sessions of one process may share a store
            number = store.add(f"modelparallel/secret/asked by {identity.global_rank}", 1)
            key = f"modelparallel/secret/{number}"
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
