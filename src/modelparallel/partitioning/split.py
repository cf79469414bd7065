"""Cutting a list of items into runs: the arithmetic of the solver, without names.

[Note: What is minimised] The largest over the stages of ``w * memory / average + (1 - w) * compute / average``, with
w the ``memory_weight``. Memory is parameters, gradients, optimizer state, and activations; the balance counts the
activations of equally many microbatches for every stage. With a backward-first schedule the early stages really hold
more of them: that counts against ``memory_limit``, which every split must keep, and not here, because below the
limit uneven memory costs nothing, while a stage with more layers makes all the others wait. Of the splits that reach
the optimum, the one is taken where the sum of the squares of the stages and what the messages cost (a share of a
stage's average compute) is least, then the one with the fewest bytes over its cuts.

[Note: Waiting] Of two stages that cost as much, which one of them comes first matters to the waiting at the beginning
and the end of a step. So the optimum is improved once more (:func:`shortened`), by moving its cuts, with a prediction
of the step's time: the waiting per microbatch, as a share of a stage's average compute, counts like compute.

One piece a stage: the search is exact. Several pieces a stage: the pieces of one stage are weighed together (memory)
or by the dearest (compute, since the others wait for it), which no recursion over prefixes can do. There a first
split is improved by moving the cuts, singly and in pairs, and then by branch and bound. The search is exact if it ends
before `_MOST_NODES`; else it gives the best split so far. No clock decides, so that equal models get equal plans.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from modelparallel.partitioning.items import Item

# Splits this close in cost count as equal: the sums of floats differ in their last digits.
_TOLERANCE = 1e-9
# Runs that the branch and bound looks at: a second or two of Python.
_MOST_NODES = 200_000
# Splits whose step is simulated: a second or two, too.
_MOST_SIMULATIONS = 200

Bounds = list[tuple[int, int]]
Rating = tuple[float, float, float, int]
Work = tuple[float, float, float]
#: The time of a step from the work of its stages for one microbatch.
StepTime = Callable[[Sequence[Work]], float]


class Costs:
    """The costs of every run of items as every piece, from prefix sums.

    Args:
        in_flight: for every piece, how many microbatches' activations it holds; piece c is on stage
            ``c % num_stages``.
        memory_limit: the bytes that one stage may hold; None: any number.
    """

    def __init__(
        self,
        items: Sequence[Item],
        num_stages: int,
        memory_weight: float,
        in_flight: Sequence[int],
        memory_limit: int | None = None,
    ) -> None:
        self.num_items = len(items)
        self.num_stages = num_stages
        self.num_pieces = len(in_flight)
        self.cuts = [(0.0, item.crossing_bytes) for item in items]
        self.memory_limit = math.inf if memory_limit is None else memory_limit
        self._in_flight = in_flight
        self._state = _prefix_sums([item.state_bytes for item in items])
        self._activations = _prefix_sums([item.activation_bytes for item in items])
        self._compute = _prefix_sums([item.compute for item in items])
        self._work = [_prefix_sums(list(part)) for part in zip(*(item.work for item in items), strict=True)]
        self._mean_in_flight = sum(in_flight) / self.num_pieces
        memory = (self._state[-1] + self._activations[-1] * self._mean_in_flight) / num_stages
        compute = self._compute[-1] / num_stages
        if compute:
            self.cuts = [(item.crossing_cost / compute, item.crossing_bytes) for item in items]
        self._memory_factor = memory_weight / memory if memory else 0.0
        self._compute_factor = (1 - memory_weight) / compute if compute else 0.0
        if not self._memory_factor and not self._compute_factor and memory:
            self._memory_factor = 1 / memory  # compute alone is asked for and none was seen (sizes only)

    @property
    def num_repeats(self) -> int:
        """Pieces of one stage."""
        return self.num_pieces // self.num_stages

    def memory(self, piece: int, start: int, end: int) -> float:
        """The bytes that items start to end need as this piece."""
        return self._sum(self._state, start, end) + self._sum(self._activations, start, end) * self._in_flight[piece]

    def piece_cost(self, piece: int, start: int, end: int) -> float:
        """What is minimised, for a piece by itself; infinite if it alone is over the limit."""
        if self.memory(piece, start, end) > self.memory_limit:
            return math.inf
        return self.num_repeats * (self.memory_part(start, end) + self.compute_part(start, end))

    def rate(self, bounds: Bounds) -> Rating:
        """A split, smaller is better: bytes over the limit, the dearest stage, unevenness and messages, bytes sent."""
        costs = []
        excess = 0.0
        for stage in range(self.num_stages):
            pieces = range(stage, self.num_pieces, self.num_stages)
            excess += max(0.0, sum(self.memory(piece, *bounds[piece]) for piece in pieces) - self.memory_limit)
            memory = sum(self.memory_part(*bounds[piece]) for piece in pieces)
            costs.append(memory + self.num_repeats * max(self.compute_part(*bounds[piece]) for piece in pieces))
        cuts = [self.cuts[end - 1] for _, end in bounds[:-1]]
        second = sum(cost * cost for cost in costs) + sum(cost for cost, _ in cuts)
        return excess, _rounded(max(costs)), _rounded(second), sum(num_bytes for _, num_bytes in cuts)

    def memory_part(self, start: int, end: int) -> float:
        """The share of memory in what is minimised."""
        activations = self._sum(self._activations, start, end) * self._mean_in_flight
        return self._memory_factor * (self._sum(self._state, start, end) + activations)

    def compute_part(self, start: int, end: int) -> float:
        """The share of compute in what is minimised, for a stage of this one piece."""
        return self._compute_factor * self._sum(self._compute, start, end)

    def work(self, start: int, end: int) -> Work:
        """The work of the forward, of the input gradients, and of the weight gradients."""
        forward, inputs, weights = (self._sum(part, start, end) for part in self._work)
        return forward, inputs, weights

    def waiting_part(self, bounds: Bounds, step_time: float, num_microbatches: int) -> float:
        """The share of waiting in what is minimised, if the step takes so long."""
        dearest = max(self._sum(self._compute, start, end) for start, end in bounds)
        return self._compute_factor * (step_time / num_microbatches - dearest)

    @staticmethod
    def _sum(prefix_sums: Sequence[float], start: int, end: int) -> float:
        return prefix_sums[end] - prefix_sums[start]


def best_split(costs: Costs) -> Bounds | None:
    """(start, end) of every piece, none empty; None if no split within the memory limit was found."""
    bounds = best_runs(costs.num_items, costs.num_pieces, costs.piece_cost, costs.cuts)
    if costs.num_repeats == 1 or costs.num_pieces > costs.num_items:
        return bounds
    starts = [] if bounds is None else [bounds]
    leanest = leanest_split(costs)
    if leanest is not None:
        starts.append(leanest)
    best_start = min((improved(start, costs.rate) for start in starts), key=costs.rate, default=None)
    return _Branching(costs, best_start).best if best_start is not None else None


def leanest_split(costs: Costs) -> Bounds | None:
    """The split whose fullest stage holds the least, whatever the limit; None if there are too few items."""
    bounds = best_runs(costs.num_items, costs.num_pieces, costs.memory, costs.cuts)
    if bounds is None or costs.num_repeats == 1:
        return bounds
    return improved(bounds, lambda split: (max(stage_memory(costs, split)), sum(stage_memory(costs, split))))


def shortened(costs: Costs, bounds: Bounds, step_time: StepTime, num_microbatches: int) -> Bounds:
    """The split after moving its cuts as long as that makes it better; see the note on waiting."""
    known: dict[tuple[tuple[int, int], ...], tuple[float, ...]] = {}

    def rate(split: Bounds) -> tuple[float, ...]:
        key = tuple(split)
        if key not in known:
            if len(known) >= _MOST_SIMULATIONS:
                return (math.inf,)
            excess, dearest, second, num_bytes = costs.rate(split)
            time = step_time([costs.work(start, end) for start, end in split])
            waiting = costs.waiting_part(split, time, num_microbatches)
            known[key] = excess, _rounded(dearest + waiting), second, num_bytes
        return known[key]

    return improved(bounds, rate)


def stage_memory(costs: Costs, bounds: Bounds) -> list[float]:
    """The bytes that every stage holds."""
    return [
        sum(costs.memory(piece, *bounds[piece]) for piece in range(stage, costs.num_pieces, costs.num_stages))
        for stage in range(costs.num_stages)
    ]


def improved(bounds: Bounds, rate: Callable[[Bounds], tuple[float, ...]]) -> Bounds:
    """The split after moving its cuts, one or two at a time, as long as that makes the rating smaller."""
    num_items = bounds[-1][1]
    cuts = [end for _, end in bounds[:-1]]
    best = rate(bounds)
    moves: list[tuple[tuple[int, int], ...]] = [((cut, by),) for cut in range(len(cuts)) for by in (-1, 1, -2, 2)]
    moves += [
        ((first, first_by), (second, second_by))
        for first, second in itertools.combinations(range(len(cuts)), 2)
        for first_by in (-1, 1)
        for second_by in (-1, 1)
    ]
    has_moved = True
    while has_moved:
        has_moved = False
        for move in moves:
            tried = list(cuts)
            for cut, by in move:
                tried[cut] += by
            edges = [0, *tried, num_items]
            if any(end <= start for start, end in itertools.pairwise(edges)):
                continue
            rating = rate(list(itertools.pairwise(edges)))
            if rating < best:
                cuts, best, has_moved = tried, rating, True
    return list(itertools.pairwise([0, *cuts, num_items]))


class _Branching:
    """Branch and bound over the splits into several pieces a stage, piece by piece.

    Attributes:
        best: the best split within the limit; None if none is known.
    """

    def __init__(self, costs: Costs, start: Bounds) -> None:
        self._costs = costs
        self._rating = costs.rate(start)
        self.best = start if self._rating[0] == 0 else None
        if self.best is None:
            self._rating = (0.0, math.inf, math.inf, 0)
        self._num_left = _MOST_NODES
        self._rest = self._cheapest_rest()
        self._held = [0.0] * costs.num_stages
        self._memory = [0.0] * costs.num_stages
        self._compute = [0.0] * costs.num_stages
        self._split: Bounds = []
        self._visit(0, 0)

    def _visit(self, piece: int, start: int) -> None:
        costs = self._costs
        if piece == costs.num_pieces:
            rating = costs.rate(self._split)
            if rating < self._rating:
                self._rating, self.best = rating, list(self._split)
            return
        stage = piece % costs.num_stages
        before = self._held[stage], self._memory[stage], self._compute[stage]
        is_last = piece == costs.num_pieces - 1
        first = costs.num_items if is_last else start + 1
        for end in range(first, costs.num_items - (costs.num_pieces - piece - 1) + 1):
            self._num_left -= 1
            held = before[0] + costs.memory(piece, start, end)
            memory = before[1] + costs.memory_part(start, end)
            compute = max(before[2], costs.num_repeats * costs.compute_part(start, end))
            limit = self._rating[1] * (1 + _TOLERANCE)
            if self._num_left < 0 or held > costs.memory_limit or memory + compute > limit:
                break
            if self._rest[piece + 1][end] > limit:
                continue
            self._held[stage], self._memory[stage], self._compute[stage] = held, memory, compute
            self._split.append((start, end))
            self._visit(piece + 1, end)
            self._split.pop()
        self._held[stage], self._memory[stage], self._compute[stage] = before

    def _cheapest_rest(self) -> list[list[float]]:
        """For every piece and start, a bound: the dearest of this and the later pieces costs at least so much."""
        costs = self._costs
        rest = [[math.inf] * (costs.num_items + 1) for _ in range(costs.num_pieces + 1)]
        rest[-1][-1] = 0.0
        for piece in reversed(range(costs.num_pieces)):
            for start in range(costs.num_items):
                for end in range(start + 1, costs.num_items + 1):
                    cost = costs.memory_part(start, end) + costs.num_repeats * costs.compute_part(start, end)
                    if cost >= rest[piece][start] or costs.memory(piece, start, end) > costs.memory_limit:
                        break
                    rest[piece][start] = min(rest[piece][start], max(cost, rest[piece + 1][end]))
        return rest


def best_runs(
    num_items: int,
    num_pieces: int,
    piece_cost: Callable[[int, int, int], float],
    cuts: Sequence[tuple[float, int]],
) -> Bounds | None:
    """The runs whose dearest is cheapest; then the least sum of squares and costs of cuts, then the fewest bytes.

    Args:
        piece_cost: of (piece, start, end); it grows with the run. Infinite: such a run is not allowed.
        cuts: cost and bytes of a cut after each item.

    Returns:
        (start, end) of every piece, none empty; None if every split has a run that is not allowed.
    """
    smallest = _smallest_maximum(num_items, num_pieces, piece_cost)
    if math.isinf(smallest):
        return None
    limit = smallest * (1 + _TOLERANCE)
    best: list[dict[int, tuple[float, int, int]]] = [{0: (0.0, 0, 0)}]
    for piece in range(num_pieces):
        row: dict[int, tuple[float, int, int]] = {}
        for end in range(piece + 1, num_items - (num_pieces - piece - 1) + 1):
            for start in range(end - 1, piece - 1, -1):
                cost = piece_cost(piece, start, end)
                if cost > limit:
                    break
                before = best[piece].get(start)
                if before is None:
                    continue
                cut_cost, cut_bytes = cuts[start - 1] if start else (0.0, 0)
                # Rounding keeps the last digits of the sums from deciding between equal splits.
                candidate = (_rounded(before[0] + cost * cost + cut_cost), before[1] + cut_bytes, start)
                if end not in row or candidate < row[end]:
                    row[end] = candidate
        best.append(row)
    bounds = []
    end = num_items
    for piece in range(num_pieces, 0, -1):
        start = best[piece][end][2]
        bounds.append((start, end))
        end = start
    return bounds[::-1]


def _smallest_maximum(num_items: int, num_pieces: int, piece_cost: Callable[[int, int, int], float]) -> float:
    """The smallest possible cost of the dearest piece; infinite if there is no split.

    A run's cost grows with the run, which ends the inner loops early.
    """
    row = [0.0] + [math.inf] * num_items
    for piece in range(num_pieces):
        following = [math.inf] * (num_items + 1)
        for end in range(piece + 1, num_items - (num_pieces - piece - 1) + 1):
            best = math.inf
            for start in range(end - 1, piece - 1, -1):
                cost = piece_cost(piece, start, end)
                if cost >= best:
                    break
                best = min(best, max(cost, row[start]))
            following[end] = best
        row = following
    return row[num_items]


def _prefix_sums(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _rounded(value: float) -> float:
    """Equal sums of floats differ in their last digits, which must not decide."""
    return round(value, 12)
