"""Search with a decoder that attends to one chunk at a time (arXiv:2309.08436; asr/model/chunked.py).

In each step a hypothesis gets one symbol: a label, or EOC, which closes the chunk. All hypotheses close chunk
k before any of them enters chunk k + 1. Within a chunk, hypotheses compete that have the same number of
symbols since its beginning; at its end, all that have closed it. (Published searches let hypotheses with the
same number of symbols compete wherever they are. The farthest one would then have to wait for its chunk, and
so would all others, which must be compared with it: a word would be late by as many chunks as the hypotheses
are apart.) So chunk k is searched once, as soon as its window is complete or the utterance has ended, and the
result does not depend on how the frames arrive.

The score is the log-probability of labels and EOCs, without length normalisation. Hypotheses with the same
labels at the end of a chunk are merged (`SearchConfig.recombine`) and continue from the state of the most
probable one. The number of labels per chunk is limited, because a decoder may loop in silence; at the limit
only EOC may follow. Before that, a hypothesis chooses among its few most likely symbols, and if EOC is not
one of them, it does not close the chunk there.

EOC is not a label: it is not in `Hypothesis.tokens`. A language model would score and read labels only, keep
its state at an EOC, and add its end of sentence at the last one.

Tokens get their frames from the best CTC alignment of the labels of a chunk to the frames of its step.

B hypotheses · k likeliest symbols · V units · T frames
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr.decode.align import locate
from asr.decode.config import SearchConfig
from asr.decode.scorer import BLANK, Floats, Hypothesis, Scorer, Step, Window

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class _Path:
    """One hypothesis, and the decoder state to continue it from."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    """Of each token, by the decoder."""
    frames: tuple[int, ...]
    """Frames of the tokens of all closed chunks."""
    score: float
    last: int
    """The decoder's next input."""
    state: Any
    """Of several hypotheses, before that input; None if there has been no input yet."""
    row: int

    def hypothesis(self) -> Hypothesis:
        frames, confidence = self.frames, tuple(np.exp(self.log_probs).tolist())
        return Hypothesis(self.tokens, self.score, {"attention": self.score}, frames, confidence)


_Closed = dict[tuple[int, ...], list[_Path]]
"""Hypotheses that have closed a chunk, by their tokens."""


