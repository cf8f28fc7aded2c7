"""A bundle with a head that counts words uses it; one without refuses the option."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from asr.context import Context
from asr.decode.config import SearchConfig
from asr.decode.scorer import Floats
from asr.errors import ConfigError
from asr.model.fire import Fire
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle, EndpointConfig, Stream, StreamConfig
from asr.runtime.onnx_scorer import OnnxScorer
from export.bundle import Origin, describe, write_bundle
from export.onnx import export, fire_trace

NO_ENDPOINTS = EndpointConfig(trailing_s=1e6, silence_s=1e6, max_s=1e6)
SEARCH = SearchConfig(beam=3, ctc_weight=0.9, margin_frames=2, detect_truncation=True)


@pytest.fixture(scope="module")
def model(tiny_model: HybridModel) -> HybridModel:
    """`tiny_model` with a head that counts about one word in ten frames."""
    model = copy.copy(tiny_model)
    model._modules = dict(tiny_model._modules)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model.fire = Fire(model.encoder.dim).eval()
        model.fire.weight.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def bundle(model: HybridModel, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("fire") / "bundle"
    there = tiny_bundles / "cpu-fp32"
    graphs = {path.stem: onnx.load(path) for path in there.glob("*.onnx")}
    graphs["fire"] = export(fire_trace(model.fire), "fire")
    write_bundle(
        graphs, describe(model, tiny_bundles, "cpu-fp32", Origin("tiny", "Apache-2.0")), there, folder
    )
    return Bundle.load(folder)


def test_the_bundle_says_what_the_checkpoint_says(model: HybridModel, bundle: Bundle, sound: Floats) -> None:
    torches, onnxes = TorchScorer(model, "cpu", bundle.word_starts), OnnxScorer(bundle)
    assert torches.has_fire
    assert onnxes.has_fire
    found = []
    for scorer in (torches, onnxes):
        _, memory = scorer.encode([sound[:30000]], Context(8, 2))
        found.append(scorer.fire(scorer.view(memory, 0, 30)))
    assert found[0].shape == (30,)
    assert found[0].std() > 0.01
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_a_stream_asks_it_and_only_grows(bundle: Bundle, sound: Floats) -> None:
    texts = []
    for search in (SEARCH, replace(SEARCH, detect_truncation=False)):
        config = StreamConfig(mode="alignatt", chunk_ms=320, search=search, endpoint=NO_ENDPOINTS)
        stream = Stream(bundle, config)
        events = [*stream.accept(sound[:45000]), *stream.finish()]
        for event, following in itertools.pairwise(events):
            assert following.text.startswith(event.text)
        texts.append([event.text for event in events])
    assert texts[0] != texts[1]


def test_a_bundle_without_it_refuses(float32: Bundle) -> None:
    assert not OnnxScorer(float32).has_fire
    with pytest.raises(ConfigError, match="detect_truncation"):
        Stream(float32, StreamConfig(mode="alignatt", chunk_ms=320, search=SEARCH)).accept(
            np.zeros(16000, np.float32)
        )
