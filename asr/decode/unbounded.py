"""Beam search by the attention decoder without any guards, as used for published results.

A hypothesis that has ended stays in the beam at its score, where it competes with those that grow; blank is
a unit like any other. The search goes on until the whole beam has ended, or for as many tokens as there are
encoder frames (`extra_tokens` and `max_tokens` change that), so an answer may lack an end. A length penalty
applies only at the very end. For comparison (arXiv:2012.05481, section 3.3); in practice use mode attention
(joint.py).

T frames · B hypotheses of one utterance · k candidates of each · U tokens so far
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asr.decode.config import Doubles, SearchConfig
from asr.decode.joint import Finished, hypothesis, listened
from asr.decode.prompt import begin, prompt_ids
from asr.decode.scorer import Floats, Hypothesis, Ints, Scorer
from asr.decode.step import step


def unbounded(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """The decoder's answers; the CTC log_probs (T_n, V), if any, only time the tokens."""
    config = replace(config, ctc_weight=0.0)
    return [_search(scorer, x, memory, n, config) for n, x in enumerate(log_probs)]


def _search(
    scorer: Scorer, frames: Floats, memory: Any, owner: int, config: SearchConfig
) -> list[Hypothesis]:
    if not len(frames):
        return [Hypothesis((), 0.0)]
    width = min(config.beam, scorer.num_tokens)
    at_no_cost = np.where(np.arange(width), -np.inf, 0.0)
    state, first = begin(scorer, memory, np.array([owner]), prompt_ids(config))
    tokens, places = np.full((1, 1), first), np.zeros((1, 0), np.int64)
    log_probs = np.zeros((1, 0))
    ended = np.zeros(1, bool)
    for _ in range(config.most_tokens(len(frames))):
        candidates, values, attention, state = step(scorer, state, tokens[:, -1], width, config)
        candidates = np.where(ended[:, None], scorer.sos_eos, candidates)
        values = np.where(ended[:, None], at_no_cost, values)
        scores = log_probs.sum(1, keepdims=True) + values
        best = np.argsort(-scores, axis=None, kind="stable")[: config.beam]
        row, column = np.unravel_index(best[scores.ravel()[best] > -np.inf], scores.shape)
        tokens = np.concatenate((tokens[row], candidates[row, column, None]), 1)
        log_probs = np.concatenate((log_probs[row], values[row, column, None]), 1)
        places = np.concatenate((places, listened(attention)[:, None]), 1)[row]
        ended = tokens[:, -1] == scorer.sos_eos
        if ended.all():
            break
        state = scorer.select(state, row)
    lens = (tokens[:, 1:] != scorer.sos_eos).sum(1)
    totals = config.penalise(log_probs.sum(1), lens)
    return [
        hypothesis(
            frames, _finished(tokens[b, 1:], places[b], float(totals[b]), log_probs[b], lens[b]), config
        )
        for b in np.argsort(-totals, kind="stable")[: config.nbest]
    ]


def _finished(tokens: Ints, places: Ints, score: float, log_probs: Doubles, num_tokens: int) -> Finished:
    """A hypothesis up to its end; log_probs (U,) include the end and anything after it."""
    kept = tuple(tokens[:num_tokens].tolist())
    return Finished(score, kept, log_probs[: num_tokens + 1], 0, tuple(places[:num_tokens].tolist()))
