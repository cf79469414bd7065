"""By which network interface the processes of a job on several hosts reach each other.

[Note: interfaces] gloo listens at the address that the host's own name leads to, unless `GLOO_SOCKET_IFNAME` names an
interface, and tells the others that address. On many machines the own name leads to the loopback (Debian's and
Ubuntu's /etc/hosts: 127.0.1.1) or nowhere, and nobody can connect. So a job on several hosts takes the interface by
which the kernel reaches the store, since all have met there; on the host of the store, where its name may lead to the
loopback, the one by which the kernel reaches another host. gloo wants the names of interfaces; NCCL, which takes
beginnings of names, gets `=name`.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

logger = logging.getLogger("modelparallel")

GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
NCCL_VARIABLE = "NCCL_SOCKET_IFNAME"


@dataclass(frozen=True)
class Choice:
    """The own address that others reach, and the variables that say so; or why there is none."""

    address: str
    variables: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    def take(self, environ: MutableMapping[str, str], *, is_said: bool) -> None:
        """Set the variables. Local."""
        environ.update(self.variables)
        if self.variables and is_said:
            values = ", ".join(f"{name}={value}" for name, value in self.variables.items())
            logger.info(
                "several hosts: this one is reached at %s; %s (where it is set, it counts)", self.address, values
            )


def address_towards(host: str) -> str:
    """The own address from which the kernel reaches a host, which is not asked; empty for the loopback, for a name
    that does not resolve, and where there is no way.
    """
    if not host:
        return ""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # of datagrams: nothing is sent
                own = str(probe.getsockname()[0])
        except OSError:
            continue
        if not _ip(own).is_loopback:
            return own
    return ""


def choose(address: str, environ: Mapping[str, str], store_host: str) -> Choice:
    """The interfaces of a process on one of several hosts. Local.

    Args:
        address: the own one that leads to the other hosts; empty if none does.
        store_host: for the error.
    """
    given = environ.get(GLOO_VARIABLE)
    if given:
        return _given(given, environ)
    names = [name for name, addresses in _interfaces().items() if address in addresses]
    if not names:
        found = f"the way to them begins at {address}, which no interface has" if address else "no way leads to them"
        return Choice(
            "",
            problem=f"{found} (the store is at {store_host!r}; interfaces here: {_listed()}): set MASTER_ADDR to an "
            f"address of the host of global rank 0 that the other hosts reach, or {GLOO_VARIABLE}, on each host, to "
            "the name of the interface that leads to the others",
        )
    variables = {GLOO_VARIABLE: names[0]}
    if not environ.get(NCCL_VARIABLE):
        variables[NCCL_VARIABLE] = f"={names[0]}"
    return Choice(address, variables)


def _given(given: str, environ: Mapping[str, str]) -> Choice:
    """What the user has set, if it can be: gloo would say it in a way that names nobody, or wait in vain."""
    addresses: list[str] = []
    for name in given.split(","):
        if name not in _interfaces():
            why = "gloo takes names as they are, without NCCL's ^ and =" if name[:1] in ("^", "=") else "there is none"
            return Choice("", problem=f"{GLOO_VARIABLE}={given!r}: {why}; interfaces here: {_listed()}")
        addresses += _interfaces()[name]
    if all(_ip(address).is_loopback for address in addresses):
        return Choice(
            "",
            problem=f"{GLOO_VARIABLE}={given!r} is the loopback, by which no other host is reached; interfaces here: "
            f"{_listed()}. Unset it, and the right one is found",
        )
    nccl = {} if environ.get(NCCL_VARIABLE) else {NCCL_VARIABLE: f"={given}"}
    return Choice(next(address for address in addresses if not _ip(address).is_loopback), nccl)


def _interfaces() -> dict[str, list[str]]:
    """The addresses of each interface of this host."""
    import psutil  # of use on several hosts only

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def _listed() -> str:
    return ", ".join(f"{name} ({', '.join(found) or 'no address'})" for name, found in _interfaces().items())


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])  # without the interface of a link-local one
