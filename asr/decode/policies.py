"""Streaming with an ordinary attention decoder: its own attention decides which tokens are safe to emit.

Whenever frames arrive, the joint search (joint.py) extends what is already written by a new hypothesis over
all frames so far. The tokens of the best hypothesis before the first one that the policy does not yet allow
are committed for good. If the units mark where words begin, only whole words are committed, since half a word
is often transcribed differently from the start of the full word. At the end everything is allowed.

A policy looks at the attention of the decoder's guiding heads for a token (asr/train/heads.py chooses them).
Its position among the frames tells how old the audio is that the token is based on:

    AlignAtt  no token whose attention peaks in the last frames
    EDAtt     no token with too large a share of its attention on the last frames

The very last frame is left out: decoders rest their attention there, whatever they write.

A decoder that hears half a word often writes another word, and ends. A model with a word-counting head
(Scorer.fire) can be asked, with `detect_truncation`, whether the audio so far ends with a complete word. If
so, every allowed token is written, whatever seems to come next. If not, the last word of a hypothesis is
never written, even if the hypothesis has ended; nor is a last word followed by silence, until more arrives.

B hypotheses · T encoder frames

Papi et al., "AlignAtt", arXiv:2305.11408, and "Attention as a Guide for Simultaneous Speech Translation",
arXiv:2212.07850; for speech recognition "Simul-Whisper", arXiv:2406.10052.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr.decode.align import locate_prefix
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy
from asr.decode.joint import NOTHING, Finished, Search
from asr.decode.scorer import Floats, Hypothesis, Scorer
from asr.errors import ConfigError

BOUNDARY_FRAMES = 2
"""A word that ends within this many last frames counts as ending with the audio so far."""

Policy = Callable[[Floats, SearchConfig], NDArray[np.bool_]]
"""Attention (B, T) without the last frame -> which hypotheses may write their next token (B,)."""


def outside_margin(attention: Floats, config: SearchConfig) -> NDArray[np.bool_]:
    """AlignAtt: the attention peaks before the last `margin_frames`."""
    return attention.argmax(1) < attention.shape[1] - config.margin_frames


def little_recent(attention: Floats, config: SearchConfig) -> NDArray[np.bool_]:
    """EDAtt: less than `recent_share` of the attention is on the last `recent_frames`."""
    recent = attention[:, -config.recent_frames :].sum(1)
    return recent < config.recent_share * np.maximum(attention.sum(1), np.finfo(np.float32).tiny)


def ends_with_a_word(alpha: Floats) -> bool:
    """Whether the last word counted by the weights alpha (T,) of the audio so far ends in its last frames.

    The weights are scaled to sum to a whole number; word k ends where their running sum passes k - 1/2, the
    middle of its rise from k - 1 to k. (The last k itself is only reached at the very last frame, however
    long ago the word ended.)
    """
    sums = np.cumsum(alpha, dtype=np.float64)
    if not len(sums) or np.rint(sums[-1]) < 1:
        return False
    counts = np.floor(sums * np.rint(sums[-1]) / sums[-1] + 0.5)
    before = counts[-1 - BOUNDARY_FRAMES] if len(counts) > BOUNDARY_FRAMES else 0
    return bool(counts[-1] > before)


def check_detection(scorer: Scorer) -> None:
    """Raise ConfigError if a model cannot tell whether the audio so far ends with a complete word."""
    if not scorer.has_fire:
        raise ConfigError(
            "detect_truncation: this model has no head that counts words; train one with loss.quantity=0.01, "
            "starting from this model with train.init, or leave detect_truncation out"
        )
    if not scorer.word_starts.any():
        raise ConfigError("detect_truncation: the units do not say where words begin; leave it out")


class Guided:
    """The OnlineSearch of one utterance under a policy."""

    def __init__(self, policy: Policy, scorer: Scorer, config: SearchConfig) -> None:
        self._policy, self._scorer, self._config = policy, scorer, config
        self._ctc = CtcGreedy()
        self._memory: Any = None
        self._log_probs: list[Floats] = []
        self._written = self._before = NOTHING
        self._whole: bool | None = None
        """Whether the audio so far ends with a complete word; None unless `detect_truncation`."""
        if config.detect_truncation:
            check_detection(scorer)

    def advance(self, memory: Any, log_probs: Floats) -> None:
        """As OnlineSearch.advance. There is no search before CTC emits its first token."""
        self._memory = memory
        self._log_probs.append(log_probs)
        self._ctc.advance(log_probs)
        if len(log_probs) and self._ctc.best().tokens:
            self._before, self._written = self._written, self._write()

    def best(self) -> Hypothesis:
        return self._written

    def finish(self) -> list[Hypothesis]:
        """As OnlineSearch.finish. What the last frames added is searched again, with its alternatives."""
        if self._memory is None:
            return [self._written]
        answers = self._search(self._before).finish()[0]
        written = self._written.tokens
        if answers[0].tokens[: len(written)] != written:  # a guard stopped the search this time
            answers = self._search(self._written).finish()[0]
        return answers

    def _search(self, written: Hypothesis, allowed_only: bool = False) -> Search:
        whole = [np.concatenate(self._log_probs)]
        allows = self._allows if allowed_only else None
        return Search(self._scorer, whole, self._memory, self._config, written, allows)

    def _allows(self, attention: Floats) -> NDArray[np.bool_]:
        if attention.shape[1] < 2:
            return np.zeros(len(attention), bool)
        return self._policy(attention[:, :-1], self._config)

    def _write(self) -> Hypothesis:
        """The text to commit now: no more than before, or the allowed words of the best hypothesis.

        The search stops as soon as all hypotheses agree on them, mostly at its first step.
        """
        if self._config.detect_truncation:
            self._whole = ends_with_a_word(self._scorer.fire(self._memory))
        search = self._search(self._written, allowed_only=True)
        agreed = False
        while search.live and not agreed:
            search.extend()
            agreed = self._agree(search)
        found = [*search.answers[0].finished, *_growing(search)]
        if search.answers[0].guard or not found:
            return self._written
        best = max(found, key=lambda x: x.score)
        return self._placed(best) if self._cut(best) > len(self._written.tokens) else self._written

    def _agree(self, search: Search) -> bool:
        """Whether all hypotheses, including those that ended, begin with the same allowed words."""
        growing = _growing(search)
        if any(x.free == len(x.tokens) for x in growing):
            return False
        return len({x.tokens[: self._cut(x)] for x in (*search.answers[0].finished, *growing)}) == 1

    def _cut(self, found: Finished) -> int:
        """How many tokens of a hypothesis may be written. One that has ended counts as ending with a complete
        word, unless the audio so far does not."""
        starts, end = self._scorer.word_starts, found.free
        has_ended = end == len(found.tokens)
        if self._whole or not starts.any() or (has_ended and self._whole is None):
            return end
        end -= has_ended
        while end > len(self._written.tokens) and not starts[found.tokens[end]]:
            end -= 1
        return max(end, len(self._written.tokens))

    def _placed(self, found: Finished) -> Hypothesis:
        """The tokens that may be written, with their frames and confidences."""
        end = self._cut(found)
        frames, peaks = locate_prefix(np.concatenate(self._log_probs), found.tokens)
        confidence = np.exp(self._config.blend(found.log_probs[:end], peaks[:end]))
        return Hypothesis(found.tokens[:end], found.score, {}, frames[:end], tuple(confidence.tolist()))


def _growing(search: Search) -> list[Finished]:
    """The growing hypotheses, as if they ended here."""
    if search.live is None:
        return []
    live = search.live
    rows = zip(live.tokens.tolist(), live.log_probs, live.free.tolist(), strict=True)
    return [Finished(-np.inf, tuple(tokens), log_probs, free) for tokens, log_probs, free in rows]


def align_att(scorer: Scorer, config: SearchConfig) -> Guided:
    return Guided(outside_margin, scorer, config)


def ed_att(scorer: Scorer, config: SearchConfig) -> Guided:
    return Guided(little_recent, scorer, config)
