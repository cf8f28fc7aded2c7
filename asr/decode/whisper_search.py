"""Beam search for what Whisper hears in one window, by the rules of whisper.py.

All hypotheses have the same number of tokens. Of each the beam + 1 likeliest continuations are candidates.
Those that end are put aside, as many as beam * patience, and the best of the others grow. The search is over
when that many have ended, or nothing may grow further: then what has not ended is an answer, too, as far as
fewer than `beam` have. The best answer is that with the highest log-probability by length.

B hypotheses · U tokens · V units
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from asr.decode.scorer import Ints, Scorer
from asr.decode.whisper import (
    SOS_EOS,
    Doubles,
    Rules,
    Specials,
    WhisperOptions,
    before_start,
    behind_start,
    log_softmax,
)


@dataclass(frozen=True)
class Answer:
    """What was heard in a window."""

    tokens: tuple[int, ...]
    """Times included, where they were asked for; without the prefix."""

    log_prob: float
    """Of the tokens and, where it has ended, of the end, among what was allowed."""

    language: str | None
    no_speech: float
    """The probability that nobody speaks, in [0, 1]."""

    @property
    def mean_log_prob(self) -> float:
        """Per token, the end included."""
        return self.log_prob / (len(self.tokens) + 1)


def detect_language(scorer: Scorer, memory: Any, utterance: int, specials: Specials) -> dict[str, float]:
    """The probability of each language, by code."""
    state = scorer.start(memory, np.array([utterance]))
    log_probs, _ = _step(scorer, state, np.array([[SOS_EOS]]))
    units = list(specials.languages.values())
    return dict(zip(specials.languages, np.exp(log_softmax(log_probs[0, units])).tolist(), strict=True))


def search_window(
    scorer: Scorer, memory: Any, utterance: int, specials: Specials, options: WhisperOptions, context: int
) -> Answer:
    """The best answer of a decoder of `context` tokens; ConfigError where the language is unknown."""
    language = options.language
    if language == "auto":
        chances = detect_language(scorer, memory, utterance, specials)
        language = max(chances, key=chances.__getitem__)
    before = before_start(specials, options, context)
    behind = behind_start(specials, options, language, context)
    state = scorer.start(memory, np.array([utterance]))
    log_probs, state = _step(scorer, state, np.array([before]))
    no_speech = float(np.exp(log_probs[0, specials.no_speech]))
    if behind:
        log_probs, state = _step(scorer, state, np.array([behind]))
    # the last token of a full context may still be followed by one more
    most = min(options.max_tokens or context // 2, context + 1 - len(before) - len(behind))
    tokens, total = _search(scorer, state, log_probs, Rules(specials, options, scorer.num_tokens), most)
    return Answer(tokens, total, language, no_speech)


def _search(
    scorer: Scorer, state: Any, log_probs: Doubles, rules: Rules, most: int
) -> tuple[tuple[int, ...], float]:
    """Up to `most` tokens, given log_probs (1, V) of the first one, and their log-probability."""
    options = rules.options
    width = options.beam
    enough = round(width * options.patience)
    written, totals = np.zeros((1, 0), np.int64), np.zeros(1)
    ended: dict[tuple[int, ...], float] = {}
    for _ in range(most):
        if written.shape[1]:
            log_probs, state = _step(scorer, state, written[:, -1:])
        scores = totals[:, None] + rules(log_probs, written)
        row, token = _candidates(scores, width + 1 if width > 1 else 1)
        grows = np.flatnonzero(token != SOS_EOS)[:width]
        better = grows[-1] if len(grows) == width else len(token)
        for b in np.flatnonzero(token[:better] == SOS_EOS)[: enough - len(ended)]:
            ended[tuple(written[row[b]].tolist())] = float(scores[row[b], SOS_EOS])
        row, token = row[grows], token[grows]
        written, totals = np.concatenate((written[row], token[:, None]), 1), scores[row, token]
        if len(ended) >= enough or not len(written):
            break
        state = scorer.select(state, row)
    for b in range(min(len(written), width - len(ended))):
        ended[tuple(written[b].tolist())] = float(totals[b])
    best = max(ended, key=lambda tokens: _by_length(ended[tokens], len(tokens), options.length_penalty))
    return best, ended[best]


def _candidates(scores: Doubles, count: int) -> tuple[Ints, Ints]:
    """Row and column of the `count` best scores of each row of (B, V), all of them best first; no -inf."""
    column = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    row = np.repeat(np.arange(len(scores)), column.shape[1])
    column = column.ravel()
    found = scores[row, column]
    order = np.argsort(-found, kind="stable")[: int((found > -np.inf).sum())]
    return row[order], column[order]


def _by_length(log_prob: float, num_tokens: int, penalty: float | None) -> float:
    if penalty is not None:
        return log_prob / ((5 + num_tokens) / 6) ** penalty
    return log_prob / num_tokens if num_tokens else -np.inf


def _step(scorer: Scorer, state: Any, tokens: Ints) -> tuple[Doubles, Any]:
    """Show tokens (B, U) to the decoder: the log-probabilities (B, V) of what is next, in their order."""
    step = scorer.step(state, tokens, scorer.num_tokens)
    log_probs = np.empty(step.log_probs.shape)
    np.put_along_axis(log_probs, step.ids, step.log_probs, axis=1)
    return log_probs, step.state
