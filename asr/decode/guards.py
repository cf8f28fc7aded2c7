"""Bounds from the CTC branch that keep a label-synchronous decoder from running away.

A label-synchronous decoder can skip, loop, or never end, above all on audio longer than it was trained on.
CTC cannot: it emits what it hears, when it hears it. So its best path limits how long an answer may be, and
which phrases may be repeated. In a model without CTC, an answer has at most as many tokens as there are
encoder frames, and no phrase may be repeated more often than the options allow.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asr.decode.config import SearchConfig
from asr.decode.scorer import Ints

LENGTH, REPETITION = "length", "repetition"


def max_tokens(num_ctc_tokens: int | None, num_frames: int, config: SearchConfig) -> int:
    """The most tokens the decoder may write if the CTC best path has `num_ctc_tokens`; None: no CTC."""
    if num_ctc_tokens is None:
        return config.most_tokens(num_frames)
    by_ctc = math.ceil(config.length_factor * num_ctc_tokens) + config.length_margin
    return min(config.most_tokens(num_frames), by_ctc)


def repeats(tokens: Ints, allowed: Sequence[Sequence[int]], config: SearchConfig) -> NDArray[np.bool_]:
    """Which hypotheses (B, U) end in a phrase repeated more than `max_repeats` times in a row.

    allowed: for each hypothesis the tokens of the CTC best path; a run that also occurs there is accepted.
    """
    times = config.max_repeats + 1
    found = np.zeros(len(tokens), bool)
    for size in range(1, min(config.max_phrase, tokens.shape[1] // times) + 1):
        runs = tokens[:, -size * times :].reshape(len(tokens), times, size)
        for b in np.flatnonzero((runs == runs[:, :1]).all((1, 2)) & ~found).tolist():
            found[b] = not _contains(allowed[b], runs[b].ravel().tolist())
    return found


def _contains(tokens: Sequence[int], run: Sequence[int]) -> bool:
    """Whether `run` is a contiguous part of `tokens`."""
    return any(list(tokens[i : i + len(run)]) == run for i in range(len(tokens) - len(run) + 1))
