"""Beam search over one window of Whisper, under the rules of whisper.py.

All hypotheses have the same number of tokens. The beam + 1 most likely continuations of each are candidates.
Those that end are set aside, up to beam * patience of them, and the best of the others grow. The search stops
when that many have ended, or when nothing may grow further; if fewer than `beam` have ended, unfinished
hypotheses fill up the answers. The best answer has the highest length-normalised log-probability.
Alternatively `beam` answers are sampled, and the best of them is taken.

B hypotheses · U tokens · V units
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.joint import listened
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
    unspoken,
)
from asr.errors import ConfigError

LATEST_START_S = 1.0
"""The latest first timestamp."""


@dataclass(frozen=True)
class Answer:
    """The answer for one window."""

    tokens: tuple[int, ...]
    """With timestamps, if requested; without the prefix."""

    log_probs: tuple[float, ...]
    """Of the tokens and, if it has ended, of the end, normalised over the allowed units."""

    places: tuple[int, ...]
    """The frame with the most attention for each token."""

    language: str | None
    no_speech: float
    """The probability that nobody speaks, in [0, 1]."""

    temperature: float = 0.0
    """The temperature of sampling; 0: found by beam search."""

    @property
    def mean_log_prob(self) -> float:
        """Per token, the end included."""
        return sum(self.log_probs) / (len(self.tokens) + 1)


def whisper_options(scorer: Scorer, specials: Specials, config: SearchConfig) -> WhisperOptions:
    """The options of mode whisper; ConfigError for options that it or this model does not support."""
    if config.prompt:
        raise ConfigError("prompt: mode whisper makes its own prompt; set language, task and timestamps")
    if not specials.languages and (config.language not in ("auto", "en") or config.task != "transcribe"):
        raise ConfigError(
            f"language is {config.language}, task {config.task}; this model only transcribes, and "
            "only English"
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


def detect_language(scorer: Scorer, memory: Any, utterance: int, specials: Specials) -> dict[str, float]:
    """The probability of each language, by code."""
    step = _step(scorer, scorer.start(memory, np.array([utterance])), np.array([[SOS_EOS]]))
    units = list(specials.languages.values())
    return dict(zip(specials.languages, np.exp(log_softmax(step.log_probs[0, units])).tolist(), strict=True))


def search_window(
    scorer: Scorer,
    memory: Any,
    utterance: int,
    specials: Specials,
    options: WhisperOptions,
    context: int,
    draw: "Draw | None" = None,
) -> Answer:
    """The best answer of a decoder of `context` tokens, found by beam search or sampled with `draw`;
    ConfigError if the language is unknown."""
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
    rules = Rules(specials, options, scorer.num_tokens)
    found = _search(scorer, said, rules, most) if draw is None else _draw(scorer, said, rules, most, draw)
    tokens, log_probs, places = (tuple(x.tolist()) for x in found)
    temperature = draw.temperature if draw else 0.0
    return Answer(tokens, log_probs, places[: len(tokens)], language, no_speech, temperature)


class Draw(NamedTuple):
    """How to sample tokens instead of searching for them."""

    temperature: float
    """Divides the log-probabilities."""

    random: np.random.Generator


class Said(NamedTuple):
    """The decoder's prediction after the last token of B hypotheses."""

    log_probs: Doubles
    """(B, V)"""
    places: Ints
    """The frame with the most attention (B,)."""
    state: Any


class Rows(NamedTuple):
    """B hypotheses, or one without the first dimension."""

    tokens: Ints
    """(B, U)"""
    log_probs: Doubles
    """(B, U), or (B, U + 1) with the end."""
    places: Ints
    """(B, U) or (B, U + 1)"""

    @classmethod
    def empty(cls, count: int) -> "Rows":
        return cls(np.zeros((count, 0), np.int64), np.zeros((count, 0)), np.zeros((count, 0), np.int64))

    def grown(self, row: Ints, token: Ints, values: Doubles, places: Ints) -> "Rows":
        """Rows `row`, each with one more token, whose log-probability is taken from values (B, V)."""
        return Rows(
            np.concatenate((self.tokens[row], token[:, None]), 1),
            np.concatenate((self.log_probs[row], values[row, token, None]), 1),
            np.concatenate((self.places[row], places[row, None]), 1),
        )

    def without_end(self, b: int) -> "Rows":
        """Row b, which has ended."""
        return Rows(self.tokens[b, :-1], self.log_probs[b], self.places[b])


