"""Beam search for what Whisper hears in one window, by the rules of whisper.py.

All hypotheses have the same number of tokens. Of each the beam + 1 likeliest continuations are candidates.
Those that end are put aside, as many as beam * patience, and the best of the others grow. The search is over
when that many have ended, or nothing may grow further: then what has not ended is an answer, too, as far as
fewer than `beam` have. The best answer is that with the highest log-probability by length.

B hypotheses · U tokens · V units
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.joint import listened
from asr.decode.scorer import Floats, Hypothesis, Ints, Scorer
from asr.decode.whisper import (
    SOS_EOS,
    Doubles,
    Rules,
    Specials,
    WhisperOptions,
    before_start,
    behind_start,
    log_softmax,
    unspoken,
)
from asr.errors import ConfigError

LATEST_START_S = 1.0
"""No first time is later."""


@dataclass(frozen=True)
class Answer:
    """What was heard in a window."""

    tokens: tuple[int, ...]
    """Times included, where they were asked for; without the prefix."""

    log_probs: tuple[float, ...]
    """Of the tokens and, where it has ended, of the end, among what was allowed."""

    places: tuple[int, ...]
    """The frame that was listened to most before each token."""

    language: str | None
    no_speech: float
    """The probability that nobody speaks, in [0, 1]."""

    @property
    def mean_log_prob(self) -> float:
        """Per token, the end included."""
        return sum(self.log_probs) / (len(self.tokens) + 1)


def search_windows(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Mode whisper: the answer for each of `memory`, one hypothesis. log_probs (T, 0): there is no CTC."""
    specials = Specials.of(scorer.symbols)
    options = _options(scorer, specials, config)
    return [
        [_hypothesis(search_window(scorer, memory, n, specials, options, scorer.max_tokens), options)]
        for n in range(len(log_probs))
    ]


def _options(scorer: Scorer, specials: Specials, config: SearchConfig) -> WhisperOptions:
    if config.prompt:
        raise ConfigError("prompt: mode whisper makes its own; choose with language, task and timestamps")
    if not specials.languages and (config.language not in ("auto", "en") or config.task != "transcribe"):
        raise ConfigError(
            f"language is {config.language}, task {config.task}; this model knows English alone, and only "
            "transcribes"
        )
    half = scorer.max_tokens // 2
    return WhisperOptions(
        language=config.language if specials.languages else None,
        task=config.task,
        timestamps=config.timestamps,
        suppress=unspoken(scorer.symbols),
        max_first_time=round(LATEST_START_S / scorer.frame_s),
        max_tokens=min(config.max_tokens or half, half),
        beam=config.beam,
        patience=config.patience,
        length_penalty=config.length_penalty or None,
    )


def _hypothesis(answer: Answer, options: WhisperOptions) -> Hypothesis:
    log_prob = sum(answer.log_probs)
    return Hypothesis(
        answer.tokens,
        _by_length(log_prob, len(answer.tokens), options.length_penalty),
        {"attention": log_prob},
        tuple(np.maximum.accumulate(np.array(answer.places, np.int64)).tolist()),
        tuple(np.exp(answer.log_probs[: len(answer.tokens)]).tolist()),
    )


def detect_language(scorer: Scorer, memory: Any, utterance: int, specials: Specials) -> dict[str, float]:
    """The probability of each language, by code."""
    step = _step(scorer, scorer.start(memory, np.array([utterance])), np.array([[SOS_EOS]]))
    units = list(specials.languages.values())
    return dict(zip(specials.languages, np.exp(log_softmax(step.log_probs[0, units])).tolist(), strict=True))


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
    said = _step(scorer, scorer.start(memory, np.array([utterance])), np.array([before]))
    no_speech = float(np.exp(said.log_probs[0, specials.no_speech]))
    if behind:
        said = _step(scorer, said.state, np.array([behind]))
    # the last token of a full context may still be followed by one more
    most = min(options.max_tokens or context // 2, context + 1 - len(before) - len(behind))
    found = _search(scorer, said, Rules(specials, options, scorer.num_tokens), most)
    tokens, log_probs, places = (tuple(x.tolist()) for x in found)
    return Answer(tokens, log_probs, places[: len(tokens)], language, no_speech)


class Said(NamedTuple):
    """What the decoder says behind the last token of B hypotheses."""

    log_probs: Doubles
    """(B, V)"""
    places: Ints
    """The frame listened to most (B,)."""
    state: Any


class Rows(NamedTuple):
    """B hypotheses, or one without the first dimension."""

    tokens: Ints
    """(B, U)"""
    log_probs: Doubles
    """(B, U), or (B, U + 1) with that of the end."""
    places: Ints
    """(B, U) or (B, U + 1)"""


def _search(scorer: Scorer, said: Said, rules: Rules, most: int) -> Rows:
    """The best answer of up to `most` tokens, given what is said before the first one."""
    options = rules.options
    width = options.beam
    enough = round(width * options.patience)
    live = Rows(np.zeros((1, 0), np.int64), np.zeros((1, 0)), np.zeros((1, 0), np.int64))
    ended: list[Rows] = []
    for _ in range(most):
        if live.tokens.shape[1]:
            said = _step(scorer, said.state, live.tokens[:, -1:])
        values = rules(said.log_probs, live.tokens)
        row, token = _candidates(live.log_probs.sum(1, keepdims=True) + values, width + 1)
        grown = Rows(
            np.concatenate((live.tokens[row], token[:, None]), 1),
            np.concatenate((live.log_probs[row], values[row, token, None]), 1),
            np.concatenate((live.places[row], said.places[row, None]), 1),
        )
        grows = np.flatnonzero(token != SOS_EOS)[:width]
        better = grows[-1] if len(grows) == width else len(token)
        for b in np.flatnonzero(token[:better] == SOS_EOS)[: enough - len(ended)]:
            ended.append(Rows(grown.tokens[b, :-1], grown.log_probs[b], grown.places[b]))
        live = Rows(grown.tokens[grows], grown.log_probs[grows], grown.places[grows])
        if len(ended) >= enough or not len(grows):
            break
        said = said._replace(state=scorer.select(said.state, row[grows]))
    ended += [Rows(*x) for x in list(zip(*live, strict=True))[: max(width - len(ended), 0)]]
    return max(ended, key=lambda x: _by_length(x.log_probs.sum(), len(x.tokens), options.length_penalty))


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


def _step(scorer: Scorer, state: Any, tokens: Ints) -> Said:
    """Show tokens (B, U) to the decoder."""
    step = scorer.step(state, tokens, scorer.num_tokens)
    log_probs = np.empty(step.log_probs.shape)
    np.put_along_axis(log_probs, step.ids, step.log_probs, axis=1)
    return Said(log_probs, listened(step.attention), step.state)
