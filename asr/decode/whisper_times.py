"""When Whisper's tokens are spoken, from its cross-attention heads or from the timestamps it writes.

The attention weights of the alignment heads are normalised over the tokens, smoothed along time, and
averaged; the best path through them gives every token its frames (dynamic time warping; Giorgino, 2009).

H heads · U tokens · T encoder frames
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asr.decode.scorer import Floats, Ints

Doubles = NDArray[np.float64]


def token_starts(attention: Floats, num_frames: int, first: int = 0, width: int = 7) -> Ints:
    """The first frame of each token from `first` on, (U - first,), from the attention of some heads when they
    predicted each token, (H, U, T). Only the first num_frames count: the rest is padding. Tokens before
    `first` only help to normalise a head. width: of the median filter along time, an odd number."""
    weights = np.asarray(attention[..., :num_frames], np.float64)
    weights = weights / weights.sum(-1, keepdims=True)
    spread = weights.std(1, keepdims=True)
    weights = (weights - weights.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    tokens, frames = warp(-median_filter(weights, width).mean(0)[first:])
    return frames[np.diff(tokens, prepend=-1) > 0]


def median_filter(x: NDArray, width: int) -> NDArray:
    """The median over `width` neighbours, an odd number, along the last axis, which is mirrored at its ends;
    an axis no longer than half of `width` is left unchanged."""
    sides = width // 2
    if x.shape[-1] <= sides:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(sides, sides)], mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1), axis=-1)


def warp(cost: NDArray) -> tuple[Ints, Ints]:
    """The path of lowest total cost through cost (U, T), from corner to corner, one step along either axis or
    both at a time: its indices on both axes."""
    total = np.full((cost.shape[0] + 1, cost.shape[1] + 1), np.inf)
    total[0, 0] = 0
    move = np.zeros(total.shape, np.int64)
    for k in range(sum(cost.shape) - 1):  # cells (i, k - i) depend only on cells of smaller k
        i = np.arange(max(0, k - cost.shape[1] + 1), min(k + 1, cost.shape[0]))
        j = k - i
        both, down, along = total[i, j], total[i, j + 1], total[i + 1, j]
        # ties go along time
        is_both = (both < down) & (both < along)
        move[i + 1, j + 1] = np.where(is_both, 0, np.where((down < both) & (down < along), 1, 2))
        least = np.where(is_both, both, np.where(move[i + 1, j + 1] == 1, down, along))
        total[i + 1, j + 1] = cost[i, j] + least
    move[0, :], move[:, 0] = 2, 1
    path = []
    i, j = cost.shape
    while i or j:
        path.append((i - 1, j - 1))
        i, j = i - (move[i, j] != 2), j - (move[i, j] != 1)
    tokens, frames = np.array(path[::-1], np.int64).reshape(-1, 2).T
    return tokens, frames


class Stretch(NamedTuple):
    """A stretch of text between two timestamps of the model, in frames of its window."""

    start: int
    end: int
    tokens: tuple[int, ...]
    """Without timestamps."""


def cut(tokens: Sequence[int], first_time: int, window: int) -> tuple[list[Stretch], int]:
    """The tokens of a window of `window` frames -> its stretches of text, and how many frames to advance in a
    longer recording: to the start of a stretch that the window cuts off, or to the end of the window.

    first_time: the unit of time 0; each unit after it is one frame later.
    """
    times = [x >= first_time for x in tokens]
    ends = [i for i in range(1, len(tokens)) if times[i - 1] and times[i]]
    is_whole = times[-2:] == [False, True]
    if not ends:
        said = [x - first_time for x, is_time in zip(tokens, times, strict=True) if is_time]
        end = said[-1] if said and said[-1] else window
        return [Stretch(0, end, _text(tokens, first_time))], window
    if is_whole:
        ends.append(len(tokens))
    parts = [tokens[i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True)]
    stretches = [Stretch(x[0] - first_time, x[-1] - first_time, _text(x, first_time)) for x in parts]
    return stretches, window if is_whole else stretches[-1].end


def _text(tokens: Sequence[int], first_time: int) -> tuple[int, ...]:
    return tuple(x for x in tokens if x < first_time)
