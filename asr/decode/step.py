"""What the decoder says next, as a search wants to hear it.

A temperature above 1 makes a decoder less sure of itself, so that hypotheses differ later; one that was
trained on short texts is heard to end earlier where sos/eos costs less. Both are as in FireRedASR-AED
(arXiv:2501.14350), where they are called softmax smoothing and eos penalty.

B hypotheses · V units · k best continuations of each
"""

from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.scorer import Ints, Scorer, Step


def step(scorer: Scorer, state: Any, tokens: Ints, k: int, config: SearchConfig) -> Step:
    """As Scorer.step, at `config.temperature`, with `config.eos_scale`. With either, all V units are asked
    for, since sos/eos may then be among the k best where it was not."""
    if config.temperature == 1.0 and config.eos_scale == 1.0:
        return scorer.step(state, tokens, k)
    ids, log_probs, attention, state = scorer.step(state, tokens, scorer.num_tokens)
    values = log_probs.astype(np.float64) / config.temperature
    values -= np.logaddexp.reduce(values, axis=1, keepdims=True)
    values = np.where(ids == scorer.sos_eos, values * config.eos_scale, values)
    best = np.argsort(-values, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(values, best, axis=1)
    return Step(np.take_along_axis(ids, best, axis=1), values.astype(np.float32), attention, state)