def _search(scorer: Scorer, said: Said, rules: Rules, most: int) -> Rows:
    """The best answer of up to `most` tokens, given the prediction `said` of the first one."""
    options = rules.options
    width = options.beam
    enough = round(width * options.patience)
    live = Rows.empty(1)
    ended: list[Rows] = []
    for _ in range(most):
        if live.tokens.shape[1]:
            said = _step(scorer, said.state, live.tokens[:, -1:])
        values = rules(said.log_probs, live.tokens)
        row, token = _candidates(live.log_probs.sum(1, keepdims=True) + values, width + 1)
        grown = live.grown(row, token, values, said.places)
        grows = np.flatnonzero(token != SOS_EOS)[:width]
        better = grows[-1] if len(grows) == width else len(token)
        for b in np.flatnonzero(token[:better] == SOS_EOS)[: enough - len(ended)]:
            ended.append(grown.without_end(b))
        live = Rows(grown.tokens[grows], grown.log_probs[grows], grown.places[grows])
        if len(ended) >= enough or not len(grows):
            break
        said = said._replace(state=scorer.select(said.state, row[grows]))
    ended += [Rows(*x) for x in list(zip(*live, strict=True))[: max(width - len(ended), 0)]]
    return _best(ended, options)


def _draw(scorer: Scorer, said: Said, rules: Rules, most: int, draw: Draw) -> Rows:
    """The best of `beam` sampled answers."""
    all_ = np.zeros(rules.options.beam, np.int64)
    live, ended = Rows.empty(len(all_)), []
    said = Said(said.log_probs[all_], said.places[all_], scorer.select(said.state, all_))
    for _ in range(most):
        if live.tokens.shape[1]:
            said = _step(scorer, said.state, live.tokens[:, -1:])
        values = rules(said.log_probs, live.tokens)
        # Gumbel-max trick: the argmax of log-probabilities plus Gumbel noise is a sample
        token = (values / draw.temperature + draw.random.gumbel(size=values.shape)).argmax(1)
        grown = live.grown(np.arange(len(token)), token, values, said.places)
        ended += [grown.without_end(b) for b in np.flatnonzero(token == SOS_EOS).tolist()]
        grows = np.flatnonzero(token != SOS_EOS)
        live = Rows(grown.tokens[grows], grown.log_probs[grows], grown.places[grows])
        if not len(grows):
            break
        said = said._replace(state=scorer.select(said.state, grows))
    return _best([*ended, *(Rows(*x) for x in zip(*live, strict=True))], rules.options)


def _best(ended: list[Rows], options: WhisperOptions) -> Rows:
    return max(ended, key=lambda x: by_length(x.log_probs.sum(), len(x.tokens), options.length_penalty))


def _candidates(scores: Doubles, count: int) -> tuple[Ints, Ints]:
    """Row and column of the `count` best scores of each row of (B, V), all sorted best first; no -inf."""
    column = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    row = np.repeat(np.arange(len(scores)), column.shape[1])
    column = column.ravel()
    found = scores[row, column]
    order = np.argsort(-found, kind="stable")[: int((found > -np.inf).sum())]
    return row[order], column[order]


def by_length(log_prob: float, num_tokens: int, penalty: float | None) -> float:
    if penalty is not None:
        return log_prob / ((5 + num_tokens) / 6) ** penalty
    return log_prob / num_tokens if num_tokens else -np.inf


def _step(scorer: Scorer, state: Any, tokens: Ints) -> Said:
    """Feed tokens (B, U) to the decoder."""
    step = scorer.step(state, tokens, scorer.num_tokens)
    log_probs = np.empty(step.log_probs.shape)
    np.put_along_axis(log_probs, step.ids, step.log_probs, axis=1)
    return Said(log_probs, listened(step.attention), step.state)
