import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr.context import Context
from asr.decode.modes import decode, modes_for
from asr.decode.scorer import Floats
from asr.decode.words import words
from asr.errors import AudioError, BundleError, ConfigError
from asr.runtime import Bundle, EndpointConfig, Event, Stream, StreamConfig
from asr.runtime.onnx_scorer import OnnxScorer
from export.verify import made_sound

GREEDY = StreamConfig(mode="ctc-greedy")
NO_ENDPOINTS = EndpointConfig(trailing_s=1e6, silence_s=1e6, max_s=1e6)


def run(bundle: Bundle, samples: Floats, config: StreamConfig, sizes: Iterable[int]) -> list[Event]:
    stream, events, start = Stream(bundle, config), [], 0
    for size in itertools.cycle(sizes):
        if start >= len(samples):
            return events + stream.finish()
        events += stream.accept(samples[start : start + size])
        start += size
    raise AssertionError


@pytest.mark.parametrize("sizes", [[160], [1, 333, 7], [4000, 0, 1], [10240], [50000]])
@pytest.mark.parametrize(("target", "look_ahead"), [("float32", 0), ("int8", 0), ("float32", 2)])
def test_events_do_not_depend_on_how_the_samples_arrive(
    request: pytest.FixtureRequest, sound: Floats, target: str, look_ahead: int, sizes: list[int]
):
    bundle = request.getfixturevalue(target)
    config = StreamConfig(mode="rescore", chunk_ms=320, look_ahead=look_ahead)
    expected = run(bundle, sound, config, [len(sound)])
    assert run(bundle, sound, config, sizes) == expected
    assert any(event.final for event in expected)
    assert any(not event.final for event in expected)


@pytest.mark.parametrize("mode", modes_for("transformer"))
@pytest.mark.parametrize(("chunk_ms", "left", "right"), [(160, 2, 0), (640, 0, 0), (320, 4, 0), (160, 2, 3)])
def test_without_endpoints_a_stream_says_what_decoding_says(
    float32: Bundle, sound: Floats, mode: str, chunk_ms: int, left: int, right: int
):
    config = StreamConfig(
        mode=mode, chunk_ms=chunk_ms, left_chunks=left, look_ahead=right, endpoint=NO_ENDPOINTS
    )
    (found,) = [event for event in run(float32, sound, config, [5000]) if event.final]
    chunk = float32.info.chunk_frames(chunk_ms)
    expected = decode(OnnxScorer(float32), mode, [sound], config.search, Context(chunk, left, right))[0][0]
    assert found.text == float32.tokenizer.decode(expected.tokens)
    assert len(found.words) == len(float32.tokenizer.words(expected.tokens))
    spoken = words(expected, float32.tokenizer.words, 0.04)
    assert found.words[0].start_s == pytest.approx(spoken[0].start_s)


@pytest.mark.parametrize("right", [0, 1])
def test_the_last_word_is_never_lost(float32: Bundle, sound: Floats, right: int):
    """For any length: the frames of the mirrored end are decoded as offline."""
    config = StreamConfig(mode="ctc-greedy", chunk_ms=640, look_ahead=right, endpoint=NO_ENDPOINTS)
    scorer, context = OnnxScorer(float32), Context(16, 4, right)
    for num_samples in [1, 79, 80, 200, 320, 1000, 10119, 10120, 10121, 10240, 10400, 20000]:
        samples = sound[30000 : 30000 + num_samples]
        expected = decode(scorer, "ctc-greedy", [samples], config.search, context)[0][0]
        texts = [event.text for event in run(float32, samples, config, [160]) if event.final]
        assert texts == [text for text in [float32.tokenizer.decode(expected.tokens)] if text]


@pytest.mark.parametrize("calls", [2, 5])
@pytest.mark.parametrize("look_ahead", [0, 2])
def test_several_chunks_a_call_tell_the_same_events(
    float32: Bundle, sound: Floats, calls: int, look_ahead: int
):
    config = StreamConfig(chunk_ms=320, mode="rescore", look_ahead=look_ahead)
    expected = run(float32, sound, config, [len(sound)])
    assert run(float32, sound, replace(config, chunks_per_call=calls), [160]) == expected


def test_utterances_follow_each_other(float32: Bundle):
    samples = made_sound(30.0, 16000)
    short = replace(GREEDY, endpoint=EndpointConfig(trailing_s=0.2, silence_s=1.0, max_s=4.0))
    finals = [event for event in run(float32, samples, short, [1600]) if event.final]
    assert len(finals) > 5
    for event, following in itertools.pairwise(finals):
        assert event.start_s < event.end_s <= following.start_s
        assert event.end_s - event.start_s <= 5.0
    whole = run(float32, samples, replace(GREEDY, endpoint=NO_ENDPOINTS), [1600])[-1]
    # the units stay, as the encoder continues; but a unit may last across the end of an utterance
    letters = "".join(event.text for event in finals).replace(" ", "")
    once = [letter for letter, _ in itertools.groupby(letters)]
    assert once == [letter for letter, _ in itertools.groupby(whole.text.replace(" ", ""))]


