"""A segmental decoder as ONNX graphs: the same as in torch, offline and as a stream."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.modes import NEEDS, decode
from asr.decode.scorer import Floats, Window
from asr.model.hybrid import HybridModel
from asr.model.segmental import SegmentalConfig, SegmentalDecoder
from asr.model.torch_scorer import TorchScorer
from asr.runtime.bundle import Bundle
from asr.runtime.endpoint import EndpointConfig
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import Stream
from asr.runtime.utterance import StreamConfig
from export.bundle import Origin, describe, write_bundle
from export.evaluation import BundleEvaluator
from export.gate import rank
from export.onnx import decoder_trace, export, length_trace, memory_trace, with_best
from export.quantize import modules, quantize
from export.verify import Utterance

MODES = [mode for mode, decoder in NEEDS.items() if decoder == "segmental"]
NO_ENDPOINTS = EndpointConfig(trailing_s=1e6, silence_s=1e6, max_s=1e6)


@pytest.fixture(scope="module")
def model(tiny_model: HybridModel) -> HybridModel:
    """The encoder of `tiny_model`, and a segmental decoder that emits a token every few frames."""
    model = copy.copy(tiny_model)
    model._modules = dict(tiny_model._modules)
    config = SegmentalConfig(dim=32, num_layers=1, num_heads=2, ff_dim=64, max_segment_frames=6, length_dim=8)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        model.decoder = SegmentalDecoder(config, model.ctc.out_features, model.encoder.dim).eval()
        model.reverse_decoder = None
        model.decoder.out.weight *= 4
        model.decoder.length.out.weight *= 4
        model.decoder.length.count(torch.randint(2, 22, (500,)), torch.randint(1, 9, (500,)))
    return model


@pytest.fixture(scope="module")
def bundles(model: HybridModel, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cpu-fp32 and cpu-int8; the encoder's graph is that of `tiny_bundles`."""
    folder = tmp_path_factory.mktemp("segmental")
    traces = {
        "memory": memory_trace(model),
        "decoder": decoder_trace(model),
        "length": length_trace(model, model.decoder.length),
    }
    graphs = {name: export(trace, name) for name, trace in traces.items()}
    graphs["decoder"] = with_best(graphs["decoder"])
    for target in ("cpu-fp32", "cpu-int8"):
        built = {name: quantize(x) for name, x in graphs.items()} if target == "cpu-int8" else graphs
        built = {"encoder": onnx.load(tiny_bundles / target / "encoder.onnx"), **built}
        info = describe(model, tiny_bundles, target, Origin("tiny", "Apache-2.0"))
        write_bundle(built, info, tiny_bundles, folder / target)
    return folder


@pytest.fixture(scope="module")
def scorers(model: HybridModel, bundles: Path) -> tuple[TorchScorer, OnnxScorer]:
    return TorchScorer(model, "cpu"), OnnxScorer(Bundle.load(bundles / "cpu-fp32"))


