"""CTC forced alignment and scoring: when each token of a given sequence is emitted, and its probability.

Both run over the S = 2 U + 1 states blank, token, blank, token, ..., blank, all states of a frame at once.
A state is entered from itself, from the one before, and, skipping a blank, from the token before that if it
differs. The unbounded decoder (unbounded.py) may write blank, which then counts as a token.

T frames · U tokens · V units, blank is 0. Graves et al., "Connectionist Temporal Classification", ICML 2006.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from asr.decode.scorer import BLANK, Floats, Ints

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """The best alignment of U tokens to T frames."""

    path: Ints
    """Symbol of each frame (T,), blank included."""

    start: Ints
    """First frame of each token (U,)."""

    end: Ints
    """The frame after the last frame of each token (U,)."""

    log_probs: Doubles
    """Log-probability of each frame's symbol (T,)."""

    @property
    def score(self) -> float:
        """Log-probability of the path."""
        return float(self.log_probs.sum())

    def peaks(self) -> Doubles:
        """The highest log-probability of each token within its frames (U,)."""
        spans = zip(self.start.tolist(), self.end.tolist(), strict=True)
        return np.array([self.log_probs[start:end].max() for start, end in spans])


def min_frames(tokens: Sequence[int]) -> int:
    """The fewest frames that can emit `tokens`: equal neighbours need a blank between them."""
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def align(log_probs: Floats, tokens: Sequence[int]) -> Alignment | None:
    """The best alignment of `tokens` to log_probs (T, V); None if there are too few frames for them."""
    num_frames = len(log_probs)
    if min_frames(tokens) > num_frames:
        return None
    states, skip = _states(tokens)
    emitted = log_probs[:, states].astype(np.float64)
    back = np.zeros(emitted.shape, np.int64)
    scores = _begin(len(states))
    for t in range(num_frames):
        entries = _entries(scores, skip)
        back[t] = entries.argmax(0)
        scores[2:] = entries.max(0) + emitted[t]
        scores[1] = -np.inf
    visited = np.zeros(num_frames, np.int64)
    # the better of the two final states; without tokens there is only the blank
    state = len(states) - 1 - int(len(states) > 1 and scores[-2] > scores[-1])
    for t in range(num_frames - 1, -1, -1):
        visited[t] = state
        state -= int(back[t, state])
    odd = np.arange(1, len(states), 2)
    start, end = np.searchsorted(visited, odd), np.searchsorted(visited, odd, side="right")
    return Alignment(states[visited], start, end, emitted[np.arange(num_frames), visited])


def ctc_log_prob(log_probs: Floats, tokens: Sequence[int]) -> float:
    """log p(tokens | x), summed over all alignments to log_probs (T, V); -inf if there are too few frames."""
    if min_frames(tokens) > len(log_probs):
        return -np.inf
    states, skip = _states(tokens)
    scores = _begin(len(states))
    for emitted in log_probs[:, states].astype(np.float64):
        scores[2:] = np.logaddexp.reduce(_entries(scores, skip), axis=0) + emitted
        scores[1] = -np.inf
    return float(np.logaddexp(scores[-1], scores[-2]))


def locate(log_probs: Floats, tokens: Sequence[int]) -> tuple[tuple[int, ...], Doubles]:
    """When each token is emitted, and its highest log-probability there.

    If there are fewer frames than `tokens` need, as when a decoder has run away, the tokens are spread evenly
    over the frames, with their log-probabilities there.
    """
    alignment = align(log_probs, tokens)
    if alignment is not None:
        return tuple(alignment.start.tolist()), alignment.peaks()
    frames = np.arange(len(tokens)) * len(log_probs) // len(tokens)
    if not len(log_probs):
        return tuple(frames.tolist()), np.full(len(tokens), -np.inf)
    return tuple(frames.tolist()), log_probs[frames, list(tokens)].astype(np.float64)


def locate_prefix(log_probs: Floats, tokens: Sequence[int]) -> tuple[tuple[int, ...], Doubles]:
    """Like `locate`, if more follows `tokens`: a final wildcard symbol has the best score of every frame."""
    rest = log_probs.max(1, keepdims=True)
    frames, peaks = locate(np.concatenate((log_probs, rest), 1), [*tokens, log_probs.shape[1]])
    return frames[:-1], peaks[:-1]


def _states(tokens: Sequence[int]) -> tuple[Ints, Doubles]:
    """The symbols of the states (S,), and 0 or -inf for each (S,): whether a blank may be skipped into it."""
    states = np.full(2 * len(tokens) + 1, BLANK, np.int64)
    states[1::2] = tokens
    skip = np.full(len(states), -np.inf)
    skip[3::2][states[3::2] != states[1:-2:2]] = 0.0
    skip[1:2] = 0.0  # the first token, from before the first frame
    return states, skip


def _begin(num_states: int) -> Doubles:
    scores = np.full(num_states + 2, -np.inf)
    scores[1] = 0.0
    return scores


def _entries(scores: Doubles, skip: Doubles) -> Doubles:
    return np.stack((scores[2:], scores[1:-1], scores[:-2] + skip))
