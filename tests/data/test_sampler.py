"""Properties of the order of the data: complete, equal on all ranks, bounded, and exactly restorable."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from lhotse.cut import Cut, MonoCut

from asr.data import sampler
from asr.data.sampler import Sampler
from asr.errors import ManifestError

SECONDS = np.random.default_rng(1).uniform(0.5, 16, 2000).tolist()


CUTS = [MonoCut(f"cut{number}", 0.0, seconds, 0) for number, seconds in enumerate(SECONDS)]


def cuts(epoch: int) -> Iterator[Cut]:
    return iter(CUTS)


def ids(batches: Iterator[list[Cut]]) -> list[list[str]]:
    return [[cut.id for cut in batch] for batch in batches]


def of_ranks(some: list[Cut], world_size: int) -> list[list[list[Cut]]]:
    """The batches of each rank in an epoch over these cuts."""
    samplers = [
        Sampler(lambda _: iter(some), 60.0, 16.0, rank=r, world_size=world_size) for r in range(world_size)
    ]
    return [list(of_rank.epoch(0)) for of_rank in samplers]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_cuts", [1, 7, 100, 2000])
def test_ranks_share_out_an_epoch_in_equal_numbers_of_batches(num_cuts: int, world_size: int) -> None:
    ranks = of_ranks(CUTS[:num_cuts], world_size)
    assert len({len(batches) for batches in ranks}) == 1
    taken = [cut.id for batches in ranks for batch in batches for cut in batch]
    assert set(name.split("_dup")[0] for name in taken) == {cut.id for cut in CUTS[:num_cuts]}
    assert num_cuts <= len(taken) < num_cuts + world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_keeps_to_its_seconds_and_little_of_it_is_padding(world_size: int) -> None:
    """Some batches of an epoch stay incomplete at its end; on average padding is small."""
    padded = spoken = 0.0
    for batch in of_ranks(CUTS, world_size)[-1]:
        longest = max(cut.duration for cut in batch)
        assert len(batch) * longest <= 60.0
        padded += len(batch) * longest
        spoken += sum(cut.duration for cut in batch)
    assert spoken > 0.9 * padded


def test_an_epoch_of_short_utterances_has_as_little_padding() -> None:
    short = [MonoCut(f"short{number}", 0.0, 0.85 + 0.3 * number / 4000, 0) for number in range(4000)]
    batches = [
        [cut.duration for cut in batch]
        for batch in Sampler(lambda epoch: iter(CUTS if epoch else short), 60.0, 16.0).epoch(0)
    ]
    assert sum(map(sum, batches)) > 0.95 * sum(len(batch) * max(batch) for batch in batches)


@pytest.mark.parametrize("num_short", [1240, 1280, 1320])
def test_the_last_step_of_an_epoch_keeps_to_its_seconds(num_short: int) -> None:
    """A batch of short and one of long utterances are left, to be distributed to three ranks."""
    mixed = [MonoCut(f"cut{n}", 0.0, 0.5 if n < num_short else 15.0, 0) for n in range(num_short + 22)]
    for batch in itertools.chain(*of_ranks(mixed, 3)):
        assert len(batch) * max(cut.duration for cut in batch) <= 60.0


def test_ranks_of_a_step_have_about_the_same_to_do() -> None:
    first, second = (Sampler(cuts, 60.0, 16.0, rank=rank, world_size=2).epoch(0) for rank in range(2))
    steps = [
        (sum(c.duration for c in a), sum(c.duration for c in b)) for a, b in zip(first, second, strict=True)
    ]
    full = [(a, b) for a, b in steps if a + b > 80]
    assert len(full) > 50
    assert all(abs(a - b) < 25 for a, b in full)


def test_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else() -> None:
    once, again = (ids(Sampler(cuts, 60.0, 16.0, seed=3).epoch(0)) for _ in range(2))
    assert once == again
    assert once != ids(Sampler(cuts, 60.0, 16.0, seed=3).epoch(1))
    assert once != ids(Sampler(cuts, 60.0, 16.0, seed=4).epoch(0))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("taken", [1, 7, 400])  # the last is in another epoch
def test_going_on_from_a_position_gives_what_would_have_come(taken: int, world_size: int) -> None:
    def drawn(position: dict[str, int] | None, count: int) -> list[tuple[dict[str, int], list[str]]]:
        last = Sampler(cuts, 60.0, 16.0, rank=world_size - 1, world_size=world_size)
        return [
            (at, [cut.id for cut in batch]) for at, batch in itertools.islice(last.forever(position), count)
        ]

    whole = drawn(None, taken + 20)
    assert drawn(whole[taken - 1][0], 20) == whole[taken:]


def test_a_position_at_the_end_of_an_epoch_goes_on_with_the_next() -> None:
    size = len(ids(Sampler(cuts, 60.0, 16.0).epoch(0)))
    position, batch = next(Sampler(cuts, 60.0, 16.0).forever({"epoch": 0, "batch": size, "world_size": 1}))
    assert position == {"epoch": 1, "batch": 1, "world_size": 1}
    assert [cut.id for cut in batch] == ids(Sampler(cuts, 60.0, 16.0).epoch(1))[0]


def test_a_position_of_other_ranks_goes_on_at_about_the_same_place() -> None:
    position, _ = next(Sampler(cuts, 60.0, 16.0).forever({"epoch": 2, "batch": 10, "world_size": 2}))
    assert position == {"epoch": 2, "batch": 21, "world_size": 1}


def test_a_small_corpus_makes_full_batches_that_differ_between_epochs() -> None:
    small = Sampler(lambda epoch: iter(CUTS[:100]), 200.0, 16.0, num_buckets=30)
    first, second = (ids(small.epoch(epoch)) for epoch in (0, 1))
    assert len(first) <= 8
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_utterances_longer_than_the_first_ones_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a sorted manifest: bucket bounds come from its first utterances."""
    monkeypatch.setattr(sampler, "BOUNDS_CUTS", 100)
    rising = sorted(CUTS, key=lambda cut: cut.duration)
    batches = of_ranks(rising, 1)[0]
    assert all(len(batch) * max(cut.duration for cut in batch) <= 60.0 for batch in batches)
    assert len(batches) < len(CUTS) / 2


def test_no_cuts_is_an_error_not_a_hang() -> None:
    with pytest.raises(ManifestError, match="0 utterances left"):
        next(Sampler(lambda epoch: iter(()), 60.0, 16.0).forever(None))
