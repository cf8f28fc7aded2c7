"""Which utterances go together: lhotse's DynamicBucketingSampler, with a position to go on from.

It runs in the training process, one for each rank, and hands batches of cuts to the workers that read them.
So the order is a pure function of (seed, epoch), and where it stands is two numbers.
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
"""Cuts held for shuffling. A corpus of fewer is shuffled whole."""

BOUNDS_CUTS = 10_000
"""Cuts of an epoch that place the bounds of its buckets; the first epochs may have short ones only."""

STEPS_OF_BUCKET = 2
"""A small corpus gets fewer buckets, so that each of them has so many steps of all ranks to draw from."""


@dataclass
class Sampler:
    """Batches of cuts for one rank. `cuts(epoch)` gives the cuts of an epoch, always in the same order.

    The ranks of a step draw from one bucket, so they have about the same to do. An epoch has every utterance
    once; where its last step has fewer utterances than ranks, some have one of them again, as `<id>_dup0`.

    Told the seconds, lhotse closes a batch after the utterance that passes them (one in twenty batches of
    60 s, by up to a third), so the batches of a bucket have a fixed number of utterances, by the longest it
    may hold: none passes `max_batch_s`, padding included, but for an utterance that is longer alone.
    """

    cuts: Callable[[int], Iterable[Cut]]
    max_batch_s: float
    longest_s: float
    """No cut is longer. Needed where the first cuts of a corpus are not like the rest."""

    num_buckets: int = 30
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def epoch(self, epoch: int) -> Iterator[list[Cut]]:
        """This rank's batches of an epoch, from its first."""
        cuts = iter(self.cuts(epoch))
        first = list(itertools.islice(cuts, BOUNDS_CUTS))
        constraint = self._constraint(first)
        sampler = _WholeSteps(
            itertools.chain(first, cuts),
            constraint=constraint,
            duration_bins=constraint.max_seq_len_buckets[:-1],
            buffer_size=BUFFER_CUTS,
            shuffle=True,
            sync_buckets=True,  # without, lhotse ends an epoch at the first bucket that is empty
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        sampler.set_epoch(epoch)
        return map(list, sampler)

    def forever(self, position: dict[str, int] | None) -> Iterator[tuple[dict[str, int], list[Cut]]]:
        """Batches from `position` on, through all epochs to come, each with the position that follows it.

        Batches before it are drawn again, but not read. A position of another number of ranks is taken to
        about the same place in its epoch. Raises ManifestError where an epoch has no batch.
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
        """The longest utterance of each bucket, and how many go into a batch.

        Buckets share the seconds of these cuts evenly; one more is for what is longer than all of them.
        """
        seconds = [cut.duration for cut in cuts]
        step_s = self.max_batch_s * self.world_size
        num_buckets = min(self.num_buckets, len(cuts), int(sum(seconds) / (STEPS_OF_BUCKET * step_s)))
        bounds = estimate_duration_buckets(cuts, num_buckets) if num_buckets > 1 else []
        bounds.append(max(seconds, default=self.longest_s))
        sizes = [max(1, int(self.max_batch_s / bound)) for bound in (*bounds, self.longest_s)]
        return FixedBucketBatchSizeConstraint([*bounds, math.inf], sizes)


class _WholeSteps(DynamicBucketingSampler):
    """Has a batch for every rank in the last step of an epoch too.

    lhotse would mix what is left, whatever its length, and deal it out: up to ten times `max_batch_s`.
    """

    cuts_iter: Iterator[CutSet]

    def __iter__(self) -> _WholeSteps:
        super().__iter__()
        self.cuts_iter = _fill_last(self.cuts_iter, self.world_size)
        return self


def _fill_last(batches: Iterable[CutSet], world_size: int) -> Iterator[CutSet]:
    """The batches; the largest of those of the last step are halved until there are `world_size`."""
    batches = iter(batches)
    while step := list(itertools.islice(batches, world_size)):
        while len(step) < world_size and max(map(len, step)) > 1:
            step.sort(key=len)
            step += step.pop().split(2)
        yield from step
