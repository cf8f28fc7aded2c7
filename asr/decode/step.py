"""What the decoder says next, as a search wants to hear it.

A temperature above 1 makes a decoder less sure of itself, so that hypotheses differ later; one that was
trained on short texts is heard to end earlier where sos/eos costs less. Both are as in FireRedASR-AED
(arXiv:2501.14350), where they are called softmax smoothing and eos penalty.

B hypotheses · U tokens · V units · k best continuations of each
"""

from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.scorer import Ints, Scorer, Step


def step(scorer: Scorer, state: Any, tokens: Ints, k: int, config: SearchConfig) -> Step:
    """As Scorer.step, at `config.temperature`, with `config.eos_scale`. With either, all V units are asked
    for, since sos/eos may then be among the k best where it was not."""
    if _is_plain(config):
        return scorer.step(state, tokens, k)
    return _smoothed(scorer.step(state, tokens, scorer.num_tokens), scorer.sos_eos, k, config)


def steps(scorer: Scorer, state: Any, tokens: Ints, k: int, config: SearchConfig) -> Step:
    """As Scorer.steps, in the same way."""
    if _is_plain(config):
        return scorer.steps(state, tokens, k)
    return _smoothed(scorer.steps(state, tokens, scorer.num_tokens), scorer.sos_eos, k, config)


def _is_plain(config: SearchConfig) -> bool:
    return config.temperature == 1.0 and config.eos_scale == 1.0


def _smoothed(said: Step, sos_eos: int, k: int, config: SearchConfig) -> Step:
    """said: of all V units, (B, V) or (B, U, V)."""
    values = said.log_probs.astype(np.float64) / config.temperature
    values -= np.logaddexp.reduce(values, axis=-1, keepdims=True)
    values = np.where(said.ids == sos_eos, values * config.eos_scale, values)
    best = np.argsort(-values, axis=-1, kind="stable")[..., :k]
    log_probs = np.take_along_axis(values, best, axis=-1).astype(np.float32)
    return Step(np.take_along_axis(said.ids, best, axis=-1), log_probs, said.attention, said.state)
