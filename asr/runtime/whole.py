"""Streams of models that take whole utterances: samples in, a final text for each when it has ended.

This is for encoders that cannot stream, and for models without a CTC head, whose blanks would mark silence.
Here loudness does, in blocks of one encoder frame: a block is silent if it is quiet, or hardly louder than
the quietest one of the last seconds. An overlong utterance is cut at the quietest block of its last
quarter. Nothing is decoded before the end, so there are no partial texts.

S samples
"""

from collections import deque
from dataclasses import replace

import numpy as np

from asr.decode.modes import decode, mode_of
from asr.decode.scorer import Floats
from asr.decode.whisper_windows import Recording
from asr.errors import BundleError
from asr.runtime.bundle import Bundle
from asr.runtime.endpoint import Ending, Endpointer
from asr.runtime.events import Event, make_event
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import Stream, check_samples
from asr.runtime.utterance import LEAD_IN_S, StreamConfig

QUIET_DB = -50.0
"""A block below this level, relative to full scale, is silent, ..."""

ABOVE_DB = 9.0
"""... and so is one less than this above the quietest block ..."""

RECENT_S = 10.0
"""... of the last RECENT_S seconds, once that many have passed."""


def open_stream(bundle: Bundle, config: StreamConfig | None = None) -> "Stream | WholeStream | WindowStream":
    """The kind of stream that a bundle supports; ConfigError or BundleError if `config` is not possible.

    For Whisper it goes by loudness, or with config.search.timestamps by windows and their timestamps."""
    config = config or StreamConfig()
    if bundle.info.decoder_type == "whisper" and config.search.timestamps:
        return WindowStream(bundle, config)
    is_whole = bundle.info.streaming is None or not bundle.info.has_ctc
    return (WholeStream if is_whole else Stream)(bundle, config)


class _Source:
    """One source of audio, from its start to `finish`, like `Stream` but without chunks."""

    def __init__(self, bundle: Bundle, config: StreamConfig | None = None) -> None:
        """Raises ConfigError or BundleError if this bundle does not support `config`."""
        config = config or StreamConfig()
        if config.chunk_ms is not None or config.left_chunks is not None or config.look_ahead:
            raise BundleError(
                f"{bundle.folder}: this model takes whole utterances, and has no chunks; leave out chunk, "
                "left context and look-ahead"
            )
        self._scorer = OnnxScorer(bundle)
        self._config = replace(config, mode=mode_of(self._scorer, config.mode))
        self._num_samples = 0
        self._finished = False

    @property
    def duration_s(self) -> float:
        """Seconds of audio accepted so far."""
        return self._num_samples / self._scorer.bundle.info.features.sample_rate

    def _take(self, samples: Floats) -> Floats:
        """The next samples (S,), checked and counted."""
        samples = check_samples(samples, self._num_samples, self._finished)
        self._num_samples += len(samples)
        return samples

    def _close(self) -> None:
        """End the source."""
        self._take(np.zeros(0, np.float32))
        self._finished = True


