"""Whisper on recordings of any length, window by window (arXiv:2212.04356, section 4.5).

The decoder is prompted with the preceding text and answers with timestamps. If these show that the window
cuts off a stretch of text, the next window begins where that stretch does. A repetitive or improbable answer
is sampled again at increasing temperatures; an improbable one where probably nobody speaks is dropped.

A recording that fits into one window is decoded once, as configured. Words get their times from the
attention heads of the decoder (whisper_times.py).

S samples · T encoder frames of a window
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.scorer import Floats, Hypothesis, Scorer
from asr.decode.whisper import SOS_EOS, SPACE, Specials, WhisperOptions, behind_start
from asr.decode.whisper_search import Answer, Draw, by_length, search_window, whisper_options
from asr.decode.whisper_times import Stretch, cut, token_starts

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Sampling temperatures, tried in turn until an answer is good."""

LEAST_LOG_PROB = -1.0
"""Minimum of a good answer, per token."""

MOST_REPETITIVE = 2.4
"""Maximum compression ratio of the text of a good answer."""

SILENT = 0.6
"""An improbable answer is dropped if the probability that nobody speaks is higher."""

FORGETFUL = 0.5
"""An answer sampled at a higher temperature does not become the prompt of the next window."""


def hear(
    scorer: Scorer, samples: Sequence[Floats], config: SearchConfig, context: Context = WHOLE
) -> list[list[Hypothesis]]:
    """Mode whisper: one hypothesis for each recording."""
    specials = Specials.of(scorer.symbols)
    options = whisper_options(scorer, specials, config)
    found = []
    for x in samples:
        if scorer.max_samples and len(x) > scorer.max_samples:
            found.append([_joined(Recording(scorer, config), x, scorer.max_samples)])
            continue
        (frames,), memory = scorer.encode([x], context)
        answer = search_window(scorer, memory, 0, specials, options, scorer.max_tokens)
        found.append([_hypothesis(scorer, memory, specials, options, answer, _heard(scorer, x, frames))])
    return found


class Recording:
    """One recording, decoded window by window."""

    def __init__(self, scorer: Scorer, config: SearchConfig) -> None:
        """Raises ConfigError if the model does not support the mode."""
        self._scorer = scorer
        self._specials = Specials.of(scorer.symbols)
        self._options = replace(whisper_options(scorer, self._specials, config), timestamps=True)
        self.first_frame = 0
        """First frame of the next window."""

    def hear(self, samples: Floats) -> tuple[list[Hypothesis], int]:
        """The stretches of text in the next window, in frames of the recording, and by how many samples to
        advance to the one after it. samples (S,): scorer.max_samples, or fewer at the recording's end."""
        scorer, specials = self._scorer, self._specials
        (frames,), memory = scorer.encode([samples])
        num_frames = _heard(scorer, samples, frames)
        answer = self._answer(memory)
        self._options = replace(self._options, language=answer.language)
        found, frames_on = [], num_frames
        if not _is_silence(answer):
            whole = _hypothesis(scorer, memory, specials, self._options, answer, num_frames)
            stretches, frames_on = cut(answer.tokens, specials.timestamps, num_frames)
            found = self._stretches(whole, stretches)
            if answer.temperature > FORGETFUL:
                self._options = replace(self._options, prompt=())
        self.first_frame += frames_on
        is_end = frames_on >= num_frames
        return found, len(samples) if is_end else frames_on * scorer.max_samples // len(frames)

    def _stretches(self, whole: Hypothesis, stretches: Sequence[Stretch]) -> list[Hypothesis]:
        """The stretches of the answer that have a text, which becomes the prompt of the next window."""
        first_time = self._specials.timestamps
        text = [i for i, token in enumerate(whole.tokens) if token < first_time]
        found, said = [], list(self._options.prompt)
        for start, end, tokens in stretches:
            places, text = text[: len(tokens)], text[len(tokens) :]
            if end > start and _spelt(self._scorer.symbols, tokens):
                found.append(_part(whole, places, start, end, self.first_frame))
                said += [first_time + start, *tokens, first_time + end]
        self._options = replace(self._options, prompt=tuple(said[-self._scorer.max_tokens :]))
        return found

    def _answer(self, memory: Any) -> Answer:
        """The first good answer, or the last."""
        random = np.random.default_rng(self.first_frame)
        draws = [None, *(Draw(x, random) for x in TEMPERATURES)]
        for draw in draws:
            context = self._scorer.max_tokens
            answer = search_window(self._scorer, memory, 0, self._specials, self._options, context, draw)
            is_probable = answer.mean_log_prob >= LEAST_LOG_PROB
            if _is_silence(answer) or (is_probable and not self._repeats(answer)):
                break
        return answer

    def _repeats(self, answer: Answer) -> bool:
        text = _spelt(self._scorer.symbols, [x for x in answer.tokens if x < self._specials.timestamps])
        return len(text) > MOST_REPETITIVE * len(zlib.compress(text))


