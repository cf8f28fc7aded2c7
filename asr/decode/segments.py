"""Shared by the searches of segmental.py: hypotheses whose last segment is closed, and their next segment.

A hypothesis that is closed at frame t' is extended by the segment (t', t] for every end t that is likely
enough, with the decoder's best tokens. Candidates only get a score; the states of those that survive are
recomputed, because keeping the states of all would take many times the memory.

Frames are counted from 1 where they end a segment · R segments to be scored · k tokens considered of each ·
M longest segment that is heard as a whole
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from asr.decode.config import SearchConfig
from asr.decode.ctc import ROOT_HASH, extend_hash
from asr.decode.scorer import Hypothesis, Ints, Scorer, Step, Window

Doubles = NDArray[np.float64]

ROWS = 64
"""Segments scored in one decoder call: bounds the memory of the frames that they attend to."""


class Node(NamedTuple):
    """The last token of a hypothesis, and those before it."""

    before: "Node | None"
    token: int
    frame: int
    """The last frame of its segment, counted from 0."""

    log_prob: float
    length: float
    """Log-probability of the length of its segment."""


@dataclass(eq=False, slots=True)
class Batch:
    """The decoder state of some hypotheses with the same number of tokens."""

    state: Any
    num_tokens: int


@dataclass(eq=False, slots=True)
class Closed:
    """A hypothesis whose last segment is closed."""

    score: float
    key: int
    """The hash of its tokens."""

    node: Node | None
    label: int
    """The last token, which the decoder has not read yet; sos/eos if there is none."""

    start: int
    """The frame where its last segment ends: the next one begins after it."""

    batch: Batch
    row: int
    """Its row in the batch."""

    waited: Doubles = field(default_factory=lambda: np.zeros(1))
    """Log-probability that no segment ended in the first 0, 1, 2, ... frames after `start`."""

    is_dropped: bool = False

    @property
    def until(self) -> int:
        """The last frame considered so far."""
        return self.start + len(self.waited) - 1


@dataclass(frozen=True, slots=True)
class Candidates:
    """Segments, and their candidate tokens."""

    parents: list[Closed]
    """(R)"""
    ends: Ints
    """(R,)"""
    lengths: Doubles
    """Log-probability of each by the neural length model (R,), 0 with another model."""
    ids: Ints
    """(R, k)"""
    log_probs: Doubles
    """(R, k)"""

    def take(self, rows: Ints) -> Self:
        parents = [self.parents[r] for r in rows.tolist()]
        return type(self)(parents, self.ends[rows], self.lengths[rows], self.ids[rows], self.log_probs[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        arrays = ((x.ends, x.lengths, x.ids, x.log_probs) for x in parts)
        return cls([h for x in parts for h in x.parents], *map(np.concatenate, zip(*arrays, strict=True)))


class Ending(NamedTuple):
    """A hypothesis that reached the last frame."""

    score: float
    key: int
    node: Node


class Segments:
    """Extends hypotheses by segments."""

    def __init__(self, scorer: Scorer, config: SearchConfig) -> None:
        self.config = config
        self._scorer = scorer
        self._log_lengths = scorer.log_lengths().astype(np.float64)
        self._num_labels = min(config.beam + 1, scorer.num_tokens)  # one of them may be sos/eos

    @property
    def max_frames(self) -> int:
        """M."""
        return self._log_lengths.shape[1]

    def begin(self, memory: Any) -> Closed:
        """The hypothesis without tokens."""
        state = self._scorer.start(memory, np.zeros(1, np.int64))
        return Closed(0.0, ROOT_HASH, None, self._scorer.sos_eos, 0, Batch(state, 0), 0)

    def hear(self, hypotheses: Sequence[Closed], memory: Any) -> None:
        """Point the hypotheses to a memory with more frames, so that the old one can be freed."""
        for batch in dict.fromkeys(h.batch for h in hypotheses):
            batch.state = self._scorer.join([batch.state], memory)

    def extend(self, memory: Any, hypotheses: Sequence[Closed], last: int) -> Candidates:
        """Their segments that end after the frames considered so far, up to `last`, if likely enough."""
        hypotheses = [h for h in hypotheses if h.until < last]
        counts = np.array([last - h.until for h in hypotheses], np.int64)
        owner = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        ends = last + 1 - counts[owner] + np.arange(len(owner)) - first[owner]
        durations = ends - np.array([h.start for h in hypotheses], np.int64)[owner]
        ending, waiting = self._hazards(memory, hypotheses, owner, ends - 1, durations)
        rows = np.flatnonzero(self._likely(ending, durations))
        lengths = ending
        for h, start, count in zip(hypotheses, first.tolist(), counts.tolist(), strict=True):
            more = slice(start, start + count)
            waited = np.cumsum(np.append(h.waited[-1], waiting[more]))
            lengths[more] += waited[:-1]
            h.waited = np.append(h.waited, waited[1:])
        parents = [hypotheses[n] for n in owner[rows].tolist()]
        ids, log_probs = self._label(memory, parents, ends[rows], self._num_labels)
        log_probs[ids == self._scorer.sos_eos] = -np.inf
        return Candidates(parents, ends[rows], lengths[rows], ids, log_probs)

    def close(self, memory: Any, found: Candidates) -> list[Closed]:
        """The best `beam` candidates, best first. Equal texts that end at the same frame are merged."""
        k = found.ids.shape[1]
        durations = found.ends - np.array([h.start for h in found.parents], np.int64)
        lengths = self._length_terms(found.lengths, durations, found.ids)
        scores = _column([h.score for h in found.parents], np.float64) + found.log_probs
        scores += self.config.length_scale * lengths
        keys = extend_hash(_column([h.key for h in found.parents], np.int64), found.ids)
        places = extend_hash(keys, found.ends[:, None])
        chosen, totals = self.recombine(places.ravel(), scores.ravel(), self.config.beam)
        rows, columns = chosen // k, chosen % k
        states = self._states(memory, found, rows)
        closed = []
        for row, column, total in zip(rows.tolist(), columns.tolist(), totals.tolist(), strict=True):
            token, end = int(found.ids[row, column]), int(found.ends[row])
            terms = float(found.log_probs[row, column]), float(lengths[row, column])
            node = Node(found.parents[row].node, token, end - 1, *terms)
            closed.append(Closed(total, int(keys[row, column]), node, token, end, *states[row]))
        return closed

    def conclude(self, memory: Any, hypotheses: Sequence[Closed], num_frames: int) -> list[Ending]:
        """Close the hypotheses at the last frame, by a token or by sos/eos: the best, best first."""
        waited = np.array([h.waited[num_frames - 1 - h.start] for h in hypotheses])
        likely = waited >= min(_log(self.config.min_emit), waited.max())
        parents, waited = list(itertools.compress(hypotheses, likely)), waited[likely]
        ends = np.full(len(parents), num_frames)
        ids, log_probs = self._label(memory, parents, ends, self._scorer.num_tokens)
        is_eos = ids == self._scorer.sos_eos
        with np.errstate(divide="ignore"):
            log_probs += np.where(is_eos, 0.0, np.log(-np.expm1(log_probs[is_eos]))[:, None])
        count = max(self.config.beam, self.config.nbest)
        log_probs[:, count + 1 :][~is_eos[:, count + 1 :]] = -np.inf
        lengths = self._length_terms(waited, ends - np.array([h.start for h in parents]), ids)
        scores = _column([h.score for h in parents], np.float64) + log_probs
        scores += self.config.length_scale * lengths
        keys = _column([h.key for h in parents], np.int64)
        keys = np.where(is_eos, keys, extend_hash(keys, ids))
        chosen, totals = self.recombine(keys.ravel(), scores.ravel(), count)
        endings = []
        for place, total in zip(chosen.tolist(), totals.tolist(), strict=True):
            row, column = divmod(place, ids.shape[1])
            terms = float(log_probs[row, column]), float(lengths[row, column])
            node = Node(parents[row].node, int(ids[row, column]), num_frames - 1, *terms)
            endings.append(Ending(total, int(keys[row, column]), node))
        return endings

    def recombine(self, keys: Ints, scores: Doubles, count: int) -> tuple[Ints, Doubles]:
        """Merge scores (R,) with equal keys (R,): the index of the best one per key, and its score or that of
        all of them together; the `count` best, best first."""
        order = np.flatnonzero(scores > -np.inf)
        order = order[np.lexsort((-scores[order], keys[order]))]
        if not len(order):
            return order, scores[order]
        same = keys[order]
        first = np.flatnonzero(np.append(True, same[1:] != same[:-1]))
        best = order[first]
        together = self.config.recombine == "sum"
        totals = np.logaddexp.reduceat(scores[order], first) if together else scores[best]
        top = np.argsort(-totals, kind="stable")[:count]
        return best[top], totals[top]

    def hypothesis(self, node: Node | None, score: float) -> Hypothesis:
        """The answer that ends in a node."""
        nodes: list[Node] = []
        while node is not None:
            nodes.append(node)
            node = node.before
        nodes.reverse()
        parts = {"attention": sum(x.log_prob for x in nodes), "length": sum(x.length for x in nodes)}
        said = [x for x in nodes if x.token != self._scorer.sos_eos]
        return Hypothesis(
            tuple(x.token for x in said),
            score,
            parts,
            tuple(x.frame for x in said),
            tuple(np.exp([x.log_prob for x in said]).tolist()),
        )

    def _hazards(
        self, memory: Any, hypotheses: Sequence[Closed], owner: Ints, frames: Ints, durations: Ints
    ) -> tuple[Doubles, Doubles]:
        """Log-probabilities that segments that have lasted until a frame end there, and that they go on."""
        if self.config.length_model != "neural" or not len(owner):
            return np.zeros(len(owner)), np.zeros(len(owner))
        labels = np.array([h.label for h in hypotheses], np.int64)[owner]
        log_odds = self._scorer.emit(memory, frames, labels, durations).astype(np.float64)
        return -np.logaddexp(0.0, -log_odds), -np.logaddexp(0.0, log_odds)

    def _likely(self, ending: Doubles, durations: Ints) -> NDArray[np.bool_]:
        """Which segments (R,) are worth trying. However long one has lasted, it may end where that is likely
        now: otherwise a search would fall silent for good after a pause, or after a missed end."""
        if self.config.length_model == "static":
            ending = self._log_lengths.max(0)[np.minimum(durations, self.max_frames) - 1]
        return ending >= _log(self.config.min_emit)

    def _length_terms(self, lengths: Doubles, durations: Ints, ids: Ints) -> Doubles:
        """Log-probabilities of the lengths of segments with the tokens ids (R, k)."""
        if self.config.length_model == "static":
            return self._log_lengths[ids, np.minimum(durations, self.max_frames)[:, None] - 1]
        return np.broadcast_to(lengths[:, None], ids.shape)

    def _label(self, memory: Any, parents: Sequence[Closed], ends: Ints, count: int) -> tuple[Ints, Doubles]:
        """The `count` most likely tokens of segments, and their log-probabilities (R, count)."""
        ids = np.zeros((len(parents), count), np.int64)
        log_probs = np.zeros(ids.shape)
        for rows, step in self._steps(memory, parents, ends, count):
            ids[rows], log_probs[rows] = step.ids, step.log_probs
        return ids, log_probs

    def _states(self, memory: Any, found: Candidates, rows: Ints) -> dict[int, tuple[Batch, int]]:
        """Row of a candidate -> the decoder state after it, and its row there."""
        needed = np.unique(rows)
        parents = [found.parents[r] for r in needed.tolist()]
        states: dict[int, tuple[Batch, int]] = {}
        for part, step in self._steps(memory, parents, found.ends[needed], 1):
            batch = Batch(step.state, parents[part[0]].batch.num_tokens + 1)
            states |= {int(needed[n]): (batch, row) for row, n in enumerate(part)}
        return states

    def _steps(
        self, memory: Any, parents: Sequence[Closed], ends: Ints, count: int
    ) -> Iterator[tuple[list[int], Step]]:
        """The decoder's steps over segments (parent, end), batched by number of tokens: the segments of each
        batch, and the step."""
        order = sorted(range(len(parents)), key=lambda r: parents[r].batch.num_tokens)
        for _, same in itertools.groupby(order, key=lambda r: parents[r].batch.num_tokens):
            while rows := list(itertools.islice(same, ROWS)):
                part = [parents[r] for r in rows]
                runs = [(x, [h.row for h in run]) for x, run in itertools.groupby(part, lambda h: h.batch)]
                states = [self._scorer.select(x.state, np.array(places)) for x, places in runs]
                starts = np.array([h.start for h in part])
                window = Window(np.maximum(starts, ends[rows] - self.max_frames), ends[rows])
                labels = np.array([h.label for h in part])
                state = self._scorer.join(states, memory)
                yield rows, self._scorer.step(state, labels, count, window)


def _column(values: Sequence[float], kind: type) -> NDArray[Any]:
    return np.array(values, kind)[:, None]


def _log(probability: float) -> float:
    return float(np.log(probability)) if probability else -np.inf
