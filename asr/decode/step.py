"""Decoder steps with temperature and a scaled eos.

A temperature above 1 flattens the decoder's distribution, so that hypotheses differ later; scaling down the
log-probability of sos/eos lets a decoder that was trained on short texts end earlier. Both are as in
FireRedASR-AED (arXiv:2501.14350), where they are called softmax smoothing and eos penalty.

B hypotheses · U tokens · V units · k best continuations of each
"""

from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.scorer import Ints, Scorer, Step


def step(scorer: Scorer, state: Any, tokens: Ints, k: int, config: SearchConfig) -> Step:
    """Like Scorer.step, with `config.temperature` and `config.eos_scale`. With either, all V units are
    requested, since sos/eos may then enter the k best."""
    if _is_plain(config):
        return scorer.step(state, tokens, k)
    return _smoothed(scorer.step(state, tokens, scorer.num_tokens), scorer.sos_eos, k, config)


def steps(scorer: Scorer, state: Any, tokens: Ints, k: int, config: SearchConfig) -> Step:
    """Like Scorer.steps, in the same way."""
    if _is_plain(config):
        return scorer.steps(state, tokens, k)
    return _smoothed(scorer.steps(state, tokens, scorer.num_tokens), scorer.sos_eos, k, config)


def _is_plain(config: SearchConfig) -> bool:
    return config.temperature == 1.0 and config.eos_scale == 1.0


def _smoothed(said: Step, sos_eos: int, k: int, config: SearchConfig) -> Step:
    """said: for all V units, (B, V) or (B, U, V)."""
    values = said.log_probs.astype(np.float64) / config.temperature
    values -= np.logaddexp.reduce(values, axis=-1, keepdims=True)
    values = np.where(said.ids == sos_eos, values * config.eos_scale, values)
    best = np.argsort(-values, axis=-1, kind="stable")[..., :k]
    log_probs = np.take_along_axis(values, best, axis=-1).astype(np.float32)
    return Step(np.take_along_axis(said.ids, best, axis=-1), log_probs, said.attention, said.state)