class ChunkedSearch:
    """The OnlineSearch of one utterance. Its text covers the chunks whose windows are complete."""

    def __init__(self, scorer: Scorer, config: SearchConfig) -> None:
        assert scorer.chunking
        self._scorer = scorer
        self._config = config
        self._chunking = scorer.chunking
        self._max_labels = config.max_labels_per_chunk or self._chunking.step
        self._paths = [_Path((), (), (), 0.0, scorer.sos_eos, None, 0)]
        self._num_chunks = 0
        self._num_frames = 0
        self._memory: Any = None
        self._ctc: list[Floats] = []
        """CTC log-probabilities from the first frame of the next chunk's step on."""

    def advance(self, memory: Any, log_probs: Floats) -> None:
        self._memory = memory
        self._num_frames += len(log_probs)
        self._ctc.append(log_probs)
        while self._num_chunks * self._chunking.step + self._chunking.window <= self._num_frames:
            self._next_chunk()

    def best(self) -> Hypothesis:
        return self._paths[0].hypothesis()

    def finish(self) -> list[Hypothesis]:
        while self._num_chunks * self._chunking.step < self._num_frames:
            self._next_chunk()
        return [path.hypothesis() for path in self._paths[: self._config.nbest]]

    def _next_chunk(self) -> None:
        """Take all hypotheses from the beginning of a chunk to its EOC."""
        span = self._chunking.span(self._num_chunks, self._num_frames)
        paths, closed = self._paths, _Closed()
        for num_labels in range(self._max_labels + 1):
            paths = self._extend(paths, closed, span, num_labels == self._max_labels)
            if not paths:
                break
        merged = [self._merge(same) for same in closed.values()]
        best = sorted(merged, key=lambda path: -path.score)[: self._config.beam]
        self._paths = self._locate(best)
        self._num_chunks += 1

    def _extend(
        self, paths: Sequence[_Path], closed: _Closed, span: tuple[int, int], is_full: bool
    ) -> list[_Path]:
        """Add a symbol to each hypothesis; `closed` gets those that close the chunk, the best others return.

        is_full: no more labels.
        """
        num, beam, eoc = self._scorer.num_tokens, self._config.beam, self._scorer.sos_eos
        grown: list[tuple[float, _Path, Step, int, int]] = []
        for group, step in self._ask(paths, span, num if is_full else beam + beam // 2 + 2):
            scores = np.array([x.score for x in group])[:, None] + step.log_probs.astype(np.float64)
            for row, column in np.argwhere(step.ids == eoc).tolist():
                path = self._close(group[row], step, row, float(scores[row, column]))
                closed.setdefault(path.tokens, []).append(path)
            if not is_full:
                scores[(step.ids == eoc) | (step.ids == BLANK)] = -np.inf
                best = np.argsort(-scores, axis=None, kind="stable")[:beam].tolist()
                places = [divmod(place, scores.shape[1]) for place in best]
                grown += [(float(scores[b, c]), group[b], step, b, c) for b, c in places]
        grown.sort(key=lambda x: -x[0])
        threshold = self._threshold(closed)
        return [_write(*x) for x in grown[:beam] if x[0] > threshold]

    def _threshold(self, closed: _Closed) -> float:
        """Scores only fall: what is not better than this cannot be among the best at the end of the chunk."""
        scores = sorted((max(path.score for path in same) for same in closed.values()), reverse=True)
        return scores[self._config.beam - 1] if len(scores) >= self._config.beam else -np.inf

    def _ask(
        self, paths: Sequence[_Path], span: tuple[int, int], k: int
    ) -> Iterable[tuple[list[_Path], Step]]:
        """What follows each hypothesis: one call for all with the same number of labels."""
        groups: dict[int, dict[int, list[_Path]]] = {}
        for path in paths:
            groups.setdefault(len(path.tokens), {}).setdefault(id(path.state), []).append(path)
        for of_states in groups.values():
            group = [path for part in of_states.values() for path in part]
            states = [self._select(part) for part in of_states.values()]
            window = Window(*(np.full(len(group), frame, np.int64) for frame in span))
            last = np.array([path.last for path in group], np.int64)
            state = self._scorer.join(states, self._memory)
            yield group, self._scorer.step(state, last, min(k, self._scorer.num_tokens), window)

    def _select(self, paths: Sequence[_Path]) -> Any:
        rows = np.array([path.row for path in paths], np.int64)
        if paths[0].state is None:
            return self._scorer.start(self._memory, rows)
        return self._scorer.select(paths[0].state, rows)

    def _close(self, path: _Path, step: Step, row: int, score: float) -> _Path:
        """The hypothesis after EOC. A decoder that does not read EOC gets its last input again, from the same
        state, for the next chunk."""
        if self._chunking.hears_eoc:
            return replace(path, score=score, last=self._scorer.sos_eos, state=step.state, row=row)
        return replace(path, score=score)

    def _merge(self, paths: Sequence[_Path]) -> _Path:
        """Hypotheses with the same tokens -> the most probable one, with its score or that of all."""
        best = max(paths, key=lambda path: path.score)
        if self._config.recombine == "max":
            return best
        return replace(best, score=float(np.logaddexp.reduce([path.score for path in paths])))

    def _locate(self, paths: Sequence[_Path]) -> list[_Path]:
        """Give the labels of the closed chunk their frames, and drop its CTC log-probabilities."""
        first, step = self._num_chunks * self._chunking.step, self._chunking.step
        ctc = np.concatenate(self._ctc)
        self._ctc = [ctc[step:]]
        known: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
        located = []
        for path in paths:
            labels = path.tokens[len(path.frames) :]
            if labels not in known:
                frames, _ = locate(ctc[:step], labels)
                known[labels] = tuple(first + frame for frame in frames)
            located.append(replace(path, frames=path.frames + known[labels]))
        return located


def _write(score: float, path: _Path, step: Step, row: int, column: int) -> _Path:
    """A hypothesis extended by one label."""
    token = int(step.ids[row, column])
    return replace(
        path,
        tokens=(*path.tokens, token),
        log_probs=(*path.log_probs, float(step.log_probs[row, column])),
        score=score,
        last=token,
        state=step.state,
        row=row,
    )
