"""Streams: samples of any block length in, partial and final texts out.

A stream cuts its samples into chunks of fixed length and encodes one chunk per call, so its text never
depends on how the samples arrive. Feature frames that an encoder needs after a chunk are given again with the
next one. With look-ahead, the output for a frame lags behind the frame, and the end of a stream brings all
pending output at once. A stream keeps only the encoder's state, and what the decoder needs of the present
utterance: memory does not grow with time. Times are derived from integer counts, so they are as exact after a
day as at the start.

Several streams in one `StreamBatch` share the calls of the encoder, which costs less than a call for each.
In float32 nothing else changes. With the int8 target, whose activations share one scale within a call, the
log-probabilities of a stream then depend slightly on the other streams (tests/runtime/test_batch.py bounds
how much).

N streams · S samples
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from asr.context import Context
from asr.decode.scorer import Floats
from asr.errors import AudioError, BundleError, ConfigError
from asr.runtime.bundle import Bundle
from asr.runtime.events import Event
from asr.runtime.info import ModelInfo
from asr.runtime.onnx_scorer import OnnxScorer, State
from asr.runtime.utterance import StreamConfig, Utterance

MAX_LATE_S = 60.0
"""Maximum lag: text that comes later is no longer streaming, and the state would fill the memory."""

MAX_LEFT_S = 600.0
"""Maximum left context: more would fill the memory, too."""


class Stream:
    """One source of audio, from its start to `finish`."""

    def __init__(self, bundle: Bundle, config: StreamConfig | None = None) -> None:
        """Raises ConfigError or BundleError if this bundle does not support `config`."""
        config = config or StreamConfig()
        info = bundle.info
        if not info.has_ctc:
            raise BundleError(
                f"{bundle.folder}: has no CTC head, which finds where utterances of a stream end; use "
                "asr.runtime.open_stream, which finds it by loudness"
            )
        self._scorer = OnnxScorer(bundle)
        self.context = stream_context(info, config)
        self._call_frames = self.context.chunk * info.subsampling * config.chunks_per_call
        self._overlap_frames = info.overlap_frames
        self._flush_frames = info.flush_frames(self.context)
        self._late_frames = info.late_frames(self.context) * info.subsampling
        self._framer = self._scorer.framer()
        self._past = _Past(self._scorer.init_state(self.context), 0)
        self._utterance = Utterance(self._scorer, config)
        self._finished = False  # no more samples
        self._ended = False  # and all of them encoded
        self.failure: Exception | None = None
        """What went wrong in encoding or searching this stream, which cannot go on; `accept` raises it."""

    @property
    def duration_s(self) -> float:
        """Seconds of audio accepted so far."""
        return self._framer.num_samples / self._scorer.bundle.info.features.sample_rate

    @property
    def encoded_s(self) -> float:
        """Seconds of audio encoded so far, which the events cover."""
        features = self._scorer.bundle.info.features
        late_frames = 0 if self._ended else self._late_frames
        num_frames = max(self._framer.num_taken - late_frames, 0)
        return num_frames * features.shift_samples / features.sample_rate

    def accept(self, samples: Floats) -> list[Event]:
        """Take samples (S,), float32 in [-1, 1] at the bundle's sample rate. AudioError for NaN, infinity."""
        (events,) = accept_all([self], [samples])
        _raise_failure([self])
        return events

    def finish(self) -> list[Event]:
        """End the stream: the events of the audio not yet encoded, and the last final one."""
        (events,) = finish_all([self])
        _raise_failure([self])
        return events


def stream_context(info: ModelInfo, config: StreamConfig) -> Context:
    """The context of streams of a bundle; BundleError or ConfigError if it is not possible."""
    chunk_ms = info.stream.chunk_ms if config.chunk_ms is None else config.chunk_ms
    left = info.stream.left_chunks if config.left_chunks is None else config.left_chunks
    context = Context(info.chunk_frames(chunk_ms), left, config.look_ahead)
    info.check_context(context)
    spans = {
        "a chunk": (context.chunk, MAX_LATE_S),
        "left context": (context.left * context.chunk, MAX_LEFT_S),
    }
    for name, (num_frames, most) in spans.items():
        if (seconds := num_frames * info.frame_s) > most:
            raise ConfigError(f"{name} of {seconds:,.0f} s, expected at most {most:.0f}")
    if (late_s := info.late_frames(context) * info.frame_s) > MAX_LATE_S:
        layers = info.stream.look_ahead_layers
        what = f"look_ahead of {config.look_ahead} chunks in each of {layers} layers"
        raise ConfigError(
            f"{what} is {late_s:,.0f} s, expected at most {MAX_LATE_S:.0f}; lower it, or the chunk"
        )
    return context


class StreamBatch:
    """Streams of one bundle and configuration, encoded together; they join and leave at any time."""

    def __init__(self, bundle: Bundle, config: StreamConfig | None = None) -> None:
        self._bundle, self._config = bundle, config

    def join(self) -> Stream:
        """A new stream. It leaves by no longer being passed."""
        return Stream(self._bundle, self._config)

    def accept(self, blocks: Mapping[Stream, Floats]) -> dict[Stream, list[Event]]:
        """Blocks of samples of some of the streams -> their events."""
        events = accept_all(list(blocks), list(blocks.values()))
        _raise_failure(list(blocks))
        return dict(zip(blocks, events, strict=True))

    def finish(self, streams: Sequence[Stream]) -> dict[Stream, list[Event]]:
        """End some of the streams -> their last events."""
        events = finish_all(streams)
        _raise_failure(streams)
        return dict(zip(streams, events, strict=True))


