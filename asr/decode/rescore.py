"""Two passes: the decoder rescores the hypotheses of the CTC prefix beam search, all in one call, in which
what they have in common is computed once (trie.py).

Teacher forcing needs no search, so the cost is one pass of the decoder, whatever the length; and the answer
is one that CTC found plausible, so the decoder cannot run away. Zhang et al., arXiv:2012.05481. A second,
right-to-left decoder also takes what follows a token into account (U2++, arXiv:2106.05642).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.prompt import prompt_ids
from asr.decode.scorer import Floats, Hypothesis, Scorer


def rescore(
    scorer: Scorer, memory: Any, nbests: Sequence[Sequence[Hypothesis]], config: SearchConfig
) -> list[list[Hypothesis]]:
    """Rescore the hypotheses of each utterance of `memory`, which have a part "ctc", and sort them by the
    blended score. One without tokens is scored like the others, by its eos.
    """
    owner = np.array([n for n, nbest in enumerate(nbests) for _ in nbest], np.int64)
    hypotheses = [x for nbest in nbests for x in nbest]
    answers: list[list[Hypothesis]] = [[] for _ in nbests]
    if hypotheses:
        tokens = [x.tokens for x in hypotheses]
        scores = scorer.score(memory, owner, tokens, prompt=prompt_ids(config))
        if scorer.has_reverse and config.reverse_weight:
            mirror, share = scorer.score(memory, owner, tokens, reverse=True), config.reverse_weight
            scores = [(1 - share) * a + share * b for a, b in zip(scores, mirror, strict=True)]
        for n, hypothesis, log_probs in zip(owner, hypotheses, scores, strict=True):
            answers[n].append(_rescored(hypothesis, log_probs, config))
    return [sorted(x, key=lambda hypothesis: -hypothesis.score) for x in answers]


def _rescored(hypothesis: Hypothesis, log_probs: Floats, config: SearchConfig) -> Hypothesis:
    """log_probs (U + 1,): decoder log-probabilities of the tokens and of eos."""
    parts = {**hypothesis.parts, "attention": float(log_probs.sum(dtype=np.float64))}
    score = config.blend(np.array(parts["attention"]), np.array(parts["ctc"]))
    confidence = np.exp(
        config.blend(log_probs[:-1].astype(np.float64), np.log(np.maximum(hypothesis.confidence, 1e-300)))
    )
    return replace(hypothesis, score=float(score), parts=parts, confidence=tuple(confidence.tolist()))