def test_lengths_are_the_same_in_torch_and_onnx(
    scorers: tuple[TorchScorer, OnnxScorer], bundles: Path, sound: Floats
):
    scorers = (*scorers, OnnxScorer(Bundle.load(bundles / "cpu-int8")))
    frames, labels, durations = np.array([3, 0, 20, 3]), np.array([1, 5, 21, 2]), np.array([1, 2, 50, 6])
    odds, lengths = [], []
    for scorer in scorers:
        _, memory = scorer.encode([sound])
        odds.append(scorer.emit(memory, frames, labels, durations))
        lengths.append(scorer.log_lengths())
        assert len(scorer.emit(memory, *np.zeros((3, 0), np.int64))) == 0
    assert odds[0].std() > 0.1
    assert lengths[0].shape == (22, 6)
    np.testing.assert_allclose(np.exp(lengths[0]).sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(odds[1], odds[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(odds[2], odds[0], rtol=0, atol=0.3)
    for other in lengths[1:]:
        np.testing.assert_allclose(other, lengths[0], rtol=0, atol=1e-5)


def test_hypotheses_of_several_states_are_what_they_were(
    scorers: tuple[TorchScorer, OnnxScorer], sound: Floats
):
    """Joined in another order, with frames that were not there when they began."""
    window = Window(np.array([0, 9, 4]), np.array([6, 12, 5]))
    answers = []
    for scorer in scorers:
        _, memory = scorer.encode([sound])
        early, late = scorer.view(memory, 0, 8), scorer.view(memory, 0, 20)
        one, two = (scorer.start(early, np.zeros(n, np.int64)) for n in (1, 2))
        first = Window(np.array([0, 2]), np.array([3, 5]))
        one = scorer.step(one, np.array([1]), 2, Window(*(x[:1] for x in first))).state
        two = scorer.step(two, np.array([1, 1]), 2, first).state
        together = scorer.join(
            [scorer.select(two, np.array([1])), one, scorer.select(two, np.array([1]))], late
        )
        found = scorer.step(together, np.array([5, 6, 5]), 22, window)
        answers.append(found)
        for row, state in enumerate((scorer.select(two, np.array([1])), one)):
            only = Window(*(x[row : row + 1] for x in window))
            alone = scorer.step(scorer.join([state], late), np.array([[5], [6]][row]), 22, only)
            np.testing.assert_allclose(alone.log_probs[0], found.log_probs[row], rtol=0, atol=1e-5)
    np.testing.assert_allclose(answers[0].log_probs, answers[1].log_probs, rtol=0, atol=1e-4)
    ids, log_probs = answers[1].ids[0], answers[1].log_probs[0]
    assert ids[-1] == 0
    assert log_probs[-1] == -np.inf
    assert np.exp(log_probs[ids > 1]).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [WHOLE, Context(4, 4), Context(4, 4, 1)], ids=str)
def test_every_mode_gives_the_same_from_torch_and_from_onnx(
    scorers: tuple[TorchScorer, OnnxScorer], sound: Floats, mode: str, context: Context
):
    config = SearchConfig(beam=3, nbest=2)
    samples = [sound[:32000], sound[10000:20000], np.zeros(0, np.float32), sound[:320]]
    expected, found = (decode(scorer, mode, samples, config, context) for scorer in scorers)
    for a, b in zip(expected, found, strict=True):
        assert [x.tokens for x in a] == [x.tokens for x in b]
        np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=1e-4, atol=1e-3)
        assert [x.frames for x in a] == [x.frames for x in b]
    assert len(found[0][0].tokens) > 5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["segmental", "segmental-simple"])
def test_a_hundred_real_utterances_in_streams(writes_as_torch, model: HybridModel, bundles: Path, mode: str):
    bundle = Bundle.load(bundles / "cpu-fp32")
    writes_as_torch(TorchScorer(model, "cpu"), bundle, mode, SearchConfig(beam=3))


@pytest.mark.parametrize("right", [0, 2])
@pytest.mark.parametrize("mode", ["segmental", "segmental-simple"])
def test_a_stream_writes_while_it_hears(bundles: Path, sound: Floats, mode: str, right: int):
    bundle = Bundle.load(bundles / "cpu-fp32")
    config = StreamConfig(mode=mode, chunk_ms=320, left_chunks=4, look_ahead=right, endpoint=NO_ENDPOINTS)
    stream = Stream(bundle, config)
    events = [event for part in np.array_split(sound, 10) for event in stream.accept(part)] + stream.finish()
    (final,) = [event for event in events if event.final]
    expected = decode(OnnxScorer(bundle), mode, [sound], config.search, Context(8, 4, right))[0][0]
    assert final.text == bundle.tokenizer.decode(expected.tokens)
    assert len({event.text for event in events if not event.final}) > 3


def test_the_harm_of_the_length_model_is_known(bundles: Path, sound: Floats):
    """It decides where segments end, so by itself it can spoil a segmental mode."""
    folder = bundles / "cpu-fp32"
    graphs = {path.stem: onnx.load(path) for path in folder.glob("*.onnx")}
    evaluator = BundleEvaluator(Bundle.load(folder), [Utterance("made", sound, "")], ["segmental-simple"])
    (reference,) = evaluator._transcribe_probe()
    frames, labels, durations = reference.segments(1)
    assert len(frames) == len(reference.best)
    assert reference.tokens
    for token, start in zip(reference.tokens, reference.frames, strict=True):
        if start + 1 < len(frames) and start + 1 not in reference.frames:
            assert (labels[start + 1], durations[start + 1]) == (token, 1)
    assert (labels[0], durations[0]) == (1, 1)
    order = rank(graphs, quantize, evaluator, ["segmental-simple"], lambda *_: lambda n: None)
    assert set(order) >= set(modules(graphs["length"])) > set()
