"""The texts of successive utterances, from the encoder's output for a stream.

While an utterance lasts, its text so far is reported after each chunk in which it changes; when `endpoint.py`
ends it, the modes that search whole utterances (decode/modes.py) run their final search.

T encoder frames · C channels · V units
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.modes import FIRST_PASS, ONLINE, check_name, mode_of, start_search
from asr.decode.scorer import BLANK, Floats, Hypothesis
from asr.errors import ConfigError
from asr.runtime.endpoint import Ending, EndpointConfig, Endpointer
from asr.runtime.events import Event, make_event
from asr.runtime.onnx_scorer import OnnxScorer

LEAD_IN_S = 0.6
"""Silence before an utterance that its decoder attends to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How a stream is decoded. Every value can differ from stream to stream."""

    chunk_ms: int | None = None
    """Audio per step: the latency. None: the default in model.json."""

    left_chunks: int | None = None
    """Left context of attention, in chunks. None: the default in model.json."""

    look_ahead: int = 0
    """Look-ahead of attention in every layer, in chunks; the delay adds up over the layers."""

    mode: str = ""
    """One of MODES, for the final text; "": the model's default. Modes that search whole utterances take
    partial texts from CTC."""

    search: SearchConfig = field(default_factory=SearchConfig)

    endpoint: EndpointConfig = field(default_factory=EndpointConfig)

    chunks_per_call: int = 1
    """More than one is faster, but adds latency: for audio that already exists. The context is the same."""

    def __post_init__(self) -> None:
        check_name(self.mode)
        if self.chunks_per_call < 1:
            raise ConfigError(f"chunks_per_call is {self.chunks_per_call}, expected at least 1")
        if self.left_chunks is not None and self.left_chunks < 0:
            raise ConfigError(f"left_chunks is {self.left_chunks}; a stream needs a limit, 0 or more")
        if self.look_ahead < 0:
            raise ConfigError(f"look_ahead is {self.look_ahead}, expected 0 or more chunks")


class Utterance:
    """The search for the text of one utterance at a time, over encoder frames."""

    def __init__(self, scorer: OnnxScorer, config: StreamConfig) -> None:
        self.first_frame = 0
        self._scorer = scorer
        self._config = config = replace(config, mode=mode_of(scorer, config.mode))
        self._search = start_search(config.mode, scorer, config.search)
        self._memory: Any = None
        self._endpointer = Endpointer(config.endpoint, scorer.frame_s)
        self._lead_in = round(LEAD_IN_S / scorer.frame_s)
        self._recent: tuple[Floats, Floats] | None = None
        self._num_frames = 0
        self._last_text = ""

    def advance(self, y: Floats, log_probs: Floats) -> list[Event]:
        """Take one more chunk, y (T, C) and log_probs (T, V) -> its events."""
        events: list[Event] = []
        while len(y):
            ended = self._endpointer.advance((log_probs.argmax(1) == BLANK).tolist())
            taken = ended[0] if ended else len(y)
            self._take(y[:taken], log_probs[:taken])
            if ended:
                events += self.end() if ended[1] is not Ending.SILENCE else self._restart()
            y, log_probs = y[taken:], log_probs[taken:]
        return events + self._partial()

    def end(self) -> list[Event]:
        """The final event of the utterance, if it has a text; the next frame is the first of the next one."""
        # where CTC emits only blanks the decoder is not run, unless it has run all along
        is_worth_it = self._endpointer.has_speech or self._config.mode in ONLINE
        hypothesis = self._search.finish()[0] if is_worth_it else self._search.best()
        event = self._event(hypothesis, final=True)
        self._restart()
        return [event] if event.text else []

    def _take(self, y: Floats, log_probs: Floats) -> None:
        if self._config.mode not in FIRST_PASS:
            self._memory = self._scorer.grow(self._memory, y)
            ys, rows = self._recent or (y[:0], log_probs[:0])
            self._recent = (
                np.concatenate((ys, y))[-self._lead_in :],
                np.concatenate((rows, log_probs))[-self._lead_in :],
            )
        self._search.advance(self._memory, log_probs)
        self._num_frames += len(y)

    def _restart(self) -> list[Event]:
        """Start over. After silence, its end becomes the beginning of the next utterance."""
        lead_in = None if self._endpointer.has_speech else self._recent
        self.first_frame += self._num_frames
        self._num_frames = 0
        self._memory, self._recent = None, None
        self._last_text = ""
        self._search = start_search(self._config.mode, self._scorer, self._config.search)
        self._endpointer.reset()
        if lead_in:
            self.first_frame -= len(lead_in[0])
            self._take(*lead_in)
        return []

    def _partial(self) -> list[Event]:
        event = self._event(self._search.best(), final=False)
        if event.text == self._last_text:
            return []
        self._last_text = event.text
        return [event]

    def _event(self, hypothesis: Hypothesis, final: bool) -> Event:
        tokenizer = self._scorer.bundle.tokenizer
        return make_event(hypothesis, tokenizer, self._scorer.frame_s, self.first_frame, final)
