"""How late the words of a stream are: how far behind an ideal writer, and how long after they were spoken.

Two clocks, both in milliseconds from the start of the sound. `read_ms` is how much sound had been read when a
word was written; it is the same on every machine (computation-unaware). `elapsed_ms` is when somebody who
listens in real time sees the word, after the computing and what was still to be computed before it
(computation-aware). Each measure takes the one or the other.

    AL     sum over i <= tau of (d_i - (i - 1) S / J), over tau             arXiv:1810.08398
    LAAL   the same with max(I, J) in place of J                            arXiv:2206.05807
    DAL    mean over i of (e_i - (i - 1) S / I), e_i = max(d_i, e_(i-1) + S / I)   arXiv:1906.00048

tau is the first word that is written when all sound has been read, or the last one if none is. It is always
counted in sound read, so that computing can only add to a lag. All words of the hypothesis count, right,
wrong or inserted; deleted ones by J alone.

S duration of the source in ms · I words of the hypothesis, J of the reference · d_i when word i was written
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asr import wer
from asr.wer import ErrorCount


class Told(NamedTuple):
    """A text of a stream: a partial one is replaced by the next, a final one stays."""

    read_ms: float
    elapsed_ms: float
    text: str
    final: bool


@dataclass(frozen=True)
class Trace:
    """What was said in one utterance, what was written, and when."""

    source_ms: float
    words: tuple[str, ...]
    """The hypothesis (I,)."""

    read_ms: tuple[float, ...]
    """Sound read when each of them was written for good (I,)."""

    elapsed_ms: tuple[float, ...]
    """Time on the clock of somebody who listens in real time (I,)."""

    reference: tuple[str, ...]
    """(J,)."""

    ends_ms: tuple[float | None, ...]
    """Where each word of the reference ends in the sound (J,); None where that is not known."""

    retracted: int = 0
    """Words that a partial text took back."""

    def __post_init__(self) -> None:
        assert len(self.words) == len(self.read_ms) == len(self.elapsed_ms)
        assert len(self.reference) == len(self.ends_ms)


def make_trace(
    told: Iterable[Told], source_ms: float, reference: Sequence[str], ends_ms: Sequence[float | None]
) -> Trace:
    """The trace of all that a stream told of one utterance; the hypothesis is its final texts in a row.

    A word is written at the first text from which on it and all words before it stand in every text up to the
    final one. Partial texts may change: what a text has behind the words that it shares with the next one is
    retracted (the erasure of arXiv:1912.03393), a word that was not yet complete too. So is a partial text at
    the end that no final one follows.
    """
    written: list[tuple[str, Told]] = []
    retracted = 0
    for texts in _up_to_final(told):
        words = [wer.words(text.text) for text in texts]
        final = words[-1] if texts[-1].final else []
        retracted += sum(
            len(before) - _num_shared(before, after)
            for before, after in zip(words, [*words[1:], final], strict=True)
        )
        standing, since = len(final), [texts[-1]] * len(final)
        for text, current in zip(reversed(texts), reversed(words), strict=True):
            standing = min(standing, _num_shared(current, final))
            since[:standing] = [text] * standing
        written += zip(final, since, strict=True)
    return Trace(
        source_ms,
        words=tuple(word for word, _ in written),
        read_ms=tuple(text.read_ms for _, text in written),
        elapsed_ms=tuple(text.elapsed_ms for _, text in written),
        reference=tuple(reference),
        ends_ms=tuple(ends_ms),
        retracted=retracted,
    )


def _up_to_final(told: Iterable[Told]) -> Iterator[list[Told]]:
    """Texts with the final one that ends them; those at the end may lack it."""
    texts: list[Told] = []
    for text in told:
        texts.append(text)
        if text.final:
            yield texts
            texts = []
    if texts:
        yield texts


def _num_shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Words that both begin with."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


# Lagging. delays_ms (I,) is trace.read_ms or trace.elapsed_ms; neither words nor reference may be empty.


def average_lagging(trace: Trace, delays_ms: Sequence[float]) -> float:
    """AL in ms, arXiv:1810.08398. Words that should not be there lower it, even below 0."""
    return _lagging(trace, delays_ms, len(trace.reference))


def length_adaptive_average_lagging(trace: Trace, delays_ms: Sequence[float]) -> float:
    """LAAL in ms, arXiv:2206.05807: AL that writing too many words does not improve."""
    return _lagging(trace, delays_ms, max(len(trace.words), len(trace.reference)))


def differentiable_average_lagging(trace: Trace, delays_ms: Sequence[float]) -> float:
    """DAL in ms, arXiv:1906.00048: every word takes its share of time, so a delay is not caught up."""
    pace_ms = trace.source_ms / len(trace.words)
    total, earliest_ms = 0.0, -np.inf
    for i, delay_ms in enumerate(delays_ms):
        at_ms = max(delay_ms, earliest_ms)
        total += at_ms - i * pace_ms
        earliest_ms = at_ms + pace_ms
    return total / len(trace.words)


def _lagging(trace: Trace, delays_ms: Sequence[float], num_words: int) -> float:
    has_all = (i for i, read_ms in enumerate(trace.read_ms, 1) if read_ms >= trace.source_ms)
    tau = next(has_all, len(trace.words))
    pace_ms = trace.source_ms / num_words
    return sum(delay_ms - i * pace_ms for i, delay_ms in enumerate(delays_ms[:tau])) / tau


# Delays behind the speaker


def word_delays(trace: Trace, delays_ms: Sequence[float]) -> dict[int, float]:
    """From the end of a word in the sound to its writing, in ms, by its position in the reference.

    Only of words that the alignment for the error rate pairs with the same word, and whose end is known:
    insertions, deletions and substitutions have no delay. Below 0 where a word is written before its end.
    """
    found: dict[int, float] = {}
    i = j = 0
    for ref, hyp in wer.align(trace.reference, trace.words):
        if ref == hyp and (end_ms := trace.ends_ms[j]) is not None:
            found[j] = delays_ms[i] - end_ms
        i += hyp != wer.NOTHING
        j += ref != wer.NOTHING
    return found


# All utterances together


@dataclass(frozen=True)
class Delays:
    """Percentiles of some delays in ms; None where there are none."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class Measures:
    """By one of the two clocks, in ms. Lagging is the mean over utterances, None where there are none."""

    al: float | None
    laal: float | None
    dal: float | None
    first_word: Delays
    """Of the first word of each reference, where it was recognised."""

    word: Delays
    last_word: Delays