class WholeStream(_Source):
    """Utterances are separated by loudness."""

    def __init__(self, bundle: Bundle, config: StreamConfig | None = None) -> None:
        """Raises ConfigError or BundleError if this bundle does not support `config`."""
        super().__init__(bundle, config)
        info = bundle.info
        self._block = info.subsampling * info.features.shift_samples
        endpoint = self._config.endpoint
        if longest := info.features.max_samples:  # a quarter more than max_s is possible
            longest_s = longest // self._block * info.frame_s
            endpoint = replace(endpoint, max_s=min(endpoint.max_s, 0.8 * longest_s))
        self._endpointer = Endpointer(endpoint, info.frame_s)
        self._loudness = Loudness(round(RECENT_S / info.frame_s))
        self._lead_in = round(LEAD_IN_S / info.frame_s)
        self._rest = np.zeros(0, np.float32)
        self._blocks: list[Floats] = []
        self._levels: list[float] = []
        self._first_frame = 0

    @property
    def encoded_s(self) -> float:
        """Seconds of audio encoded so far, which the events cover."""
        return self.duration_s if self._finished else self._first_frame * self._scorer.frame_s

    def accept(self, samples: Floats) -> list[Event]:
        """Take samples (S,), float32 in [-1, 1] at the bundle's sample rate. AudioError for NaN, infinity."""
        whole = np.concatenate([self._rest, self._take(samples)])
        num_blocks = len(whole) // self._block
        self._rest = whole[num_blocks * self._block :]
        events: list[Event] = []
        for block in whole[: num_blocks * self._block].reshape(num_blocks, self._block):
            events += self._hear(block)
        return events

    def finish(self) -> list[Event]:
        """End the stream: the final event of the audio not yet decoded."""
        self._close()
        self._blocks.append(self._rest)
        return self._end(len(self._blocks))

    def _hear(self, block: Floats) -> list[Event]:
        """Take one more block -> the event of the utterance that it ends, if any."""
        level, is_silent = self._loudness.judge(block)
        self._blocks.append(block)
        self._levels.append(level)
        ended = self._endpointer.advance([is_silent])
        if not ended:
            return []
        if ended[1] is Ending.SILENCE:
            self._drop(len(self._blocks) - self._lead_in)
            return []
        if ended[1] is Ending.PAUSE or is_silent:
            return self._end(len(self._blocks))
        first = len(self._blocks) * 3 // 4
        return self._end(first + int(np.argmin(self._levels[first:])))

    def _end(self, num_blocks: int) -> list[Event]:
        """The final event of the first num_blocks, if it has a text; the others begin the next utterance."""
        samples = np.concatenate(self._blocks[:num_blocks])
        found = decode(self._scorer, self._config.mode, [samples], self._config.search)[0][0]
        tokenizer = self._scorer.bundle.tokenizer
        event = make_event(found, tokenizer, self._scorer.frame_s, self._first_frame, final=True)
        self._drop(num_blocks)
        return [event] if event.text else []

    def _drop(self, num_blocks: int) -> None:
        """Forget the first num_blocks; the others begin an utterance."""
        self._first_frame += num_blocks
        self._blocks, self._levels = self._blocks[num_blocks:], self._levels[num_blocks:]
        self._endpointer.reset()


class WindowStream(_Source):
    """Whisper on windows of full length, cut by its own timestamps (asr/decode/whisper_windows.py): for
    recordings, as text comes half a minute late."""

    def __init__(self, bundle: Bundle, config: StreamConfig | None = None) -> None:
        """Raises ConfigError or BundleError if this bundle does not support `config`."""
        super().__init__(bundle, config)
        self._recording = Recording(self._scorer, self._config.search)
        self._waiting = np.zeros(0, np.float32)

    @property
    def encoded_s(self) -> float:
        """Seconds of audio that the events cover."""
        waiting_s = len(self._waiting) / self._scorer.bundle.info.features.sample_rate
        return self.duration_s - waiting_s

    def accept(self, samples: Floats) -> list[Event]:
        """Take samples (S,), float32 in [-1, 1] at the bundle's sample rate. AudioError for NaN, infinity."""
        self._waiting = np.concatenate([self._waiting, self._take(samples)])
        return self._hear(self._scorer.max_samples)

    def finish(self) -> list[Event]:
        """End the stream: the final events of the audio not yet decoded."""
        self._close()
        return self._hear(1)

    def _hear(self, least: int) -> list[Event]:
        """The final events of windows, as long as there are `least` samples."""
        tokenizer, events = self._scorer.bundle.tokenizer, []
        while len(self._waiting) >= least:
            found, used = self._recording.hear(self._waiting[: self._scorer.max_samples])
            self._waiting = self._waiting[used:]
            events += [make_event(x, tokenizer, self._scorer.frame_s, 0, final=True) for x in found]
        return events


class Loudness:
    """Which blocks of samples are silent."""

    def __init__(self, num_recent: int) -> None:
        self._recent: deque[float] = deque(maxlen=num_recent)

    def judge(self, block: Floats) -> tuple[float, bool]:
        """The level of a block (S,) in dB relative to full scale, and whether it is silent."""
        level = float(10 * np.log10(np.square(block, dtype=np.float64).mean() + 1e-12))
        self._recent.append(level)
        is_known = len(self._recent) == self._recent.maxlen
        floor = min(self._recent) if is_known else -np.inf
        return level, level < max(QUIET_DB, floor + ABOVE_DB)
