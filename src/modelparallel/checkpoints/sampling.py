"""The place of a whole job in its data, which a job with another number of ranks takes up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Sampler

from modelparallel.errors import CheckpointError, SMPConfigError
from modelparallel.job import session


class GlobalBatchSampler(Sampler[list[int]]):
    """A ``batch_sampler`` for ``torch.utils.data.DataLoader``: every data-parallel rank's part of one common sequence
    of global batches. Local; all ranks make it alike, after ``smp.init()``. Ours, not the original's.

    Its ``state_dict`` is the same on all ranks and counts samples of the whole job, so that a job with another number
    of data-parallel ranks goes on with the next sample (``data_loader=`` of ``smp.save_checkpoint`` and
    ``smp.resume_from_checkpoint``). An iteration goes to the end of the epoch; the next begins another one, shuffled
    anew. A loader with worker processes asks for batches ahead, which count as taken: use ``num_workers=0``, or
    ``torchdata``'s ``StatefulDataLoader`` on a fixed number of ranks.

    Args:
        num_samples: how many the dataset has.
        batch_size: samples of all data-parallel ranks together in a batch; a part of it may be one sample larger than
            another.
        shuffle, seed: each epoch in an order of its own, which follows from ``seed`` and the epoch.
        drop_last: leave out the samples that do not fill a batch.

    Raises:
        SMPConfigError: numbers that are not positive, or a batch with fewer samples than ranks.
    """

    is_global = True

    def __init__(
        self, num_samples: int, batch_size: int, *, shuffle: bool = True, seed: int = 0, drop_last: bool = True
    ) -> None:
        groups = session.current().groups
        self._rank, self._num_ranks = groups.dp.rank_in_group, groups.dp.size
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SMPConfigError(f"smp.GlobalBatchSampler: {name}={value!r}: expected a number from 1")
        if batch_size < self._num_ranks:
            raise SMPConfigError(
                f"smp.GlobalBatchSampler: batch_size={batch_size} is that of all {self._num_ranks} data-parallel ranks "
                "together, and some would get no sample: make it larger"
            )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch = 0
        #: Samples of this epoch that were handed out, over all ranks.
        self.position = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's part of each batch that is left of the epoch."""
        order = self._order()
        end = len(self) * self.batch_size if self.drop_last else self.num_samples
        while self.position < end:
            batch = order[self.position : min(self.position + self.batch_size, end)]
            self.position += len(batch)
            yield batch.tensor_split(self._num_ranks)[self._rank].tolist()
        self.epoch, self.position = self.epoch + 1, 0

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.num_samples, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data. Local."""
        return {
            "epoch": self.epoch, "position": self.position, "num_samples": self.num_samples, "seed": self.seed,
            "shuffle": self.shuffle,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the place in ``state`` at the next iteration. Local.

        Raises:
            CheckpointError: the state was saved with other data.
        """
        for name in ("num_samples", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise CheckpointError(
                    f"smp.GlobalBatchSampler: the saved one had {name}={state[name]!r}, this one has "
                    f"{getattr(self, name)!r}, so that its order is another: make it as the saved one"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
