"""How the launchers of several hosts speak with each other: keys in a store that the one of node 0 serves.

[Note: nodes] Each host runs one launcher, and in each attempt one agent of torch elastic in it. What has to be agreed
(who takes part, whether all could begin, who failed first, whether to begin again) is decided by the launcher of node 0
and read by the others, so that all of them say the same. The keys are written once each, and hold JSON.

A thread of each launcher carries what is said: nothing else waits for the network, since a host that vanishes leaves
calls that do not return. It also shows every few seconds that its host is there. Node 0 sees that another host is
silent; the others see that node 0 does not answer. Both count as lost after a minute.

The clocks of hosts differ. Each launcher asks node 0 for its time when it joins, and tells times by that clock.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from modelparallel.errors import LaunchError
from modelparallel.launch.node_place import NodePlace

logger = logging.getLogger("modelparallel.launch")

#: Every host shows that it is there so often, and is lost when nothing was heard of it for so long.
BEAT_SECONDS = 5.0
LOST_SECONDS = 60.0
_POLL_SECONDS = 0.2
#: For one answer of a store that was reached.
_ANSWER_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
#: Nobody asks for the time any more; torch says something on stderr whenever such a wait runs out.
_NO_LIMIT = datetime.timedelta(days=365)
_HELLO = "modelparallel/nodes"
_NUM_CLOCK_QUESTIONS = 5
_CLOSE_SECONDS = 5.0
_SAY_SECONDS = 15.0
#: How long a node that is made again waits until its predecessor is lost, and those that were with it have ended.
_PREDECESSOR_SECONDS = LOST_SECONDS + 60.0


@dataclass(frozen=True)
class Joined:
    """How this host has come in: its node number, its own address and that of node 0 on the way between them, and how
    far its clock is ahead of that of node 0.
    """

    node: int
    own_address: str
    first_address: str
    clock_ahead: float


class NodeStore:
    """What the launchers of a job have said, as far as this one knows; see [Note: nodes]."""

    def __init__(self, place: NodePlace, joined: Joined, connect: Callable[[float], dist.Store]) -> None:
        """``connect`` makes another connection to the store, which waits so many seconds for answers."""
        self.place = place
        self.joined = joined
        self.connect = connect
        self._store = dist.PrefixStore(_prefix(place), connect(_ANSWER_SECONDS))
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._outgoing: list[tuple[str, str]] = []
        self._wanted: set[str] = set()
        self._values: dict[str, Any] = {}
        self._heard: dict[int, float] = {}
        self._beats: dict[int, bytes] = {}
        self._last_contact = time.monotonic()
        self._trouble = ""
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="modelparallel-nodes", daemon=True)
        self._thread.start()

    @property
    def is_first(self) -> bool:
        return self.joined.node == 0

    def now(self) -> float:
        """Seconds since 1970 by the clock of node 0."""
        return time.time() - self.joined.clock_ahead

    def put(self, key: str, value: Any) -> None:
        """Say something, for all to read."""
        text = json.dumps(value, default=str)
        with self._lock:
            self._outgoing.append((key, text))
            self._values[key] = json.loads(text)
        self._news.set()

    def value(self, key: str) -> Any:
        """What was said; None if it is not known yet, and then it is asked for."""
        with self._lock:
            if key not in self._values and key not in self._wanted:
                self._wanted.add(key)
                self._news.set()
            return self._values.get(key)

    def follow(self, node: int) -> None:
        """Node 0: pay attention to whether that node is there."""
        with self._lock:
            self._heard.setdefault(node, time.monotonic())

    def silence(self, node: int) -> float:
        """For how many seconds nothing was heard of the node: of any by node 0, of node 0 by the others."""
        with self._lock:
            if self.is_first:
                return time.monotonic() - self._heard.get(node, time.monotonic())
            if node != 0:
                return 0.0
            return LOST_SECONDS + 1 if self._trouble else time.monotonic() - self._last_contact

    def is_lost(self, node: int) -> bool:
        return self.silence(node) > LOST_SECONDS

    def how_lost(self, node: int) -> str:
        """Why a node that is lost is."""
        if node == 0 and self._trouble:
            return f"its launcher has ended, or the connection was closed ({self._trouble})"
        return f"no sign of life for {self.silence(node):.0f} s"

    def close(self) -> None:
        """Send what was said, and stop."""
        self._is_closing = True
        self._news.set()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        next_beat, number = 0.0, 0
        try:
            while True:
                is_last = self._is_closing
                self._send()
                if time.monotonic() >= next_beat:
                    next_beat, number = time.monotonic() + BEAT_SECONDS, number + 1
                    self._store.set(f"beat/{self.joined.node}", str(number))
                    self._listen()
                self._fetch()
                with self._lock:
                    self._last_contact = time.monotonic()
                if is_last:
                    return
                self._news.wait(_POLL_SECONDS)
                self._news.clear()
        except (RuntimeError, ValueError) as error:  # torch's errors of stores are RuntimeErrors
            with self._lock:
                self._trouble = str(error).splitlines()[0][:200]

    def _send(self) -> None:
        while True:
            with self._lock:
                if not self._outgoing:
                    return
                key, text = self._outgoing[0]
            self._store.set(key, text)
            with self._lock:
                del self._outgoing[0]

    def _fetch(self) -> None:
        with self._lock:
            wanted = list(self._wanted)
        for key in wanted:
            if self._store.check([key]):
                value = json.loads(self._store.get(key))
                with self._lock:
                    self._values[key] = value
                    self._wanted.discard(key)

    def _listen(self) -> None:
        with self._lock:
            nodes = list(self._heard)
        for node in nodes:
            key = f"beat/{node}"
            if not self._store.check([key]):
                continue
            beat = self._store.get(key)
            with self._lock:
                if self._beats.get(node) != beat:
                    self._beats[node], self._heard[node] = beat, time.monotonic()


@contextlib.contextmanager
def joined_store(place: NodePlace, seconds: float, say: Callable[[str], None]) -> Iterator[NodeStore]:
    """Join the other hosts: serve the store on node 0, and reach it on the others, which may take `seconds`.

    Raises `LaunchError` that says what is not reached, or who is there instead.
    """
    with contextlib.ExitStack() as stack:
        if _is_first(place):
            store: dist.Store
            server = _serve(place)
            connect = _connector("127.0.0.1", place.port)
            store = dist.PrefixStore(_prefix(place), server)
            server.set(_HELLO, json.dumps({"job": place.job_id, "least": place.least, "most": place.most}))
            stack.enter_context(_clock(store, dist.PrefixStore(_prefix(place), connect(_ANSWER_SECONDS))))
            own, first = "", ""
        else:
            own, first, connect, store = _reached(place, seconds, say)
        try:
            node = _claim(place, store, is_first=not first)
            ahead = 0.0 if not first else _clock_ahead(store)
        except LaunchError:
            raise
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"node 0 at {_named(place)} has stopped answering: {error}") from error
        nodes = NodeStore(place, Joined(node, own, first, ahead), connect)
        stack.callback(nodes.close)
        yield nodes


def _reached(
    place: NodePlace, seconds: float, say: Callable[[str], None]
) -> tuple[str, str, Callable[[float], dist.Store], dist.Store]:
    """Reach the store of node 0: the addresses of both ends, how to connect, and the store.

    An engine that makes a node again (a pod) may be quicker than the others are to see that its predecessor is lost:
    this one waits until they have ended, and joins those that the engine makes in their place.
    """
    deadline: float | None = None
    while True:
        try:
            own, first = _reach(place, seconds, say)
            connect = _connector(first, place.port)
            store = dist.PrefixStore(_prefix(place), _greeted(place, connect))
            if not (place.node_rank is not None and place.least == place.most and _is_taken(store, place.node_rank)):
                return own, first, connect, store
        except (LaunchError, RuntimeError):
            if deadline is None or time.monotonic() >= deadline:
                raise
            time.sleep(_POLL_SECONDS * 5)  # it was the store of those that end
            continue
        if deadline is None:
            deadline = time.monotonic() + min(seconds, _PREDECESSOR_SECONDS)
            say(f"node {place.node_rank} of job {place.job_id!r} is there already: waiting for the others to lose it")
        elif time.monotonic() >= deadline:
            raise LaunchError(
                f"node {place.node_rank} of job {place.job_id!r} has come already: each node has a rank of its own "
                "(--node-rank). If this is another job, give it a --job-id of its own"
            )
        time.sleep(_POLL_SECONDS * 5)


def _is_taken(store: dist.Store, node: int) -> bool:
    return bool(store.check([f"claimed/{node}"]))


def _prefix(place: NodePlace) -> str:
    return f"{_HELLO}/{place.job_id}"


def _named(place: NodePlace) -> str:
    return f"[{place.host}]:{place.port}" if ":" in place.host else f"{place.host}:{place.port}"


def _connector(address: str, port: int) -> Callable[[float], dist.Store]:
    def connect(seconds: float) -> dist.Store:
        timeout = datetime.timedelta(seconds=seconds)
        return dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)

    return connect


def _is_first(place: NodePlace) -> bool:
    """Whether this is node 0; where nobody has said so, it is the first launcher at the host where all meet."""
    if place.node_rank is not None:
        return place.node_rank == 0
    try:
        found = socket.getaddrinfo(place.host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            try:
                _listener(place.port).close()
            except OSError:
                return False
            return True
    return False


def _listener(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
        return socket.create_server(("", port), backlog=2048)  # a host without IPv6


def _serve(place: NodePlace) -> dist.Store:
    try:
        descriptor = _listener(place.port).detach()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise LaunchError(
            f"node 0 cannot listen at port {place.port} ({why}): another job may use it; give this one "
            "another --job-id, or a port (--rendezvous HOST:PORT), on all of its nodes"
        ) from error
    return dist.TCPStore(
        "127.0.0.1",
        place.port,
        is_master=True,
        timeout=datetime.timedelta(seconds=_ANSWER_SECONDS),
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )


def _reach(place: NodePlace, seconds: float, say: Callable[[str], None]) -> tuple[str, str]:
    """Wait until node 0 listens; the addresses of both ends."""
    deadline, say_at = time.monotonic() + seconds, time.monotonic() + _SAY_SECONDS
    while True:
        try:
            with _connection(place.host, place.port) as probe:
                return str(probe.getsockname()[0]), str(probe.getpeername()[0])
        except OSError as error:
            if time.monotonic() >= deadline:
                raise LaunchError(
                    f"this node has not reached node 0 at {_named(place)} within {seconds:.0f} s ({error}): is the "
                    "command running there? Can the name be resolved here, and is the port open between the hosts?"
                ) from error
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + 4 * _SAY_SECONDS
                say(f"waiting for node 0 at {_named(place)} ({error})")
        time.sleep(_POLL_SECONDS)


def _connection(host: str, port: int) -> socket.socket:
    """A connection, by IPv4 if the host has it: many scripts write MASTER_ADDR:MASTER_PORT without brackets."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    problem: OSError | None = None
    for family, kind, protocol, _, address in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        probe = socket.socket(family, kind, protocol)
        try:
            probe.settimeout(_CONNECT_SECONDS)
            probe.connect(address)
            return probe
        except OSError as error:
            probe.close()
            problem = problem or error
    raise problem or OSError(f"{host!r} has no address")


