"""The CTC probability of all token sequences that begin with a given prefix, for label-synchronous search.

For a hypothesis g, `tokens[t]` and `blanks[t]` are the log-probabilities that the first t frames emit g and
end in its last token, or in a blank. Psi(g c), the total probability of all sequences that begin with g c,
sums over the frame in which c begins:

    Psi(g c) = sum over t of  phi[t] p_t(c),      phi = blanks + tokens, or blanks alone if g ends in c

so that all candidates c of all hypotheses cost one product of phi with p, and only those that the search
keeps need the recursions for their own `tokens` and `blanks`. These are first-order linear recursions, solved
for all frames at once as cumulative sums. Psi(g eos), nothing after g, is tokens[T] + blanks[T]; sum over c
of Psi(g c) + Psi(g eos) = Psi(g).

B hypotheses · K candidates of each · T frames of the longest utterance · V units, blank is 0. All float64,
in nats.

Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asr.decode.scorer import BLANK, Floats, Ints

Doubles = NDArray[np.float64]

# instead of -inf, where log-probabilities are subtracted; its exponential is exactly 0
LOG_ZERO = -1e4


@dataclass(frozen=True)
class PrefixState:
    """Forward log-probabilities of B hypotheses, after 0 to T frames."""

    owner: Ints
    """The utterance of each (B,)."""

    last: Ints
    """The last token of each (B,), blank for an empty one."""

    tokens: Doubles
    """(B, T + 1)"""

    blanks: Doubles
    """(B, T + 1)"""

    def select(self, index: Ints) -> "PrefixState":
        """The hypotheses index (B',), which may repeat, drop and reorder."""
        return PrefixState(self.owner[index], self.last[index], self.tokens[index], self.blanks[index])


class CtcPrefixScorer:
    """Prefix scores of the hypotheses of several utterances."""

    def __init__(self, log_probs: Sequence[Floats]) -> None:
        """log_probs (T_n, V) of each utterance."""
        self.lens = np.array([len(x) for x in log_probs])
        # units first: a candidate's frames are contiguous
        self.log_probs = np.full(
            (len(log_probs), log_probs[0].shape[1], int(self.lens.max())), LOG_ZERO, np.float32
        )
        for n, x in enumerate(log_probs):
            self.log_probs[n, :, : len(x)] = np.maximum(x.T, LOG_ZERO)

    def start(self, owner: Ints) -> PrefixState:
        """Empty hypotheses; hypothesis b belongs to utterance owner[b] (B,)."""
        blank = np.cumsum(self.log_probs[owner, BLANK], 1, np.float64)
        blanks = np.concatenate((np.zeros((len(owner), 1)), blank), 1)
        return PrefixState(owner, np.full(len(owner), BLANK), np.full(blanks.shape, -np.inf), blanks)

    def score(self, state: PrefixState, candidates: Ints) -> Doubles:
        """log Psi(g c) of each hypothesis g with its candidates (B, K); -inf if Psi(g c) is less than
        exp(-700) of Psi(g)."""
        phi = np.logaddexp(state.tokens, state.blanks)[:, :-1]
        top = np.maximum(phi.max(1, keepdims=True, initial=-np.inf), LOG_ZERO)
        emitted = np.exp(self.log_probs[state.owner[:, None], candidates].astype(np.float64))
        sums = (emitted @ np.exp(phi - top)[:, :, None])[:, :, 0]
        row, column = np.nonzero(candidates == state.last[:, None])
        after_blank = np.exp(state.blanks[row, :-1] - top[row])
        sums[row, column] = (emitted[row, column] * after_blank).sum(1)
        sums[candidates == BLANK] = 0.0
        with np.errstate(divide="ignore"):
            return top + np.log(sums)

    def end(self, state: PrefixState) -> Doubles:
        """log Psi(g eos): the log-probability of exactly these tokens (B,)."""
        rows = np.arange(len(state.owner))
        last = self.lens[state.owner]
        return np.logaddexp(state.tokens[rows, last], state.blanks[rows, last])

    def extend(self, state: PrefixState, tokens: Ints) -> PrefixState:
        """The hypotheses with tokens (B,) appended."""
        emitted = self.log_probs[state.owner, tokens].astype(np.float64)
        again = (tokens == state.last)[:, None]
        phi = np.where(again, state.blanks, np.logaddexp(state.tokens, state.blanks))[:, :-1]
        in_token = _recursion(phi + emitted, emitted)
        blank = self.log_probs[state.owner, BLANK].astype(np.float64)
        in_blank = _recursion(in_token[:, :-1] + blank, blank)
        return PrefixState(state.owner, tokens, in_token, in_blank)


def _recursion(enter: Doubles, stay: Doubles) -> Doubles:
    total = np.cumsum(stay, 1)
    sums = np.logaddexp.accumulate(enter - total, axis=1) + total
    return np.concatenate((np.full((len(enter), 1), -np.inf), sums), 1)
