"""Scoring of transcripts: alignments, word and character error rates, and their confidence intervals.

An error rate is (insertions + deletions + substitutions) / reference units, over all utterances together. For
an empty reference, it is 0 if the hypothesis is empty, too, and else 1; its insertions count in a total.

Intervals are percentiles of a bootstrap over utterances, which keeps the errors of one utterance together:
Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
Alignments are kaldialign's: the fewest errors, each of cost 1.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import kaldialign
import numpy as np
from numpy.typing import NDArray

NOTHING = ""
"""Stands in an alignment for the missing unit of an insertion or a deletion."""

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class ErrorCount:
    """Errors against `ref` reference units; counts can be added."""

    ref: int = 0
    ins: int = 0
    dels: int = 0
    subs: int = 0

    @property
    def total(self) -> int:
        return self.ins + self.dels + self.subs

    @property
    def rate(self) -> float:
        """Errors per reference unit: 0.1 is a rate of 10 %; it may exceed 1."""
        return self.total / self.ref if self.ref else float(self.total > 0)

    def __add__(self, other: "ErrorCount") -> "ErrorCount":
        return ErrorCount(
            self.ref + other.ref, self.ins + other.ins, self.dels + other.dels, self.subs + other.subs
        )


def words(text: str) -> list[str]:
    return text.split()


def characters(text: str) -> list[str]:
    """Every character but white space."""
    return list("".join(text.split()))


def align(ref: Sequence[str], hyp: Sequence[str]) -> Pairs:
    """Pairs (unit of ref, unit of hyp) with the fewest errors; NOTHING if one side lacks a unit."""
    return list(kaldialign.align(ref, hyp, NOTHING))


def count_errors(pairs: Pairs) -> ErrorCount:
    """The errors of an alignment."""
    ins = sum(ref == NOTHING for ref, _ in pairs)
    dels = sum(hyp == NOTHING for _, hyp in pairs)
    wrong = sum(ref != hyp for ref, hyp in pairs)
    return ErrorCount(len(pairs) - ins, ins, dels, wrong - ins - dels)


def word_errors(ref: str, hyp: str) -> ErrorCount:
    return count_errors(align(words(ref), words(hyp)))


def char_errors(ref: str, hyp: str) -> ErrorCount:
    return count_errors(align(characters(ref), characters(hyp)))


def total(counts: Iterable[ErrorCount]) -> ErrorCount:
    return sum(counts, ErrorCount())


# Confidence


@dataclass(frozen=True)
class Interval:
    """A range that contains 95 % of the bootstrap."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Rate of B minus rate of A on the same utterances: below 0 if B is better."""

    difference: float
    interval: Interval
    p: float
    """Two-sided: how often chance alone would give as large a difference."""

    @property
    def is_significant(self) -> bool:
        """At the 5 % level: 0 lies outside the interval."""
        return self.interval.low > 0 or self.interval.high < 0


def interval(counts: Sequence[ErrorCount], num_draws: int = 1000, seed: int = 0) -> Interval:
    """95 % interval of the overall rate, from the errors of each utterance."""
    return _percentiles(_draws(_errors(counts), _refs(counts), num_draws, seed))


def compare(
    a: Sequence[ErrorCount], b: Sequence[ErrorCount], num_draws: int = 1000, seed: int = 0
) -> Comparison:
    """Compare B with A. Both have the same utterances in the same order; every draw is paired."""
    errors, refs = _errors(b) - _errors(a), _refs(a)
    draws = _draws(errors, refs, num_draws, seed)
    one_sided = (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (1 + num_draws)
    return Comparison(
        float(errors.sum() / max(refs.sum(), 1)), _percentiles(draws), min(1.0, 2 * float(one_sided))
    )


def _errors(counts: Sequence[ErrorCount]) -> NDArray[np.int64]:
    return np.array([count.total for count in counts], dtype=np.int64)


def _refs(counts: Sequence[ErrorCount]) -> NDArray[np.int64]:
    return np.array([count.ref for count in counts], dtype=np.int64)


def _draws(
    errors: NDArray[np.int64], refs: NDArray[np.int64], num_draws: int, seed: int
) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    rates = np.zeros(num_draws)
    for i in range(num_draws if len(errors) else 0):
        drawn = rng.integers(len(errors), size=len(errors))
        rates[i] = errors[drawn].sum() / max(refs[drawn].sum(), 1)
    return rates


def _percentiles(rates: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(rates, [2.5, 97.5])
    return Interval(float(low), float(high))


# Where the errors are


@dataclass(frozen=True)
class Confusions:
    """How often each unit was inserted, deleted, and substituted by another."""

    ins: Counter[str] = field(default_factory=Counter)
    dels: Counter[str] = field(default_factory=Counter)
    subs: Counter[tuple[str, str]] = field(default_factory=Counter)


def confusions(alignments: Iterable[Pairs]) -> Confusions:
    found = Confusions()
    for pairs in alignments:
        for ref, hyp in pairs:
            if ref == NOTHING:
                found.ins[hyp] += 1
            elif hyp == NOTHING:
                found.dels[ref] += 1
            elif ref != hyp:
                found.subs[ref, hyp] += 1
    return found


def by_length(
    counts: Iterable[ErrorCount], longest: Sequence[int] = (5, 10, 20, 40)
) -> list[tuple[str, int, ErrorCount]]:
    """(lengths, utterances, errors) of groups by the number of reference units; empty groups are left out.

    longest: the greatest length of each group but the last.
    """
    names = [f"{low + 1}-{high}" for low, high in zip((-1, *longest), longest, strict=False)]
    names.append(f"over {longest[-1]}")
    groups: list[list[ErrorCount]] = [[] for _ in names]
    for count in counts:
        groups[int(np.searchsorted(longest, count.ref))].append(count)
    return [(name, len(group), total(group)) for name, group in zip(names, groups, strict=True) if group]
