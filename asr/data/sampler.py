"""Batching of utterances: lhotse's DynamicBucketingSampler, with a position to resume from.

It runs in the training process of each rank and hands batches of cuts to the workers that read them. The
order is thus a pure function of (seed, epoch), and a position is an epoch, a batch and the number of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling.dynamic_bucketing import (
    DynamicBucketingSampler,
    FixedBucketBatchSizeConstraint,
    estimate_duration_buckets,
)

from asr.errors import ManifestError

BUFFER_CUTS = 20_000
"""Cuts held for shuffling. A smaller corpus is shuffled as a whole."""

BOUNDS_CUTS = 10_000
"""First cuts of an epoch that set its bucket bounds, per epoch as early ones may have only short cuts."""

STEPS_OF_BUCKET = 2
"""A small corpus gets fewer buckets, so that each has enough cuts for this many steps of all ranks."""


@dataclass
class Sampler:
    """Batches of cuts for one rank. `cuts(epoch)` gives the cuts of an epoch, always in the same order.

    The ranks of a step draw from one bucket, so they have similar work. An epoch has every utterance once; if
    its last step has fewer utterances than ranks, some ranks repeat one of them, as `<id>_dup0`.

    Given a limit in seconds, lhotse closes a batch only after the utterance that exceeds it (one in twenty
    batches of 60 s, by up to a third). So the batches of a bucket have a fixed number of utterances, set by
    the longest it may hold: none exceeds `max_batch_s`, padding included, unless a single utterance does.
    """

    cuts: Callable[[int], Iterable[Cut]]
    max_batch_s: float
    longest_s: float
    """No cut is longer. Needed in case the first cuts of a corpus are not like the rest."""

    num_buckets: int = 30
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def epoch(self, epoch: int) -> Iterator[list[Cut]]:
        """This rank's batches of an epoch, from the first."""
        cuts = iter(self.cuts(epoch))
        first = list(itertools.islice(cuts, BOUNDS_CUTS))
        constraint = self._constraint(first)
        sampler = _WholeSteps(
            itertools.chain(first, cuts),
            constraint=constraint,
            duration_bins=constraint.max_seq_len_buckets[:-1],
            buffer_size=BUFFER_CUTS,
            shuffle=True,
            sync_buckets=True,  # otherwise, lhotse ends an epoch at the first empty bucket
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        sampler.set_epoch(epoch)
        return map(list, sampler)

    def forever(self, position: dict[str, int] | None) -> Iterator[tuple[dict[str, int], list[Cut]]]:
        """Batches from `position` on, through all further epochs, each with the position after it.

        Batches before it are drawn again, but not read. A position from another number of ranks resumes at
        about the same place in its epoch. Raises ManifestError if an epoch has no batch.
        """
        start = position or {"epoch": 0, "batch": 0, "world_size": self.world_size}
        done = start["batch"] * start.get("world_size", self.world_size) // self.world_size
        for epoch in itertools.count(start["epoch"]):
            number = 0
            for number, batch in enumerate(self.epoch(epoch), 1):
                if number > done:
                    yield {"epoch": epoch, "batch": number, "world_size": self.world_size}, batch
            if number == 0:
                raise ManifestError(
                    "0 utterances left to train on; see data.min_utterance_s and data.max_utterance_s, "
                    "and what `asr prepare` says of the manifests"
                )
            done = 0

    def _constraint(self, cuts: list[Cut]) -> FixedBucketBatchSizeConstraint:
        """The longest utterance of each bucket, and its batch size.

        Buckets share the seconds of these cuts evenly; an extra one is for longer cuts.
        """
        seconds = [cut.duration for cut in cuts]
        step_s = self.max_batch_s * self.world_size
        num_buckets = min(self.num_buckets, len(cuts), int(sum(seconds) / (STEPS_OF_BUCKET * step_s)))
        bounds = estimate_duration_buckets(cuts, num_buckets) if num_buckets > 1 else []
        bounds.append(max(seconds, default=self.longest_s))
        sizes = [max(1, int(self.max_batch_s / bound)) for bound in (*bounds, self.longest_s)]
        return FixedBucketBatchSizeConstraint([*bounds, math.inf], sizes)


class _WholeSteps(DynamicBucketingSampler):
    """Also has a batch for every rank in the last step of an epoch.

    lhotse would mix what is left, whatever its length, and deal it out: up to ten times `max_batch_s`.
    """

    cuts_iter: Iterator[CutSet]

    def __iter__(self) -> _WholeSteps:
        super().__iter__()
        self.cuts_iter = _fill_last(self.cuts_iter, self.world_size)
        return self


def _fill_last(batches: Iterable[CutSet], world_size: int) -> Iterator[CutSet]:
    """The batches; the largest ones of the last step are halved until there are `world_size`."""
    batches = iter(batches)
    while step := list(itertools.islice(batches, world_size)):
        while len(step) < world_size and max(map(len, step)) > 1:
            step.sort(key=len)
            step += step.pop().split(2)
        yield from step