def test_partial_texts_come_while_the_utterance_lasts_and_never_twice(float32: Bundle, sound: Floats):
    stream = Stream(float32, replace(GREEDY, chunk_ms=160, endpoint=NO_ENDPOINTS))
    texts = []
    for start in range(0, len(sound), 1600):
        for event in stream.accept(sound[start : start + 1600]):
            assert not event.final
            assert event.end_s <= stream.duration_s
            texts.append(event.text)
    assert len(texts) > 5
    assert all(a != b for a, b in itertools.pairwise(texts))
    (final,) = stream.finish()[-1:]
    assert final.final
    assert final.text.startswith(texts[-1])


def test_look_ahead_is_later_and_its_times_are_right(float32: Bundle, sound: Floats):
    """Two layers that look ahead by a chunk of 160 ms each: no text yet for the last 320 ms."""
    config = replace(GREEDY, chunk_ms=160, look_ahead=1, endpoint=NO_ENDPOINTS)
    stream, ends, told = Stream(float32, config), [], []
    for start in range(0, len(sound), 1600):
        events = stream.accept(sound[start : start + 1600])
        assert stream.encoded_s <= max(stream.duration_s - 0.32, 0)
        assert all(event.end_s <= stream.encoded_s + 1e-6 for event in events)
        ends += [stream.encoded_s]
        told += events
    assert ends[2] == 0 < ends[8] < stream.duration_s - 0.32 + 0.001
    final = stream.finish()[-1]
    assert stream.encoded_s == pytest.approx(stream.duration_s, abs=0.01)
    starts = [word.start_s for word in told[-1].words[:-1]]
    assert len(starts) > 3
    assert [word.start_s for word in final.words[: len(starts)]] == pytest.approx(starts)


def test_the_decoder_hears_the_silence_before_an_utterance_but_not_all_of_it(float32: Bundle, sound: Floats):
    endpoint = EndpointConfig(trailing_s=0.4, silence_s=0.4, max_s=20.0)
    stream = Stream(float32, StreamConfig(mode="rescore", endpoint=endpoint, chunk_ms=160))
    utterance = stream._utterance
    blank = np.full((100, float32.info.num_tokens), -10, np.float32)
    blank[:, 0] = -0.01
    assert utterance.advance(np.zeros((100, float32.info.dim), np.float32), blank) == []
    heard = len(utterance._memory.ys[0])
    assert 15 <= heard <= 25
    assert utterance.first_frame + heard == 100
    spoken = np.full((1, float32.info.num_tokens), -10, np.float32)
    spoken[:, 9] = -0.01
    (event,) = utterance.advance(np.zeros((1, float32.info.dim), np.float32), spoken)
    assert event.start_s == pytest.approx(100 * 0.04)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_refused_and_change_nothing(float32: Bundle, sound: Floats, value):
    stream = Stream(float32, GREEDY)
    events = stream.accept(sound[:20000])
    bad = sound[20000:30000].copy()
    bad[[77, 99]] = value
    with pytest.raises(AudioError, match=r"2 samples are NaN or infinite, the first is sample 20,077"):
        stream.accept(bad)
    events += stream.accept(sound[20000:]) + stream.finish()
    assert events == run(float32, sound, GREEDY, [len(sound)])


def test_samples_of_another_kind_are_refused(float32: Bundle):
    stream = Stream(float32, GREEDY)
    for bad in (np.zeros(10, np.int16), np.zeros((2, 10), np.float32)):
        with pytest.raises(ValueError, match="expected float32"):
            stream.accept(bad)
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.accept(np.zeros(10, np.float32))


@pytest.mark.parametrize("num_samples", [0, 1, 79, 320])
@pytest.mark.parametrize("look_ahead", [0, 3])
def test_almost_nothing_is_no_error(float32: Bundle, num_samples: int, look_ahead: int):
    for mode in ("ctc-prefix", "rescore"):
        config = StreamConfig(mode=mode, look_ahead=look_ahead)
        events = run(float32, np.zeros(num_samples, np.float32), config, [160])
        assert all(event.text for event in events if event.final)


def test_digital_silence_and_full_scale_stay_finite(float32: Bundle):
    square = np.sign(np.sin(np.arange(48000) * 0.05)).astype(np.float32)
    for samples in (np.zeros(48000, np.float32), square, square * 1e6):
        for event in run(float32, samples, StreamConfig(mode="rescore"), [8000]):
            assert all(0 <= word.confidence <= 1 for word in event.words)


