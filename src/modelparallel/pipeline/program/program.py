"""Program: the run of one microbatch through the step function on one stage, its events, and its backward.

[Note: cuts] The backward of a stage runs in pieces, one per stretch of local work between two of its events, and the
autograd graph of one piece must not reach into another: a residual that is used before and after a send would otherwise
be walked twice. So at each event of a stage every live StageTensor whose local tensor has a graph is *cut*: a detached
leaf takes its place, and (original, leaf) goes onto the tape. Replaying the tape backwards, the backward of a piece is
one ``torch.autograd.backward(originals, gradients of the leaves)``.

[Note: waiting] A program that needs a message says so (:meth:`Program.wait_for`) before it takes it; what happens until
it is there (nothing, or the work of other microbatches) is the interpreter's business. So the same program runs under
every schedule.

[Note: events] An event is a point where values cross stages or the backward starts. Events are numbered in program
order on every stage, also on those that take no part in them, so both ends of a message know its name without asking.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from modelparallel.comm.event_log import EventLog, check_of, user_code_line
from modelparallel.comm.stages.transport import Awaited, MessageKind, MessageName
from modelparallel.errors import DivergenceError, StepUsageError
from modelparallel.pipeline.program.first_run import Record
from modelparallel.pipeline.program.plain_tensors import WrittenTensors
from modelparallel.pipeline.program.randomness import RandomFrames
from modelparallel.pipeline.program.splitting import SplitBackward
from modelparallel.pipeline.program.turns import Sightings
from modelparallel.pipeline.schedule.chains import ChainTracker, Work
from modelparallel.pipeline.side_doors.assignments import Assignments
from modelparallel.pipeline.side_doors.kept_values import (
    check_carried_over,
    read_inside,
    refuse_buffer_read,
    refuse_graph,
)
from modelparallel.pipeline.side_doors.ledger import Ledger
from modelparallel.pipeline.values.functions import traits_of
from modelparallel.pipeline.values.stage_tensor import AliasGroup, StageTensor, TensorSpec
from modelparallel.pipeline.values.stage_view import StageView
from modelparallel.pipeline.values.structures import Structure
from modelparallel.pipeline.values.wire import TENSORS_PER_MESSAGE, receive_tensors, send_tensors
from modelparallel.torch_compat import leaves_of_graph
from modelparallel.torch_compat.private_parts import base_of, has_tensor_hooks

#: Runs a call (function, args, kwargs, the parameters that it may use); (its output, its work).
CountWork = Callable[[Callable[..., Any], Any, Any, Sequence[torch.Tensor]], tuple[Any, Work]]

_NO_GRADIENT = TensorSpec((0,), (1,), torch.float32, False, "cpu")


@dataclass
class _Event:
    """One entry of the tape: what happens here in the backward, before the backward of the piece that ends here."""

    kind: str  # "send", "receive" or "root"
    number: int
    peer: int
    leaves: list[torch.Tensor | None]  # whose gradients travel; None: needs no gradient
    seeds: list[torch.Tensor] = field(default_factory=list)  # root: the gradients to start from
    cuts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    description: str = ""
    visit: int = 0  # the visit of the microbatch on this stage that it belongs to


@dataclass
class NeededMessage:
    """A message that the program needs; ``is_planned``: the plan of the step knows of it."""

    awaited: Awaited
    is_planned: bool


def _go_on(wait: NeededMessage) -> None:
    """The message is received right away, however long that takes."""


class Program:
    """See the notes at the top of this file."""

    #: Whether this is the second run of a region, see second_run.py.
    is_replay = False

    def __init__(
        self,
        engine: StageView,
        microbatch: int,
        frames: RandomFrames,
        tracker: ChainTracker,
        structures: dict[Hashable, Structure],
        weight: float = 1.0,
        sightings: Sightings | None = None,
        count_work: CountWork | None = None,
    ) -> None:
        self.engine = engine
        self.microbatch = microbatch
        self.frames = frames
        self.tracker = tracker
        #: Structures that this program has heard of in this step, beside those that the engine knows.
        self.structures = structures
        #: The share of the samples that this microbatch holds.
        self.weight = weight
        self.device = engine.device
        self.device_type = engine.device.type  # asking a device for its type takes as long as making a tensor
        self.stage = engine.stage
        self.is_open, self.has_root = True, False
        #: What was given to ``model.backward`` as the weight of the loss.
        self.loss_weight: float | StageTensor | None = None
        #: Whether it left something behind that another microbatch may read.
        self.carries_state = False
        #: Whether something in it must not be run through twice (hooks, recomputation).
        self.is_whole_backward = False
        #: Whether graphs of later pieces reach into earlier ones, see inner_gradients.py.
        self.keeps_graphs = False
        self._last_event = 0
        #: The home of the opened module that runs now, see doors.py.
        self.inside: int | None = None
        #: Hugging Face caches that layers keep something in at their homes, the first of these layers, and its home.
        self.filled: dict[int, tuple[Any, str, int]] = {}
        #: What its operations are given, in the first step of a kind.
        self.ledger: Ledger | None = None
        #: While pushed values are read to find out the structure of a result, as only the first time needs.
        self.is_finding_out = False
        self.written = WrittenTensors()
        #: What the region that runs now needs to be run again, see region.py.
        self.region: Record | None = None
        #: Around all that is computed here, for selective recomputation.
        self.around_compute: AbstractContextManager[Any] | None = None
        #: Of ordinary tensors, where the microbatches take turns.
        self.sightings = sightings
        self.assignments = Assignments(microbatch, takes_turns=sightings is not None)
        self._count_work = count_work
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}
        self._leaves: list[weakref.ref[torch.Tensor]] = []
        self._carried: dict[int, tuple[StageTensor, StageTensor]] = {}  # values of earlier programs
        self._without_graphs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        #: Called before a message is taken; the interpreter sets it.
        self.on_wait: Callable[[NeededMessage], None] = _go_on
        #: What happened so far, for the diagnosis of failures.
        self.log = EventLog(microbatch)
        self._num_pushes = 0
        self._tape: list[_Event] = []
        self._weights: dict[int, list[SplitBackward]] = {}
        self._live: list[weakref.ref[StageTensor]] = []
        self._parameters: dict[int, StageTensor] = {}

    def counted(
        self, compute: Callable[..., Any], home: int, parameters: Sequence[torch.Tensor] = ()
    ) -> Callable[..., Any]:
        """``compute``, which tells the tracker what it costs if it runs here and that is to be found out.

        ``parameters``: those that it may use.
        """
        count_work = self._count_work
        if count_work is None or home != self.stage:
            return compute

        def call(*args: Any, **kwargs: Any) -> Any:
            output, work = count_work(compute, args, kwargs, parameters)
            self.tracker.note_costs(work)
            return output

        return call

    # Values

    def new(
        self, spec: TensorSpec, home: int, local: torch.Tensor | None, aliases: AliasGroup | None = None
    ) -> StageTensor:
        """A value that ``home`` has computed; every stage makes it at the same point of the program."""
        result = StageTensor(self, spec, home, local, aliases)
        result.born = self._last_event
        self._live.append(weakref.ref(result))
        if self.region is not None:
            self.region.made.add(id(result))
        return result

    def parameter(self, tensor: torch.Tensor) -> StageTensor:
        """The reading of a placed parameter or stateful buffer in glue: a value that never leaves its home for an
        operation.
        """
        known = self._parameters.get(id(tensor))
        if known is None:
            placed = self.engine.placed[id(tensor)]
            if not isinstance(tensor, torch.nn.Parameter):
                if self.sightings is not None:
                    refuse_buffer_read(placed.name)
                self.carries_state = True
            spec = TensorSpec(placed.shape, placed.stride, tensor.dtype, tensor.requires_grad, tensor.device.type)
            known = StageTensor(self, spec, placed.home, tensor if placed.home == self.stage else None)
            known.is_pinned_home = True
            self._parameters[id(tensor)] = known
        return known

    def resolve(self, leaf: Any, *, keeps_graph: bool = False) -> Any:
        """An argument of glue or of a placed module as the engine sees it: parameters and promoted tensors as
        StageTensors. ``keeps_graph``: so does an ordinary tensor.
        """
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if isinstance(leaf, StageTensor):
            return leaf if leaf.program is self else self._carried_over(leaf)
        if id(leaf) in self.engine.placed:
            return self.parameter(leaf)
        if (written := self.written.find(self, leaf)) is not None:
            return written
        if leaf.requires_grad and not keeps_graph and torch.is_grad_enabled():
            return self._without_graph(leaf)
        return leaf

    def _carried_over(self, value: StageTensor) -> StageTensor:
        """What stands here for a value of an earlier program, as every stage has kept it; always the same."""
        check_carried_over(self, value, takes_turns=self.sightings is not None)
        self.carries_state = True
        if id(value) not in self._carried:
            result = self.new(replace(value.spec, requires_grad=False), value.home, value.local)
            result.stale_reason = value.stale_reason
            self._carried[id(value)] = (value, result)
        return self._carried[id(value)][1]

    def _without_graph(self, tensor: torch.Tensor) -> torch.Tensor:
        """[Note: leaves] A model may switch ``requires_grad`` on for a tensor of its own, so that what is made of it
        has a graph (checkpointing needs that), and never look at the gradient, which is there on one stage only. That
        is fine as long as nobody can look: the tensor is gone when the step is over (:meth:`check_leaves`). What was
        made of it before it met a value of the pipeline goes on without that part of the graph, which would have to
        be walked once for each piece of the backward.
        """
        leaves = leaves_of_graph(tensor)
        if any(isinstance(leaf, torch.nn.Parameter) or has_tensor_hooks(leaf) for leaf in leaves):
            refuse_graph(leaves, self.engine.placed)
        self._leaves.extend(weakref.ref(leaf) for leaf in leaves if not self.is_leaf(leaf))
        if tensor.is_leaf:
            return tensor
        known = self._without_graphs.get(id(tensor))
        if known is None or known[0] is not tensor:
            known = self._without_graphs[id(tensor)] = (tensor, tensor.detach().requires_grad_())
        return known[1]

    def is_leaf(self, value: Any) -> bool:
        """Whether it is an ordinary tensor whose gradient would be there on one stage only."""
        return any(known() is value for known in self._leaves)

    def check_leaves(self) -> None:
        """The step is over, and so are its graphs: raises StepUsageError if somebody may still look at such a
        gradient.
        """
        if not self.has_root or all(known() is None for known in self._leaves):
            return
        gc.collect()
        if any(known() is not None for known in self._leaves):
            refuse_graph([], self.engine.placed)

    def returned(self, leaf: Any) -> Any:
        """A returned value as the engine sees it: a parameter, or a plain tensor that glue wrote into, has a home."""
        return Program.resolve(self, leaf, keeps_graph=True)

    def note_made(self, result: Any) -> None:
        """In the discovery step: glue has made an ordinary tensor."""
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._made[id(tensor)] = weakref.ref(tensor)

    def note_plain_write(self, tensor: Any) -> None:
        """Glue has written to an ordinary tensor without values of the pipeline, so on every stage alike."""
        if not isinstance(tensor, torch.Tensor):
            return
        if self.sightings is not None:
            self.sightings.used(self.microbatch, tensor, is_written=True)
        base = base_of(tensor)
        made = self._made.get(id(base))
        if made is None or made() is not base:
            self.carries_state = True  # it was there before, so another microbatch may read it

    def local(self, tensor: StageTensor) -> torch.Tensor:
        """The tensor itself; only where it is."""
        if tensor.stale_reason is not None:
            raise StepUsageError(tensor.stale_reason)
        if tensor.local is None:
            raise StepUsageError(f"pp_rank {self.stage} does not hold {tensor!r}; please report this with the model")
        return tensor.local

    # Events

    def fetch(self, tensors: Sequence[StageTensor], stage: int, description: str) -> None:
        """Make every tensor available on ``stage``; all stages call this with the same arguments."""
        for tensor in tensors:
            if stage not in tensor.places:
                break
        else:
            return
        missing: dict[int, list[StageTensor]] = {}
        for tensor in tensors:
            group = missing.setdefault(tensor.home, [])
            if stage not in tensor.places and not any(tensor is other for other in group):
                group.append(tensor)
        for source in sorted(missing):
            group = missing[source]
            for start in range(0, len(group), TENSORS_PER_MESSAGE):
                self._move(group[start : start + TENSORS_PER_MESSAGE], source, stage, description)

    def _move(self, tensors: list[StageTensor], source: int, destination: int, description: str) -> None:
        is_planned = self.tracker.note_move(source, destination)
        number = self.next_event(description, source, destination)
        name = MessageName(MessageKind.ACTIVATIONS, self.microbatch, number, check_of(description))
        specs = [tensor.spec for tensor in tensors]
        transport = self.engine.transport
        if self.stage == source:
            cuts = self._cut()
            locals_ = [self.local(tensor) for tensor in tensors]
            # Whoever writes to a leaf that needs a gradient writes to a copy.
            is_stable = [local.requires_grad and local.is_leaf for local in locals_]
            send_tensors(transport, destination, name, locals_, specs, description, is_stable=is_stable)
            leaves = [local if spec.requires_grad else None for local, spec in zip(locals_, specs, strict=True)]
            self._record(_Event("send", number, destination, leaves, cuts=cuts, description=description))
        elif self.stage == destination:
            cuts = self._cut()
            self._wait(Awaited(source, name, description), is_planned=is_planned)
            leaves = []
            received = receive_tensors(transport, source, name, specs, description)
            for tensor, spec, value in zip(tensors, specs, received, strict=True):
                if value is None:
                    raise DivergenceError(f"{name} ({description}) from pp_rank {source} came without {tensor!r}")
                moved = value if spec.device_type == "cpu" else value.to(self.device)
                tensor.local = moved.requires_grad_(spec.requires_grad)
                leaves.append(tensor.local if spec.requires_grad else None)
            if self.region is not None:
                self.region.note_received([self.local(tensor) for tensor in tensors])
            self._record(_Event("receive", number, source, leaves, cuts=cuts, description=description))
        for tensor in tensors:
            tensor.places.add(destination)

    def _record(self, event: _Event) -> None:
        event.visit = self.tracker.visit
        self._tape.append(event)

    def note_value(self, source: int) -> bool:
        """All stages wait for a value of ``source`` now; whether the plan knows of it."""
        return self.tracker.note_value(source)

    def wait_for(self, source: int, name: MessageName, description: str, *, is_planned: bool = True) -> None:
        """Before a message is taken that all stages but its sender need."""
        self._wait(Awaited(source, name, description), is_planned=is_planned)

    def wait_alone_for(self, source: int, name: MessageName, description: str) -> None:
        """Before a message is taken that only this stage asks for: a pushed value that it reads."""
        is_planned = not self.is_finding_out and self.tracker.note_local_wait(self.stage, source)
        self._wait(Awaited(source, name, description), is_planned=is_planned)

    def _wait(self, awaited: Awaited, *, is_planned: bool) -> None:
        if self.engine.transport.has(awaited.source, awaited.name) and not self.tracker.begins_visit:
            return
        line = user_code_line()
        self.on_wait(NeededMessage(replace(awaited, line=line), is_planned))

    def next_event(self, description: str, source: int = -1, destination: int = -1) -> int:
        """The number of the event that happens now; the description must be the same on every stage.

        ``source``, ``destination``: of a value that moves.
        """
        self._last_event = number = self.log.note(description, source, destination)
        return number

    def _cut(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        cuts: list[tuple[torch.Tensor, torch.Tensor]] = []
        leaf_of: dict[int, torch.Tensor] = {}
        alive: list[weakref.ref[StageTensor]] = []
        for reference in self._live:
            tensor = reference()
            if tensor is None:
                continue
            alive.append(reference)
            local = tensor.local
            if local is None or not local.requires_grad or local.grad_fn is None:
                continue
            leaf = leaf_of.get(id(local))
            if leaf is None:
                leaf = leaf_of[id(local)] = local.detach().requires_grad_()
                cuts.append((local, leaf))
            tensor.local = leaf
        self._live = alive
        return cuts

    # Announcements

    def announce(self, source: int, payload: Callable[[], bytes], description: str, *, is_always: bool) -> bytes | None:
        """Stage ``source`` tells all others; returns the bytes on the others, None on the source.

        ``is_always``: it is announced at every call, since it may differ at every call.
        """
        is_planned = self.tracker.note_announcement(source, is_always=is_always)
        number = self.next_event(f"announcement of {description} by pp_rank {source}")
        name = MessageName(MessageKind.ANNOUNCEMENT, self.microbatch, number, check_of(description))
        transport = self.engine.transport
        what = f"the output shapes of {description}"
        if self.stage != source:
            self._wait(Awaited(source, name, what), is_planned=is_planned)
            data = transport.receive_object(source, name, what)
            if self.region is not None:
                self.region.note_announced(data)
            return data
        data = payload()
        for peer in transport.peers():
            transport.send_object(peer, name, data, what)
        return None

    def structure_of(self, key: Hashable, *, is_known: bool) -> Structure | None:
        """What was announced for this signature; ``is_known``: of an operation on values that all stages can read."""
        # Not one table for both: a stage alone may meet an operation on values that all know.
        if is_known:
            return self.engine.structures_of_known.get(key)
        return self.engine.structures.get(key) or self.structures.get(key)

    def keep_structure(self, key: Hashable, structure: Structure, *, is_known: bool) -> None:
        """Remember what was announced."""
        (self.engine.structures_of_known if is_known else self.structures)[key] = structure

    def next_push(self) -> int:
        """The number of the small output that is pushed now."""
        self._num_pushes += 1
        return self._num_pushes

    # Regions that are recomputed: what the second run needs of the first is written down (second_run.py reads it)

    def begin_operation(self) -> None:
        """An operation or a module begins."""
        if self.region is not None:
            self.region.num_operations += 1

    def replays_push(self, tensor: StageTensor) -> bool:
        """Whether ``tensor`` was pushed in a first run, and can be read now as it was then."""
        return False

    def around_call(self, module: nn.Module) -> AbstractContextManager[None]:
        """Around a call of a module with buffers at its home."""
        if self.region is not None:
            self.region.module_called(module, self.engine.buffer_habits)
        return nullcontext()

    # Backward

    def check_root(self) -> None:
        """A backward may start here."""
        if self.region is not None:
            raise StepUsageError("model.backward was called inside a region that is recomputed: call it outside")

    def root_here(self, value: StageTensor) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
        """The local tensor of a root of the backward, what has its graph, and the cuts that end its piece."""
        cuts = self._cut()
        local = self.local(value)
        return local, [original for original, leaf in cuts if leaf is local] or [local], cuts

    def begin_backward(self, number: int, local: torch.Tensor, seed: torch.Tensor, cuts: list[Any]) -> None:
        """The backward starts with ``seed`` at ``local``; it runs when all forwards are done."""
        self._record(_Event("root", number, self.stage, [local], [seed], cuts, "root"))

    def pieces(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[int, int, list[Any]]]]:
        """The cuts so far, also of ordinary tensors, and (number, sender, leaves) of what was received, in order."""
        cuts = [*self._without_graphs.values(), *(pair for event in self._tape for pair in event.cuts)]
        return cuts, [(event.number, event.peer, event.leaves) for event in self._tape if event.kind == "receive"]

    def sent_in(self, number: int) -> list[torch.Tensor | None]:
        """What this stage has sent in an event."""
        return next(event.leaves for event in self._tape if event.number == number and event.kind == "send")

    @property
    def has_backward_left(self) -> bool:
        """Whether the tape has not been replayed to its beginning."""
        return bool(self._tape)

    @property
    def last_visit(self) -> int:
        """The visit that the backward has to go on with."""
        return self._tape[-1].visit

    def next_gradient(self) -> Awaited | None:
        """The message that the backward needs to go on; None if it needs none."""
        event = self._tape[-1]
        if event.kind != "send" or all(leaf is None for leaf in event.leaves):
            return None
        name = MessageName(MessageKind.GRADIENTS, self.microbatch, event.number)
        return Awaited(event.peer, name, f"gradient of {event.description}", "in the backward")

    def number_visits(self, visits_of_points: Sequence[int]) -> None:
        """After the forward of the discovery step: the tape has counted points, not visits."""
        for event in self._tape:
            event.visit = visits_of_points[event.visit - 1]

    def end_forward(self, *, has_backward: bool) -> None:
        """The body is done; without a root, or where the steps run forward only, there is no backward."""
        if not self.has_root or not has_backward:
            self._tape.clear()
        self.log.end_forward()
        self.tracker.finish()

    def backward_event(self, *, is_split: bool = False) -> None:
        """Replay the last event of the tape: gradients cross the stages where the values did, and the piece of the
        backward that belongs to it runs.

        ``is_split``: gradients of weights are left for :meth:`backward_weights`, as far as that can be.
        """
        transport = self.engine.transport
        event = self._tape.pop()
        name = MessageName(MessageKind.GRADIENTS, self.microbatch, event.number)
        description = f"gradient of {event.description}"
        extra: list[tuple[torch.Tensor, torch.Tensor]] = []
        if event.kind == "root":
            extra = self._add_gradients(event.leaves, list(event.seeds))
        elif any(leaf is not None for leaf in event.leaves):
            specs = [_NO_GRADIENT if leaf is None else TensorSpec.of_gradient(leaf) for leaf in event.leaves]
            if event.kind == "receive":
                gradients = [None if leaf is None else leaf.grad for leaf in event.leaves]
                stable = [True] * len(gradients)
                send_tensors(transport, event.peer, name, gradients, specs, description, is_stable=stable)
            else:
                received = receive_tensors(transport, event.peer, name, specs, description)
                extra = self._add_gradients(event.leaves, received)
        self._run_piece(event, extra, is_split=is_split)

    def backward_weights(self, visit: int) -> None:
        """What :meth:`backward` has left of the gradients of weights in ``visit``."""
        for part in self._weights.pop(visit, ()):
            part.run_weights()

    def _add_gradients(
        self, leaves: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Add to the leaves' gradients; returns what must go through autograd instead, so that a parameter's hooks see
        it.
        """
        through_autograd: list[tuple[torch.Tensor, torch.Tensor]] = []
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if leaf is None or gradient is None or not leaf.requires_grad:
                continue
            gradient = gradient.to(leaf.device)
            if id(leaf) in self.engine.placed:
                through_autograd.append((leaf, gradient))
            else:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return through_autograd

    def _run_piece(self, event: _Event, extra: Sequence[tuple[torch.Tensor, torch.Tensor]], *, is_split: bool) -> None:
        work = [(original, leaf.grad) for original, leaf in event.cuts if leaf.grad is not None]
        work.extend(extra)
        if not work:
            return
        tensors, gradients = [tensor for tensor, _ in work], [gradient for _, gradient in work]
        if not is_split or self.is_whole_backward:
            torch.autograd.backward(tensors, gradients, retain_graph=self.keeps_graphs)
            return
        part = SplitBackward(self.engine.placed)
        part.run_inputs(tensors, gradients)
        self._weights.setdefault(event.visit, []).append(part)

    # Life

    def check_open(self) -> None:
        if not self.is_open:
            raise StepUsageError(
                "a value of smp.step is used after the step has ended (kept in a global, an attribute or a closure): "
                "with pipelining such "
                "values live until the step returns. Return it from the step function instead"
            )

    def close(self) -> None:
        """The step is over: let go of everything."""
        self.is_open = False
        self.on_wait = _go_on
        self.log.leave()
        self._tape.clear()
        self._weights.clear()
        self._parameters.clear()
        self.written.clear()
        self._live.clear()
        self._made.clear()
        self._without_graphs.clear()
        self._carried.clear()
        self.filled.clear()

    def glue(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an operation between modules where its data is; see glue.py."""
        if self.engine.runs_module and not traits_of(func).is_special:
            return read_inside(self.stage, func, args, kwargs)
        self.check_open()
        return self.engine.run_glue(self, func, args, kwargs)