def accept_all(streams: Sequence[Stream], blocks: Sequence[Floats]) -> list[list[Event]]:
    """`Stream.accept` of several streams with equal configuration; a refused block leaves all unchanged.

    A stream that fails says nothing more, and why is its `failure`; the others go on.
    """
    checked = [
        check_samples(block, stream._framer.num_samples, stream._finished)
        for stream, block in zip(streams, blocks, strict=True)
    ]
    events: list[list[Event]] = [[] for _ in streams]
    step = streams[0]._call_frames * streams[0]._framer.shift if streams else 1
    for start in range(
        0, max(map(len, checked), default=0), step
    ):  # so that a long block costs no more memory
        for stream, samples in zip(streams, checked, strict=True):
            stream._framer.accept(samples[start : start + step])
        _encode_ready(streams, events)
    return events


def finish_all(streams: Sequence[Stream]) -> list[list[Event]]:
    """`Stream.finish` of several streams with equal configuration; failures as in `accept_all`."""
    events: list[list[Event]] = [[] for _ in streams]
    for stream in streams:
        check_samples(np.zeros(0, np.float32), stream._framer.num_samples, stream._finished)
        stream._framer.finish()
        stream._finished = True
    _encode_ready(streams, events)
    for stream, told in zip(streams, events, strict=True):
        if not stream.failure:
            with _failing([stream]):
                told += stream._utterance.end()
    return events


@contextmanager
def _failing(streams: Sequence[Stream]) -> Iterator[None]:
    """An error in here is the failure of these streams, not of all that are encoded with them."""
    try:
        yield
    except Exception as error:
        for stream in streams:
            stream.failure = error


def _raise_failure(streams: Sequence[Stream]) -> None:
    for stream in streams:
        if stream.failure:
            raise stream.failure


def check_samples(samples: Floats, num_samples: int, finished: bool) -> Floats:
    """Samples (S,) that follow num_samples others, as float32; AudioError for NaN and infinity."""
    if finished:
        raise ValueError("this stream is finished; start another")
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise ValueError(f"samples are {samples.dtype} of shape {samples.shape}, expected float32 (S,)")
    wrong = ~np.isfinite(samples)
    if wrong.any():
        first = num_samples + int(wrong.argmax())
        raise AudioError(
            f"{int(wrong.sum())} samples are NaN or infinite, the first is sample {first:,} of the stream; "
            "check what records or converts them"
        )
    return samples.astype(np.float32, copy=False)


def _encode_ready(streams: Sequence[Stream], events: list[list[Event]]) -> None:
    """Encode and search all complete chunks, batching the next call of every stream."""
    while True:
        calls = [_next_call(stream) for stream in streams]
        for is_last in (False, True):  # the number of frames tells an encoder whether streams go on
            ready = [(n, call.num_frames) for n, call in enumerate(calls) if call and call.is_last == is_last]
            if ready:
                with _failing([streams[n] for n, _ in ready]):
                    _encode([(streams[n], frames, events[n]) for n, frames in ready], is_last)
        if not any(calls):
            return


class _Call(NamedTuple):
    num_frames: int
    """Feature frames: whole chunks and the overlap, or at the end the rest."""
    is_last: bool
    """Whether nothing follows them."""


def _next_call(stream: Stream) -> _Call | None:
    """What to encode next, if anything."""
    if stream.failure:
        return None
    ready, size = stream._framer.ready(), stream._call_frames + stream._overlap_frames
    if ready > size or (ready == size and not stream._finished):
        return _Call(size, False)
    has_begun = stream._framer.num_taken + ready > 0
    is_due = (stream._flush_frames > 0 and has_begun) or ready > stream._overlap_frames
    return _Call(ready, True) if stream._finished and not stream._ended and is_due else None


def _encode(calls: Sequence[tuple[Stream, int, list[Event]]], is_last: bool) -> None:
    """One call of the encoder for (stream, feature frames, where its events go) each."""
    again = 0 if is_last else calls[0][0]._overlap_frames
    windows = [stream._framer.take(num_frames, again) for stream, num_frames, _ in calls]
    padded = np.zeros((len(calls), max(map(len, windows))), np.float32)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = window
    streams = [stream for stream, _, _ in calls]
    first = streams[0]
    num_frames = np.array([frames for _, frames, _ in calls])
    state = _join([stream._past for stream in streams])
    flush = first._flush_frames if is_last else 0
    out = first._scorer.advance(padded, num_frames, first.context, state, flush)
    for n, ((stream, _, told), num) in enumerate(zip(calls, out.y_lens.tolist(), strict=True)):
        stream._past = _Past(out.state, n)
        stream._ended = is_last
        with _failing([stream]):
            told += _chunks(stream, out.y[n, :num], out.log_probs[n, :num])


def _chunks(stream: Stream, y: Floats, log_probs: Floats) -> list[Event]:
    """Search chunk by chunk, so that the events do not depend on the number of chunks per call."""
    events: list[Event] = []
    for start in range(0, len(y), stream.context.chunk):
        chunk = slice(start, start + stream.context.chunk)
        events += stream._utterance.advance(y[chunk], log_probs[chunk])
    return events


class _Past(NamedTuple):
    """The encoder's state of a stream: one row of the state that its last call returned."""

    state: State
    row: int


def _join(pasts: Sequence[_Past]) -> State:
    """The joint state of streams; nothing is copied if they were together in the last call, too."""
    state = pasts[0].state
    num_rows = len(next(iter(state.values())))
    if [past.row for past in pasts] == list(range(num_rows)) and all(past.state is state for past in pasts):
        return state
    return {name: np.concatenate([x.state[name][x.row : x.row + 1] for x in pasts]) for name in state}
