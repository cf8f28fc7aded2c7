"""Bundles without CTC whose encoder needs whole utterances, and their streams."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.modes import WITHOUT_CTC, decode
from asr.decode.scorer import Floats
from asr.errors import AudioError, BundleError, ConfigError
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle, EndpointConfig, Stream, StreamConfig, WholeStream, open_stream
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.whole import Loudness
from export.verify import at_once, contexts, encoding, made_sound, possible_contexts


@pytest.fixture(scope="session")
def bundle(whole_bundle: Path) -> Bundle:
    return Bundle.load(whole_bundle)


@pytest.fixture(scope="session")
def scorers(whole_model: HybridModel, bundle: Bundle) -> tuple[TorchScorer, OnnxScorer]:
    return TorchScorer(whole_model, "cpu", bundle.word_starts, bundle.tokenizer.symbols), OnnxScorer(bundle)


def pieces(*parts: tuple[float, float]) -> Floats:
    """Noise, (seconds, loudness) each."""
    sound = np.random.default_rng(0).normal(0, 1, int(16000 * sum(s for s, _ in parts)))
    loudness = np.concatenate([np.full(int(16000 * s), level) for s, level in parts])
    return (sound[: len(loudness)] * loudness).astype(np.float32)


def test_model_json_says_what_is_not_there(bundle: Bundle, whole_bundle: Path):
    info = bundle.info
    assert (info.streaming, info.encoder_state, info.has_ctc) == (None, (), False)
    assert (info.prompt, info.context_inputs, contexts(info)) == (("▁the", "a"), (), [WHOLE])
    graph = onnx.load(whole_bundle / "encoder.onnx").graph
    assert [x.name for x in graph.input] == ["window", "num_frames"]
    assert [x.name for x in graph.output] == ["y", "y_lens"]


@pytest.mark.parametrize("num_samples", [7 * 16000 - 333, 16000, 1500, 300])
def test_graphs_are_the_model(
    scorers: tuple[TorchScorer, OnnxScorer], bundle: Bundle, sound: Floats, num_samples: int
):
    samples = sound[:num_samples]
    (context,) = possible_contexts(bundle.info)
    expected, found = at_once(scorers[0], WHOLE)(samples), encoding(bundle, context)(samples)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - at_once(scorers[0], WHOLE)(sound[20000:50000])).max() > 1e-3


@pytest.mark.parametrize("mode", WITHOUT_CTC)
@pytest.mark.parametrize("prompt", [None, (), ("b", 7)])
def test_searches_find_the_same_in_torch_and_onnx(
    scorers: tuple[TorchScorer, OnnxScorer], sound: Floats, mode: str, prompt: tuple[int | str, ...] | None
):
    config = SearchConfig(beam=4, nbest=2, prompt=prompt)
    samples = [sound[:32000], sound[40000:60000], sound[:60], sound[:0]]
    expected, found = (decode(scorer, mode, samples, config) for scorer in scorers)
    for a, b in zip(expected, found, strict=True):
        assert [(x.tokens, x.frames, x.guard) for x in a] == [(x.tokens, x.frames, x.guard) for x in b]
        np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=1e-4, atol=1e-3)
    assert any(x[0].tokens for x in found)


def test_scores_are_those_behind_the_prompt(scorers: tuple[TorchScorer, OnnxScorer], sound: Floats):
    texts, owner = [(5, 6, 7), (), (9,)], np.array([0, 1, 0])
    answers = []
    for scorer in scorers:
        _, memory = scorer.encode([sound, sound[:20000]])
        answers.append(scorer.score(memory, owner, texts, prompt=(20, 4)))
        longer = scorer.score(memory, owner, [(20, 4, *x) for x in texts])
        for a, b, text in zip(answers[-1], longer, texts, strict=True):
            assert len(a) == len(text) + 1
            np.testing.assert_allclose(a, b[2:], rtol=0, atol=1e-5)
    for a, b in zip(*answers, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_what_cannot_be_is_refused_with_a_way_out(bundle: Bundle, sound: Floats):
    with pytest.raises(BundleError, match=r"no CTC head.*open_stream"):
        Stream(bundle)
    for config in (StreamConfig(chunk_ms=640), StreamConfig(left_chunks=2), StreamConfig(look_ahead=1)):
        with pytest.raises(BundleError, match="takes whole utterances, and has no chunks; leave out chunk"):
            open_stream(bundle, config)
    with pytest.raises(BundleError, match=r"cannot stream; use asr decode without --chunk-ms"):
        OnnxScorer(bundle).encode([sound], Context(8, 2))
    with pytest.raises(ConfigError, match=r"mode joint: this model has no CTC head.*attention, unbounded"):
        open_stream(bundle, StreamConfig(mode="joint"))
    stream = open_stream(bundle)
    with pytest.raises(AudioError, match="1 samples are NaN or infinite"):
        stream.accept(np.array([0, np.nan], np.float32))
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.accept(sound)


def test_models_with_ctc_that_can_stream_do_so(float32: Bundle):
    assert isinstance(open_stream(float32), Stream)


@pytest.mark.parametrize("size", [160, 333, 50000])
def test_each_utterance_is_decoded_when_it_has_ended(bundle: Bundle, size: int):
    sound = pieces((0.4, 0.001), (1.2, 0.2), (1.0, 0.001), (0.8, 0.1), (1.2, 0.001), (0.6, 0.3))
    stream, events, heard_s = open_stream(bundle), [], []
    assert isinstance(stream, WholeStream)
    for start in range(0, len(sound), size):
        found = stream.accept(sound[start : start + size])
        events += found
        heard_s += [stream.duration_s] * len(found)
    events += stream.finish()
    assert stream.encoded_s == stream.duration_s == len(sound) / 16000
    assert len(events) == 3
    assert all(event.final for event in events)
    assert heard_s == pytest.approx([2.4, 4.2], abs=0.05 + size / 16000)
    scorer = OnnxScorer(bundle)
    (alone,) = decode(scorer, "attention", [sound[: int(2.4 * 16000)]], SearchConfig())[0]
    assert events[0].text == bundle.tokenizer.decode(alone.tokens)
    assert events[0].end_s <= events[1].start_s + 0.9


def test_what_is_too_long_is_cut_where_it_is_quietest(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    lens = []
    encode = OnnxScorer.encode

    def counted(self, samples, context=WHOLE):
        lens.append(len(samples[0]))
        return encode(self, samples, context)

    monkeypatch.setattr(OnnxScorer, "encode", counted)
    sound = pieces((2.2, 0.2), (0.08, 0.02), (1.0, 0.2))
    stream = open_stream(bundle, StreamConfig(endpoint=EndpointConfig(max_s=2.0)))
    stream.accept(sound)
    stream.finish()
    assert sum(lens) == len(sound)
    assert lens[0] / 16000 == pytest.approx(2.2, abs=0.08)


def test_long_silence_is_not_decoded(bundle: Bundle):
    stream = open_stream(bundle)
    assert stream.accept(pieces((6.0, 0.0005))) == []
    assert stream.encoded_s > 4


def test_noise_that_lasts_becomes_silence():
    loudness = Loudness(num_recent=50)
    noise, voice = made_sound(2.0, 16000)[:640] * 0 + 0.02, np.full(640, 0.3, np.float32)
    assert not loudness.judge(noise)[1]
    for _ in range(60):
        loudness.judge(noise)
    assert loudness.judge(noise)[1]
    assert not loudness.judge(voice)[1]
    assert loudness.judge(noise * 0)[1]
