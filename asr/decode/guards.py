"""What keeps a decoder that nothing ties to time from running away: bounds that the CTC branch sets.

A label-synchronous decoder can skip, loop, or never end, most of all on audio longer than it was trained
on. CTC cannot: it emits what it hears, when it hears it. So its best path says how long an answer may be,
and whether a phrase may be repeated. In a model without CTC, an answer has as many tokens as there are
encoder frames at most, and no phrase may be repeated more often than options say.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asr.decode.config import SearchConfig
from asr.decode.scorer import Ints

LENGTH, REPETITION = "length", "repetition"


def max_tokens(num_ctc_tokens: int | None, num_frames: int, config: SearchConfig) -> int:
    """The most tokens the decoder may write, where the CTC best path has `num_ctc_tokens`; None: no CTC."""
    if num_ctc_tokens is None:
        return config.most_tokens(num_frames)
    by_ctc = math.ceil(config.length_factor * num_ctc_tokens) + config.length_margin
    return min(config.most_tokens(num_frames), by_ctc)


def repeats(tokens: Ints, allowed: Sequence[Sequence[int]], config: SearchConfig) -> NDArray[np.bool_]:
    """Which hypotheses (B, U) end in a phrase written more often in a row than `max_repeats`.

    allowed: for each hypothesis the tokens of the CTC best path; a run that is found there is no fault.
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
