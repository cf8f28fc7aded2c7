"""A chunked decoder in a bundle: the same as in torch, offline and as a stream."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest

from asr.context import Context
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Chunking
from asr.model.chunked import ChunkedConfig, ChunkedDecoder
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle, Stream, StreamConfig
from asr.runtime.endpoint import EndpointConfig
from asr.runtime.info import read_info
from asr.runtime.onnx_scorer import OnnxScorer
from export.bundle import Origin, describe

SEARCH = SearchConfig(beam=4, nbest=3, max_labels_per_chunk=2)
CHUNK, LEFT = 8, 4


@pytest.fixture(scope="module", params=[True, False], ids=["hears-eoc", "deaf"])
def model(tiny_model, request):
    """With the parameters of the plain decoder, and so with its graphs."""
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ff_dim": 64}
    config = ChunkedConfig(**sizes, step_frames=10, window_frames=13, left_frames=2, hears_eoc=request.param)
    chunked = copy.deepcopy(tiny_model)
    chunked.decoder = ChunkedDecoder(config, chunked.ctc.out_features, chunked.encoder.dim).eval()
    chunked.decoder.load_state_dict(tiny_model.decoder.state_dict())
    chunked.reverse_decoder = None
    return chunked


@pytest.fixture(scope="module")
def bundle(model, tiny_bundles, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("chunked") / "bundle"
    shutil.copytree(tiny_bundles / "cpu-fp32", folder)
    info = describe(model, folder, "cpu-fp32", Origin("tiny", "Apache-2.0"))
    replace(info, files=read_info(folder).files).write(folder)
    return Bundle.load(folder)


def test_what_is_heard_is_in_the_bundle(model, bundle):
    expected = Chunking(10, 13, 2, model.decoder.config.hears_eoc)
    assert bundle.info.decoder_type == "chunked"
    assert OnnxScorer(bundle).chunking == TorchScorer(model, "cpu").chunking == expected


def test_the_graphs_find_what_torch_finds(model, bundle, sound):
    samples = [sound[:48000], np.zeros(0, np.float32), sound[:320], sound[30000:50000]]
    scorers = TorchScorer(model, "cpu"), OnnxScorer(bundle)
    expected, found = (decode(scorer, "chunked", samples, SEARCH, Context(CHUNK, LEFT)) for scorer in scorers)
    for a, b in zip(expected, found, strict=True):
        assert [(x.tokens, x.frames) for x in a] == [(x.tokens, x.frames) for x in b]
        np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=1e-4, atol=1e-3)
    assert len(found[0][0].tokens) > 5


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("block", [4000, 48000])
def test_a_stream_says_what_is_found_at_once(bundle, sound, block, right):
    """And shows the start of it before the end."""
    (nbest,) = decode(OnnxScorer(bundle), "chunked", [sound[:48000]], SEARCH, Context(CHUNK, LEFT, right))
    never = EndpointConfig(trailing_s=100, silence_s=100, max_s=100)
    config = StreamConfig(
        mode="chunked",
        chunk_ms=40 * CHUNK,
        left_chunks=LEFT,
        look_ahead=right,
        search=SEARCH,
        endpoint=never,
    )
    stream = Stream(bundle, config)
    events = [
        event for n in range(0, 48000, block) for event in stream.accept(sound[n : min(n + block, 48000)])
    ]
    final = [event for event in stream.finish() if event.final]
    assert [event.text for event in final] == [bundle.tokenizer.decode(nbest[0].tokens)]
    assert len([event for event in events if event.text and not event.final]) > 2


@pytest.mark.slow
def test_a_hundred_real_utterances_in_streams(writes_as_torch, model, bundle):
    writes_as_torch(TorchScorer(model, "cpu"), bundle, "chunked", SEARCH)
