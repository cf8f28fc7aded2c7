from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from asr.context import Context
from asr.decode.scorer import Floats
from asr.runtime import Bundle, Event, Stream, StreamBatch, StreamConfig
from asr.runtime.onnx_scorer import Encoded, OnnxScorer
from export.verify import made_sound

CONFIG = StreamConfig(mode="rescore", chunk_ms=320)
AHEAD = replace(CONFIG, look_ahead=2)


def alone(bundle: Bundle, samples: Floats, config: StreamConfig) -> list[Event]:
    stream = Stream(bundle, config)
    return stream.accept(samples) + stream.finish()


@pytest.fixture(scope="module")
def sounds() -> list[Floats]:
    whole = made_sound(24.0, 16000)
    return [whole[n * 70000 : n * 70000 + size] for n, size in enumerate((64000, 100000, 20000, 79))]


@pytest.mark.parametrize("config", [CONFIG, AHEAD])
def test_streams_that_join_and_leave_are_what_they_are_alone(
    float32: Bundle, sounds: list[Floats], config: StreamConfig
):
    batch = StreamBatch(float32, config)
    streams, events, sent = {}, {n: [] for n in range(4)}, [0] * 4
    for time in range(200):
        if time in (0, 3, 17):  # the fourth joins together with the third
            for n in {0: [0], 3: [1], 17: [2, 3]}[time]:
                streams[n] = batch.join()
        blocks = {}
        for n, stream in streams.items():
            size = (1600, 2111, 999, 50)[n]
            blocks[stream] = sounds[n][sent[n] : sent[n] + size]
            sent[n] += size
        names = {stream: n for n, stream in streams.items()}
        for stream, told in batch.accept(blocks).items():
            events[names[stream]] += told
        ended = [stream for stream, n in names.items() if sent[n] >= len(sounds[n])]
        for stream, told in batch.finish(ended).items():
            events[names[stream]] += told
            del streams[names[stream]]
    assert not streams
    assert all(any(event.final and event.text for event in events[n]) for n in range(3))
    for n, samples in enumerate(sounds):
        expected = alone(float32, samples, config)
        assert [(e.text, e.final, e.start_s, e.end_s) for e in events[n]] == [
            (e.text, e.final, e.start_s, e.end_s) for e in expected
        ]


def test_a_batch_makes_one_call_for_all(
    float32: Bundle, sounds: list[Floats], monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    advance = OnnxScorer.advance

    def counted(self: OnnxScorer, windows: Floats, *rest: Any) -> Encoded:
        sizes.append(len(windows))
        return advance(self, windows, *rest)

    monkeypatch.setattr(OnnxScorer, "advance", counted)
    batch = StreamBatch(float32, CONFIG)
    streams = [batch.join() for _ in range(3)]
    batch.accept({stream: x[:20000] for stream, x in zip(streams, sounds, strict=False)})
    assert sizes == [3, 3, 3]
    batch.finish(streams)
    assert sizes[3:] == [3]


def test_streams_of_different_lengths_can_end_together(float32: Bundle, sounds: list[Floats]):
    batch = StreamBatch(float32, AHEAD)
    streams = [batch.join() for _ in sounds]
    events = {stream: [] for stream in streams}
    for told in (batch.accept(dict(zip(streams, sounds, strict=True))), batch.finish(streams)):
        for stream in streams:
            events[stream] += told[stream]
    for stream, samples in zip(streams, sounds, strict=True):
        expected = alone(float32, samples, AHEAD)
        assert [(e.text, e.start_s) for e in events[stream]] == [(e.text, e.start_s) for e in expected]


def test_no_streams_are_no_error(float32: Bundle):
    batch = StreamBatch(float32, CONFIG)
    assert batch.accept({}) == {}
    assert batch.finish([]) == {}


def test_company_changes_eight_bits_slightly_at_most(int8: Bundle, sounds: list[Floats]):
    """Streams of one call share the scales of activations: probabilities change by about a per cent."""
    scorer = OnnxScorer(int8)
    loud = made_sound(1.0, 16000) * 3
    windows = np.stack([x[: 31 * 160 + 400] for x in (*sounds[:3], loud)])
    num_frames = np.full(4, 32)
    states = [scorer.init_state(Context(8, 2)) for _ in range(4)]
    joined = {name: np.concatenate([state[name] for state in states]) for name in states[0]}
    together = scorer.advance(windows, num_frames, Context(8, 2), joined).log_probs
    for n in range(4):
        single = scorer.advance(windows[n : n + 1], num_frames[:1], Context(8, 2), states[n]).log_probs[0]
        assert np.abs(np.exp(together[n]) - np.exp(single)).mean() < 0.02