@dataclass(frozen=True)
class Latency:
    """Of all utterances."""

    utterances: int
    without_words: int
    """Of them: reference or hypothesis is empty. Their errors count; they have no lagging and no delays."""

    errors: ErrorCount
    unaligned: int
    """Reference words whose end is not known."""

    retracted: int
    retracted_share: float
    """Of the words of the hypotheses; it may exceed 1."""

    unaware: Measures
    aware: Measures


def summarise(traces: Sequence[Trace]) -> Latency:
    """The figures of some utterances."""
    spoken = [trace for trace in traces if trace.words and trace.reference]
    retracted = sum(trace.retracted for trace in traces)
    return Latency(
        utterances=len(traces),
        without_words=len(traces) - len(spoken),
        errors=wer.total(wer.count_errors(wer.align(t.reference, t.words)) for t in traces),
        unaligned=sum(trace.ends_ms.count(None) for trace in traces),
        retracted=retracted,
        retracted_share=retracted / max(sum(len(trace.words) for trace in traces), 1),
        unaware=_measures([(trace, trace.read_ms) for trace in spoken]),
        aware=_measures([(trace, trace.elapsed_ms) for trace in spoken]),
    )


def _measures(timed: Sequence[tuple[Trace, Sequence[float]]]) -> Measures:
    delays = [(len(trace.reference), word_delays(trace, delays_ms)) for trace, delays_ms in timed]
    return Measures(
        al=_mean([average_lagging(*x) for x in timed]),
        laal=_mean([length_adaptive_average_lagging(*x) for x in timed]),
        dal=_mean([differentiable_average_lagging(*x) for x in timed]),
        first_word=_percentiles([found[0] for _, found in delays if 0 in found]),
        word=_percentiles([ms for _, found in delays for ms in found.values()]),
        last_word=_percentiles([found[num - 1] for num, found in delays if num - 1 in found]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _percentiles(values: Sequence[float]) -> Delays:
    if not values:
        return Delays(0, None, None, None)
    p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
    return Delays(len(values), p50, p95, p99)
