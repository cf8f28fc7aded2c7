"""Bundles and streams of every streaming encoder but Conformer, which the other tests use.

Two of them need the end of a call again in the next one, and two need silence after the last call.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asr.context import WHOLE, Context
from asr.decode.modes import decode
from asr.decode.scorer import Floats
from asr.errors import BundleError
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle, EndpointConfig, Event, Stream, StreamBatch, StreamConfig
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import stream_context
from export.verify import (
    Utterance,
    at_once,
    contexts,
    count_same_searches,
    count_same_streams,
    in_chunks,
    possible_contexts,
)

NO_ENDPOINTS = EndpointConfig(trailing_s=1e6, silence_s=1e6, max_s=1e6)
GREEDY = StreamConfig(mode="ctc-greedy", chunk_ms=320, endpoint=NO_ENDPOINTS)


@pytest.fixture(scope="session")
def bundle(streaming_bundle: Path) -> Bundle:
    return Bundle.load(streaming_bundle)


@pytest.fixture(scope="session")
def scorers(streaming_model: HybridModel, bundle: Bundle) -> tuple[TorchScorer, OnnxScorer]:
    return TorchScorer(streaming_model, "cpu", bundle.word_starts), OnnxScorer(bundle)


def run(bundle: Bundle, samples: Floats, config: StreamConfig, size: int) -> list[Event]:
    stream = Stream(bundle, config)
    blocks = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [event for block in blocks for event in stream.accept(block)] + stream.finish()


STATES = {
    "wenet-conformer": {
        "keys": (2, 2, "W", 16),
        "values": (2, 2, "W", 16),
        "conv": (2, 32, 4),
        "offset": (),
    },
    "fast-conformer": {
        "frames": (14, 80),
        "keys": (2, 2, "W", 16),
        "values": (2, 2, "W", 16),
        "conv": (2, 32, 4),
        "offset": (),
    },
    "zipformer": {
        "frames": (3, 19, 128),
        **{
            f"{name}.{i}.0": shape
            for i, width, dim, side in ((0, "2*W", 16, 2), (1, "W", 24, 1))
            for name, shape in {
                "keys": (2, width, 8),
                "hidden": (1, width, 3 * dim // 4),
                "values_1": (2, width, 8),
                "values_2": (2, width, 8),
                "convolution_1": (1, side, dim),
                "convolution_2": (1, side, dim),
            }.items()
        },
        "offset": (),
    },
}
MIN_FRAMES = {"wenet-conformer": 7, "fast-conformer": 1, "zipformer": 17}
CONTEXTS = {
    "wenet-conformer": [Context(16, 4), Context(4, 4)],
    "fast-conformer": [Context(8, 2), Context(2, 2)],
    "zipformer": [Context(16, 4), Context(4, 4)],
}


def test_model_json_says_so(streaming_model: HybridModel, bundle: Bundle):
    info, kind = bundle.info, streaming_model.encoder.config.type
    assert (info.min_frames, info.stream.look_ahead_layers) == (MIN_FRAMES[kind], 0)
    assert info.context_inputs == ("chunk", "left")
    assert {f.name: f.shape for f in info.encoder_state} == STATES[kind]
    assert possible_contexts(info) == contexts(info) == [WHOLE, *CONTEXTS[kind]]


@pytest.mark.parametrize("context", [WHOLE, Context(8), Context(1, 10), Context(8, 0), Context(16, 4)])
@pytest.mark.parametrize("num_samples", [7 * 16000 - 333, 4 * 10240, 25000, 1500, 900])
def test_graphs_are_the_model_at_once_and_chunk_by_chunk(
    scorers: tuple[TorchScorer, OnnxScorer], bundle: Bundle, sound: Floats, context: Context, num_samples: int
):
    expected, found = (at_once(scorer, context)(sound[:num_samples]) for scorer in scorers)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    if context.left >= 0:
        parts = in_chunks(bundle, context)(sound[:num_samples])
        np.testing.assert_allclose(parts, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["ctc-prefix", "rescore", "joint", "alignatt", "triggered"])
def test_searches_and_streams_find_the_same(
    scorers: tuple[TorchScorer, OnnxScorer], bundle: Bundle, sound: Floats, mode: str
):
    heard = [Utterance("a", sound, ""), Utterance("b", sound[:30000], ""), Utterance("c", sound[:79], "")]
    assert count_same_searches(mode, *scorers, heard) == 3
    assert count_same_streams(mode, scorers[0], bundle, heard, stream_context(bundle.info, GREEDY)) == 3


@pytest.mark.parametrize("size", [160, 333, 5120, 50000])
@pytest.mark.parametrize("calls", [1, 3])
def test_events_do_not_depend_on_how_the_samples_arrive(bundle: Bundle, sound: Floats, size: int, calls: int):
    config = replace(GREEDY, mode="rescore", endpoint=EndpointConfig(), chunks_per_call=calls)
    expected = run(bundle, sound, replace(config, chunks_per_call=1), len(sound))
    assert run(bundle, sound, config, size) == expected
    assert any(event.final for event in expected)


def test_the_last_word_is_never_lost(scorers: tuple[TorchScorer, OnnxScorer], bundle: Bundle, sound: Floats):
    """Also where only the overlap, or less than a frame, is left after the last whole chunk."""
    for num_samples in [1, 480, 1000, 1040, 5120, 5600, 5760, *range(10720, 11520, 80), 20000]:
        samples = sound[30000 : 30000 + num_samples]
        expected = decode(
            scorers[0], "ctc-greedy", [samples], GREEDY.search, stream_context(bundle.info, GREEDY)
        )[0][0]
        texts = [event.text for event in run(bundle, samples, GREEDY, 160) if event.final]
        assert texts == [text for text in [bundle.tokenizer.decode(expected.tokens)] if text]


def test_streams_that_join_and_leave_are_what_they_are_alone(bundle: Bundle, sound: Floats):
    config = replace(GREEDY, endpoint=EndpointConfig())
    sounds = [sound[:40000], sound[40000:100000], sound[5000:25000], sound[:79]]
    batch = StreamBatch(bundle, config)
    streams, events, sent = {}, {n: [] for n in range(4)}, [0] * 4
    for time in range(60):
        if time in (0, 3, 7, 8):
            streams[(0, 3, 7, 8).index(time)] = batch.join()
        blocks = {stream: sounds[n][sent[n] : sent[n] + 1600 + 500 * n] for n, stream in streams.items()}
        told = batch.accept(blocks)
        ended = [stream for n, stream in streams.items() if sent[n] + len(blocks[stream]) >= len(sounds[n])]
        last = batch.finish(ended)
        for n, stream in list(streams.items()):
            events[n] += told[stream] + last.get(stream, [])
            sent[n] += len(blocks[stream])
            if stream in ended:
                del streams[n]
    assert not streams
    for n, samples in enumerate(sounds):
        expected = run(bundle, samples, config, len(samples))
        assert [(e.text, e.final, e.start_s) for e in events[n]] == [
            (e.text, e.final, e.start_s) for e in expected
        ]


def test_times_of_what_is_encoded_are_those_of_whole_chunks(bundle: Bundle, sound: Floats):
    stream = Stream(bundle, GREEDY)
    stream.accept(sound[:15040])
    assert stream.encoded_s == 2 * 0.32
    stream.finish()
    assert stream.encoded_s == stream.duration_s


def test_look_ahead_is_refused(bundle: Bundle, sound: Floats):
    message = "a look-ahead of 2 chunks, and this model was not trained to look ahead; expected 0"
    with pytest.raises(BundleError, match=message):
        Stream(bundle, replace(GREEDY, look_ahead=2))
    with pytest.raises(BundleError, match=message):
        OnnxScorer(bundle).encode([sound], Context(8, 4, 2))