def _greeted(place: NodePlace, connect: Callable[[float], dist.Store]) -> dist.Store:
    """The store, after its owner has said that it is of this job. Nothing was written to it before."""
    try:
        store = connect(_ANSWER_SECONDS)
        hello = json.loads(store.get(_HELLO))
        job_id, nodes = hello["job"], (hello["least"], hello["most"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"what listens at {_named(place)} is no launcher of modelparallel ({str(error).splitlines()[0]}): give "
            "this job another port (--rendezvous HOST:PORT), on all of its nodes"
        ) from error
    if job_id != place.job_id:
        raise LaunchError(
            f"at {_named(place)} is job {job_id!r}, and this node is of job {place.job_id!r}: give both jobs the same "
            "--job-id if they are one, else another port to one of them (--rendezvous HOST:PORT)"
        )
    if nodes != (place.least, place.most):
        raise LaunchError(
            f"node 0 was started for {nodes[0]}:{nodes[1]} nodes, and this node for {place.least}:{place.most}: give "
            "the same --nnodes on all nodes"
        )
    return store


def _claim(place: NodePlace, store: dist.Store, *, is_first: bool) -> int:
    """Take a node number, and announce it."""
    number = store.add("num_joined", 1)
    node = place.node_rank if place.node_rank is not None else (0 if is_first else number - 1)
    if store.add(f"claimed/{node}", 1) > 1:
        if place.least == place.most:
            raise LaunchError(
                f"node {node} of job {place.job_id!r} has come already: each node has a rank of its own (--node-rank). "
                "If this is another job, give it a --job-id of its own"
            )
        node = place.most + number  # it takes the place of one that was lost
    store.set(f"joined/{number}", json.dumps(node))
    return node


@contextlib.contextmanager
def _clock(store: dist.Store, own: dist.Store) -> Iterator[None]:
    """Node 0: tell the time to those who ask, by a connection of its own."""

    def answer() -> None:
        number = 1
        with contextlib.suppress(RuntimeError):  # the store has ended
            while True:
                own.wait([f"clock/ask/{number}"], _NO_LIMIT)
                own.set(f"clock/answer/{number}", repr(time.time()))
                if own.check(["clock/closed"]):
                    return
                number += 1

    thread = threading.Thread(target=answer, name="modelparallel-clock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        store.set("clock/closed", "")
        store.set(f"clock/ask/{store.add('clock/number', 1)}", "")
        thread.join(_CLOSE_SECONDS)


def _clock_ahead(store: dist.Store) -> float:
    """How far this clock is ahead of that of node 0, from the quickest of several answers; 0 if it is not told."""
    answers = [(float("inf"), 0.0)]
    for _ in range(_NUM_CLOCK_QUESTIONS):
        number = store.add("clock/number", 1)
        asked = time.time()
        store.set(f"clock/ask/{number}", "")
        try:
            told = float(store.get(f"clock/answer/{number}"))
        except dist.DistStoreError:  # who had the number before has died, and its question is waited for
            break
        answered = time.time()
        answers.append((answered - asked, (asked + answered) / 2 - told))
    return min(answers)[1]