def _is_silence(answer: Answer) -> bool:
    return answer.no_speech > SILENT and answer.mean_log_prob < LEAST_LOG_PROB


def _heard(scorer: Scorer, samples: Floats, frames: Floats) -> int:
    """How many frames of a window, of all (T, 0), hold samples rather than padding."""
    if not scorer.max_samples:
        return len(frames)
    return min(-(-len(samples) * len(frames) // scorer.max_samples), len(frames))


def _hypothesis(
    scorer: Scorer,
    memory: Any,
    specials: Specials,
    options: WhisperOptions,
    answer: Answer,
    num_frames: int,
) -> Hypothesis:
    """The answer for a window with the times of its tokens; a timestamp takes that of the token before."""
    tokens = np.array(answer.tokens, np.int64)
    is_text = tokens < specials.timestamps
    starts, ends = np.zeros_like(tokens), np.ones_like(tokens)
    asked = replace(options, timestamps=False, prefix=())
    shown = [SOS_EOS, *behind_start(specials, asked, answer.language, scorer.max_tokens)]
    if is_text.any():
        attention = scorer.listen(memory, 0, [*shown, *tokens[is_text].tolist()])
        found = token_starts(attention, num_frames, first=len(shown) - 1)  # the last one belongs to the end
        starts[is_text], ends[is_text] = found[:-1], np.maximum(found[1:], found[:-1] + 1)
        starts, ends = np.maximum.accumulate(starts), np.maximum.accumulate(ends)
    log_prob = sum(answer.log_probs)
    return Hypothesis(
        answer.tokens,
        by_length(log_prob, len(tokens), options.length_penalty),
        {"attention": log_prob},
        tuple(starts.tolist()),
        tuple(np.exp(answer.log_probs[: len(tokens)]).tolist()),
        ends=tuple(ends.tolist()),
    )


def _part(whole: Hypothesis, places: Sequence[int], start: int, end: int, first_frame: int) -> Hypothesis:
    """Some tokens of the hypothesis `whole` for a window that begins at first_frame: the text from `start` to
    `end`. The alignment path spans the whole window, so the frames are clipped to that range."""
    confidence = tuple(whole.confidence[i] for i in places)
    log_prob = float(np.log(confidence).sum())
    tokens = tuple(whole.tokens[i] for i in places)
    frames = tuple(first_frame + min(max(whole.frames[i], start), end - 1) for i in places)
    ends = tuple(first_frame + min(max(whole.ends[i], start + 1), end) for i in places)
    return Hypothesis(tokens, log_prob, {"attention": log_prob}, frames, confidence, ends=ends)


def _joined(recording: Recording, samples: Floats, most: int) -> Hypothesis:
    """The whole text of samples (S,), of which a window takes `most`."""
    found: list[Hypothesis] = []
    while len(samples):
        parts, used = recording.hear(samples[:most])
        found += parts
        samples = samples[used:]
    log_prob = sum(x.score for x in found)
    names = ("tokens", "frames", "confidence", "ends")
    tokens, frames, confidence, ends = (tuple(y for x in found for y in getattr(x, name)) for name in names)
    return Hypothesis(tokens, log_prob, {"attention": log_prob}, frames, confidence, ends=ends)


def _spelt(symbols: Sequence[str], tokens: Sequence[int]) -> bytes:
    """The text of tokens, in UTF-8, without surrounding space."""
    text = "".join(symbols[x] for x in tokens).replace(SPACE, " ").encode()
    return re.sub(rb"<0x([0-9A-F]{2})>", lambda found: bytes.fromhex(found[1].decode()), text).strip()
