"""CTC decides when, the attention decoder what: each spike of the CTC best path triggers one token.

The k-th token attends to the frames up to `trigger_frames` after the k-th spike, and waits until these have
arrived; so the text depends on the spikes alone, not on how the frames arrive. There are as many tokens as
spikes. Hypotheses of the beam are ranked by

    score(g) = (1 - w) log p_attention(g) + w sum over k of log p_ctc(g_k, at spike k)

and their common prefix is final.

B hypotheses · U tokens so far · T frames · V units

Moritz et al., "Triggered Attention for End-to-End Speech Recognition", 2019, arXiv:1812.00498, and "Streaming
Automatic Speech Recognition with the Transformer Model", arXiv:2001.02674.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy
from asr.decode.joint import NOTHING, choose
from asr.decode.scorer import BLANK, Floats, Hypothesis, Ints, Scorer, Window

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class _Beam:
    """B hypotheses of one length, best first."""

    tokens: Ints
    """(B, U)"""
    attention: Doubles
    """The decoder's log-probability of each token (B, U)."""
    ctc: Doubles
    """The CTC log-probability of each token at its spike (B, U)."""
    state: Any


class Triggered:
    """The OnlineSearch of one utterance."""

    def __init__(self, scorer: Scorer, config: SearchConfig) -> None:
        self._scorer, self._config = scorer, config
        self._ctc = CtcGreedy()
        self._spikes: list[Floats] = []
        """CTC's log-probabilities (V,) at each spike."""
        self._memory: Any = None
        self._beam: _Beam | None = None

    def advance(self, memory: Any, log_probs: Floats) -> None:
        first = self._ctc.num_frames
        self._memory = memory
        self._ctc.advance(log_probs)
        frames = self._ctc.best().frames
        self._spikes += [log_probs[frame - first] for frame in frames[len(self._spikes) :]]
        arrived = sum(frame + self._config.trigger_frames < self._ctc.num_frames for frame in frames)
        self._write(frames[:arrived])

    def best(self) -> Hypothesis:
        """The common prefix of all hypotheses."""
        if self._beam is None:
            return NOTHING
        same = (self._beam.tokens == self._beam.tokens[0]).all(0)
        return self._hypothesis(0, len(same) if same.all() else int(same.argmin()))

    def finish(self) -> list[Hypothesis]:
        """As OnlineSearch.finish. Spikes still waiting are decoded with what has arrived."""
        frames = self._ctc.best().frames
        self._write(frames)
        if self._beam is None:
            return [NOTHING]
        count = min(self._config.nbest, len(self._beam.tokens))
        return [self._hypothesis(b, len(frames)) for b in range(count)]

    def _hypothesis(self, row: int, length: int) -> Hypothesis:
        assert self._beam is not None
        attention, ctc = self._beam.attention[row, :length], self._beam.ctc[row, :length]
        parts = {"ctc": float(ctc.sum()), "attention": float(attention.sum())}
        score = self._config.blend(attention.sum(), ctc.sum())
        confidence = np.exp(self._config.blend(attention, ctc))
        tokens, frames = self._beam.tokens[row, :length], self._ctc.best().frames[:length]
        return Hypothesis(tuple(tokens.tolist()), float(score), parts, frames, tuple(confidence.tolist()))

    def _write(self, frames: tuple[int, ...]) -> None:
        """Decode the spikes at `frames`, the first of which are already decoded."""
        beam = self._beam
        done = beam.tokens.shape[1] if beam else 0
        if done == len(frames):
            return
        if beam is None:
            state = self._scorer.start(self._memory, np.zeros(1, np.int64))
            beam = _Beam(np.zeros((1, 0), np.int64), np.zeros((1, 0)), np.zeros((1, 0)), state)
        else:
            state = self._scorer.join([beam.state], self._memory)
            beam = _Beam(beam.tokens, beam.attention, beam.ctc, state)
        for frame, spike in zip(frames[done:], self._spikes[done:], strict=False):
            heard = min(frame + self._config.trigger_frames + 1, self._ctc.num_frames)
            beam = self._extend(beam, spike, heard)
        self._beam = beam

    def _extend(self, beam: _Beam, spike: Floats, heard: int) -> _Beam:
        """Add one token from the first `heard` frames; spike (V,): the CTC log-probabilities at its spike."""
        scorer, config, count = self._scorer, self._config, len(beam.tokens)
        last = beam.tokens[:, -1] if beam.tokens.shape[1] else np.full(count, scorer.sos_eos)
        pool = min(scorer.num_tokens, config.beam + config.beam // 2 + 2)
        window = Window(np.zeros(count, np.int64), np.full(count, heard))
        ids, values, _, state = scorer.step(beam.state, last, pool, window)
        ctc = spike[ids].astype(np.float64)
        scores = config.blend(
            beam.attention.sum(1, keepdims=True) + values, beam.ctc.sum(1, keepdims=True) + ctc
        )
        scores[(ids == BLANK) | (ids == scorer.sos_eos)] = -np.inf
        row, column = choose(scores, np.zeros(count, np.int64), config.beam)
        return _Beam(
            np.concatenate((beam.tokens[row], ids[row, column, None]), 1),
            np.concatenate((beam.attention[row], values[row, column, None]), 1),
            np.concatenate((beam.ctc[row], ctc[row, column, None]), 1),
            scorer.select(state, row),
        )
