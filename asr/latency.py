"""Latency of streaming: how far words lag behind an ideal writer, and how long after they are spoken.

Two clocks, both in milliseconds from the start of the audio. `read_ms` is how much audio had been read when a
word was emitted; it is the same on every machine (computation-unaware). `elapsed_ms` is when a real-time
listener sees the word, including computation and any backlog (computation-aware). Each measure uses one or
the other.

    AL     sum over i <= tau of (d_i - (i - 1) S / J), over tau             arXiv:1810.08398
    LAAL   the same with max(I, J) in place of J                            arXiv:2206.05807
    DAL    mean over i of (e_i - (i - 1) S / I), e_i = max(d_i, e_(i-1) + S / I)   arXiv:1906.00048

tau is the first word emitted once all audio has been read, or the last word if there is none. It always
follows the audio read, so that computation can only add to a lag. All words of the hypothesis count, correct,
wrong or inserted; deleted ones count only through J.

S duration of the source in ms · I words of the hypothesis, J of the reference · d_i when word i was written
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asr import wer
from asr.wer import ErrorCount


class Told(NamedTuple):
    """A text that a stream emits: a partial one is replaced by the next, a final one stays."""

    read_ms: float
    elapsed_ms: float
    text: str
    final: bool


@dataclass(frozen=True)
class Trace:
    """The reference and the hypothesis of one utterance, with times."""

    source_ms: float
    words: tuple[str, ...]
    """The hypothesis (I,)."""

    read_ms: tuple[float, ...]
    """Audio read when each word was written for good (I,)."""

    elapsed_ms: tuple[float, ...]
    """The same moments on the clock of a real-time listener (I,)."""

    reference: tuple[str, ...]
    """(J,)."""

    ends_ms: tuple[float | None, ...]
    """Where each word of the reference ends in the audio (J,); None if unknown."""

    retracted: int = 0
    """Words of partial texts that were later retracted."""

    def __post_init__(self) -> None:
        assert len(self.words) == len(self.read_ms) == len(self.elapsed_ms)
        assert len(self.reference) == len(self.ends_ms)


def make_trace(
    told: Iterable[Told], source_ms: float, reference: Sequence[str], ends_ms: Sequence[float | None]
) -> Trace:
    """The trace of all texts that a stream emitted for one utterance; its final texts form the hypothesis.

    A word counts as written at the first text from which on it and all words before it occur in every text up
    to the final one. Words of a partial text beyond the prefix that it shares with the next text are
    retracted (the erasure of arXiv:1912.03393), including incomplete words. So is a partial text at the end
    that no final one follows.
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
    """Groups of texts that each end with a final one; the last group may lack it."""
    texts: list[Told] = []
    for text in told:
        texts.append(text)
        if text.final:
            yield texts
            texts = []
    if texts:
        yield texts


def _num_shared(a: Sequence[str], b: Sequence[str]) -> int:
    """The number of words in the common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


# Lagging. delays_ms (I,) is trace.read_ms or trace.elapsed_ms; neither words nor reference may be empty.


def average_lagging(trace: Trace, delays_ms: Sequence[float]) -> float:
    """AL in ms, arXiv:1810.08398. Superfluous words lower it, even below 0."""
    return _lagging(trace, delays_ms, len(trace.reference))


def length_adaptive_average_lagging(trace: Trace, delays_ms: Sequence[float]) -> float:
    """LAAL in ms, arXiv:2206.05807: AL, but superfluous words do not improve it."""
    return _lagging(trace, delays_ms, max(len(trace.words), len(trace.reference)))


def differentiable_average_lagging(trace: Trace, delays_ms: Sequence[float]) -> float:
    """DAL in ms, arXiv:1906.00048: every word takes its share of time, so a delay is never made up for."""
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
    """The time from the end of a word in the audio until it is written, in ms, by its index in the reference.

    Only for correct words, by the alignment of the error rate, with a known end: insertions, deletions and
    substitutions have no delay. Below 0 if a word is written before its end.
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
    """Percentiles of delays in ms; None if there are no delays."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class Measures:
    """Measures by one of the two clocks, in ms. Lagging is a mean over utterances, None without any."""

    al: float | None
    laal: float | None
    dal: float | None
    first_word: Delays
    """Delays of the first word of each reference, if it was recognised."""

    word: Delays
    last_word: Delays


@dataclass(frozen=True)
class Latency:
    """The figures of all utterances together."""

    utterances: int
    without_words: int
    """Utterances with empty reference or hypothesis. Their errors count; they have no lagging or delays."""

    errors: ErrorCount
    unaligned: int
    """Reference words whose end is unknown."""

    retracted: int
    retracted_share: float
    """Relative to the words of the hypotheses; may exceed 1."""

    unaware: Measures
    aware: Measures


def summarise(traces: Sequence[Trace]) -> Latency:
    """The latency figures of these utterances."""
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
