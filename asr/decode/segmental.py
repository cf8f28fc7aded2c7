"""Searches of a segmental decoder (asr/model/segmental.py): which tokens, and where their segments end.

The last segment of a hypothesis closes at some frame; from there on a new one is open. An open segment has
not yet paid for its token, so hypotheses should only be compared if they are closed at the same frame.

    segmental          at each frame t, hypotheses that were closed before are extended to t, and only those
                       closed at t compete. Each is extended for M frames, the longest segment that is
                       attended to as a whole; those that wait longer, in silence, compete with each other.
    segmental-simple   at each frame, hypotheses that go on and those that end a segment all compete.
    segmental-label    all hypotheses with the same number of tokens compete; for whole utterances.

With a wide beam all three find the best text. A search only knows that a frame is not the last one when the
next arrives, so it is one frame late.

"Monotonic segmental attention for automatic speech recognition", arXiv:2210.14742.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.scorer import Floats, Hypothesis, Scorer
from asr.decode.segments import Candidates, Closed, Ending, Segments

ROUNDING = 12.0
"""A score that is worse than another by this many nats adds nothing that matters to it."""


class SegmentalSearch:
    """The time-synchronous searches. shelter: frames for which a hypothesis need not compete after it is
    closed; None for M."""

    def __init__(self, scorer: Scorer, config: SearchConfig, shelter: int | None = None) -> None:
        self._segments = Segments(scorer, config)
        self._config = config
        self._shelter = self._segments.max_frames if shelter is None else shelter
        self._memory: Any = None
        self._num_frames = 0
        self._time = 0
        self._pool: list[Closed] = []
        self._found: dict[int, list[Candidates]] = {}

    def advance(self, memory: Any, log_probs: Floats) -> None:
        if not len(log_probs):
            return
        self._memory = memory
        self._num_frames += len(log_probs)
        if self._pool:
            self._segments.hear(self._pool, memory)
        else:
            self._pool = [self._segments.begin(memory)]
        while self._time < self._num_frames - 1:
            self._next_frame()

    def best(self) -> Hypothesis:
        """The most probable of all hypotheses; it lags behind by the segment that is still open."""
        if not self._pool:
            return Hypothesis((), 0.0)
        best = max(self._pool, key=self._score)
        return self._segments.hypothesis(best.node, self._score(best))

    def finish(self) -> list[Hypothesis]:
        if not self._pool:
            return [Hypothesis((), 0.0)]
        endings = self._segments.conclude(self._memory, self._pool, self._num_frames)
        return answers(self._segments, endings)

    def _next_frame(self) -> None:
        self._time += 1
        self._look_ahead()
        found = [self._alive(x) for x in self._found.pop(self._time, [])]
        if any(x.parents for x in found):
            self._pool += self._segments.close(self._memory, Candidates.concatenate(found))
        self._drop()

    def _look_ahead(self) -> None:
        """Score segments up to as many frames as have arrived, in few calls of many rows."""
        behind = [h for h in self._pool if h.until < self._time]
        last = min(self._time + max(self._shelter, 1), self._num_frames) - 1
        found = self._segments.extend(self._memory, behind, last)
        for end in np.unique(found.ends).tolist():
            self._found.setdefault(end, []).append(found.take(np.flatnonzero(found.ends == end)))

    def _alive(self, found: Candidates) -> Candidates:
        return found.take(np.flatnonzero([not h.is_dropped for h in found.parents]))

    def _drop(self) -> None:
        """Keep the best `beam` of the hypotheses without shelter."""
        competing = [h for h in self._pool if h.start <= self._time - self._shelter]
        competing.sort(key=self._score, reverse=True)
        for h in competing[self._config.beam :]:
            h.is_dropped = True
        self._pool = [h for h in self._pool if not h.is_dropped]

    def _score(self, hypothesis: Closed) -> float:
        """The score of a hypothesis, including the wait since it was closed."""
        waited = float(hypothesis.waited[self._time - hypothesis.start])
        return hypothesis.score + self._config.length_scale * waited


def segmental(scorer: Scorer, config: SearchConfig) -> SegmentalSearch:
    """Hypotheses compete with those closed at the same frame."""
    return SegmentalSearch(scorer, config)


def segmental_simple(scorer: Scorer, config: SearchConfig) -> SegmentalSearch:
    """Hypotheses compete whether closed or open."""
    return SegmentalSearch(scorer, config, shelter=0)


def label_synchronous(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Hypotheses compete with those of the same length in tokens; an utterance is done when those that have
    ended beat all that still grow. log_probs (T_n, V) of each utterance of `memory`."""
    nbests = []
    for n, num_frames in enumerate(map(len, log_probs)):
        one = scorer.view(memory, n, num_frames)
        nbests.append(_by_label(scorer, one, num_frames, config) if num_frames else [Hypothesis((), 0.0)])
    return nbests


def _by_label(scorer: Scorer, memory: Any, num_frames: int, config: SearchConfig) -> list[Hypothesis]:
    segments = Segments(scorer, config)
    growing, endings = [segments.begin(memory)], list[Ending]()
    while growing:
        found = segments.extend(memory, growing, num_frames - 1)
        endings += segments.conclude(memory, growing, num_frames)
        growing = segments.close(memory, found) if found.parents else []
        ended = sorted((x.score for x in endings), reverse=True)[: config.nbest]
        if growing and len(ended) == config.nbest and ended[-1] >= _rest(growing, config):
            break
    return answers(segments, endings)


def _rest(growing: Sequence[Closed], config: SearchConfig) -> float:
    """A bound on what growing hypotheses can still reach, or add to the score of another, up to rounding."""
    if config.recombine == "max":
        return growing[0].score
    return float(np.logaddexp.reduce([h.score for h in growing])) + ROUNDING


def answers(segments: Segments, endings: Sequence[Ending]) -> list[Hypothesis]:
    """At most `nbest` different texts, best first."""
    keys = np.array([x.key for x in endings], np.int64)
    scores = np.array([x.score for x in endings])
    chosen, totals = segments.recombine(keys, scores, segments.config.nbest)
    pairs = zip(chosen.tolist(), totals.tolist(), strict=True)
    return [segments.hypothesis(endings[n].node, total) for n, total in pairs]