def test_settings_that_are_not_possible(float32: Bundle):
    with pytest.raises(BundleError, match="not a multiple of 40 ms"):
        Stream(float32, StreamConfig(chunk_ms=100))
    with pytest.raises(ConfigError, match="needs a limit"):
        StreamConfig(left_chunks=-1)
    with pytest.raises(ConfigError, match="look_ahead is -1"):
        StreamConfig(look_ahead=-1)
    with pytest.raises(ConfigError, match=r"look_ahead of 1000 chunks in each of 2 layers is 1,280 s"):
        Stream(float32, StreamConfig(chunk_ms=640, look_ahead=1000))
    with pytest.raises(ConfigError, match=r"a chunk of 1,000 s, expected at most 60"):
        Stream(float32, StreamConfig(chunk_ms=1_000_000))
    with pytest.raises(ConfigError, match=r"left context of 6,400 s, expected at most 600"):
        Stream(float32, StreamConfig(chunk_ms=640, left_chunks=10_000))
    with pytest.raises(BundleError, match="a chunk of 0 ms"):
        Stream(float32, StreamConfig(chunk_ms=0, look_ahead=1))
    with pytest.raises(ConfigError, match="no such mode: magic"):
        StreamConfig(mode="magic")
    with pytest.raises(ConfigError, match="chunks_per_call"):
        StreamConfig(chunks_per_call=0)


def feed(stream: Stream, block: Floats, seconds: float) -> None:
    for _ in range(round(seconds * 16000 / len(block))):
        stream.accept(block)


def weight(thing: Any) -> int:
    """Bytes of arrays and number of objects that a stream holds, without its model."""
    if isinstance(thing, np.ndarray):
        return weight(thing.base) if thing.base is not None else thing.nbytes
    if isinstance(thing, OnnxScorer | Bundle | StreamConfig):
        return 0
    if isinstance(thing, dict):
        return sum(map(weight, thing.values()))
    if isinstance(thing, list | tuple):
        return sum(map(weight, thing))
    return 1 + (weight(vars(thing)) if hasattr(thing, "__dict__") else 0)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.parametrize("mode", ["ctc-prefix", "rescore"])
def test_memory_does_not_grow(float32: Bundle, mode: str):
    stream = Stream(float32, StreamConfig(mode=mode, endpoint=EndpointConfig(max_s=6.0), chunks_per_call=4))
    block = made_sound(10.0, 16000)
    weights = []
    feed(stream, block, 30.0)
    before_mb = resident_mb()
    for _ in range(10):
        feed(stream, block, 30.0)
        weights.append(weight(stream))
    assert max(weights[5:]) < 1.2 * max(weights[:5])
    assert max(weights) < 1_000_000
    assert resident_mb() - before_mb < 10


@pytest.mark.slow
def test_memory_does_not_grow_in_three_hours(int8: Bundle):
    stream = Stream(int8, StreamConfig(mode="rescore", chunks_per_call=4))
    block = made_sound(60.0, 16000)
    feed(stream, block, 600.0)
    before_mb = resident_mb()
    feed(stream, block, 3 * 3600.0)
    assert resident_mb() - before_mb < 20
    assert stream.duration_s == 600.0 + 3 * 3600.0


@pytest.mark.slow
def test_the_last_minute_of_an_hour_is_what_a_fresh_stream_hears(float32: Bundle):
    """For audio that repeats every 64 s, a hundred chunks, and ends with silence each time."""
    block = made_sound(64.0, 16000)
    block[-5 * 16000 :] = 0
    config = StreamConfig(mode="rescore", chunks_per_call=4)

    def hear(times: int) -> list[tuple[str, float]]:
        """The final texts of the last repetition, and their start times in it."""
        stream, start_s = Stream(float32, config), (times - 1) * 64.0
        events = [event for _ in range(times) for event in stream.accept(block)] + stream.finish()
        return [(e.text, round(e.start_s - start_s, 6)) for e in events if e.final and e.start_s >= start_s]

    found = hear(57)
    assert len(found) > 3
    assert found == hear(2)


def test_times_are_exact_after_a_year(float32: Bundle, sound: Floats):
    """Counts are integers: a stream that starts far from zero gives the same, shifted in time."""
    frames = 2**30
    config = replace(GREEDY, chunk_ms=320)
    expected = run(float32, sound, config, [3200])
    stream = Stream(float32, config)
    stream._utterance.first_frame = frames
    found = stream.accept(sound) + stream.finish()
    assert [event.text for event in found] == [event.text for event in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.start_s - frames * 0.04 == pytest.approx(b.start_s, abs=1e-6)
