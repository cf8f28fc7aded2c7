"""A chunked decoder from its graphs: what torch says, at once and as a stream."""

import numpy as np
import pytest
import torch

from asr.decode.config import SearchConfig
from asr.decode.modes import ONLINE
from asr.decode.online import search_online
from asr.decode.scorer import Chunking
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.chunked import ChunkedConfig
from asr.model.conformer import ConformerConfig
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle
from asr.runtime.endpoint import EndpointConfig
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.utterance import StreamConfig, Utterance
from export.bundle import Origin, describe, write_bundle
from export.onnx import decoder_trace, export, memory_trace

CONFIG = SearchConfig(beam=4, nbest=4, max_labels_per_chunk=3)


@pytest.fixture(scope="module", params=[True, False], ids=["hears-eoc", "deaf"])
def model(request):
    sizes = {"num_layers": 1, "num_heads": 2, "ff_dim": 32}
    encoder = ConformerConfig(dim=24, subsampling_channels=4, **sizes)
    chunks = {"step_frames": 5, "window_frames": 7, "left_frames": 1, "hears_eoc": request.param}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        decoder = ChunkedConfig(dim=16, **sizes, **chunks)
        model = build_model(FbankConfig(num_bins=16), encoder, decoder, LossConfig(), 12).eval()
    with torch.no_grad():
        model.decoder.out.weight.mul_(12)
    return model


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Bundle:
    """Without its encoder, as that takes long: what is heard is made up."""
    folder = tmp_path_factory.mktemp("chunked")
    symbols = ["<blk>", "<sos/eos>", *"abcdefghi", "▁"]
    (folder / "tokens.txt").write_text("".join(f"{symbol} {i}\n" for i, symbol in enumerate(symbols)))
    memory, decoder = (
        export(f(model), name) for f, name in ((memory_trace, "memory"), (decoder_trace, "decoder"))
    )
    info = describe(model, folder, "cpu-fp32", Origin("tiny", "Apache-2.0"))
    write_bundle({"encoder": memory, "memory": memory, "decoder": decoder}, info, folder, folder / "bundle")
    return Bundle.load(folder / "bundle")


def heard(model, num_frames):
    """Encoder output (T, C), and what CTC says of it (T, V)."""
    y = torch.randn(num_frames, 24, generator=torch.Generator().manual_seed(num_frames)) * 2
    with torch.no_grad():
        return y.numpy(), model.ctc_log_probs(y * 3).numpy()


def test_the_graphs_find_what_torch_finds(model, bundle):
    ys, log_probs = zip(*(heard(model, n) for n in (23, 5, 1, 14)), strict=True)
    answers = []
    for scorer in (TorchScorer(model, "cpu"), OnnxScorer(bundle)):
        assert scorer.chunking == Chunking(5, 7, 1, model.decoder.config.hears_eoc)
        found = []
        for y, frames in zip(ys, log_probs, strict=True):
            memory = scorer.grow(None, y)
            found += search_online(ONLINE["chunked"], scorer, [frames], memory, CONFIG, 0)
        answers.append(found)
    for a, b in zip(*answers, strict=True):
        assert [(x.tokens, x.frames) for x in a] == [(x.tokens, x.frames) for x in b]
        np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=0, atol=1e-3)
        np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=1e-5, atol=1e-4)
    assert any(x[0].tokens for x in answers[0])


@pytest.mark.parametrize("size", [1, 4, 30])
def test_a_stream_says_what_is_found_at_once(model, bundle, size):
    """And it says so as it goes."""
    scorer = OnnxScorer(bundle)
    y, log_probs = heard(model, 23)
    (nbest,) = search_online(ONLINE["chunked"], scorer, [log_probs], scorer.memory([y]), CONFIG, 0)
    never = EndpointConfig(enabled=False)
    utterance = Utterance(scorer, StreamConfig(mode="chunked", search=CONFIG, endpoint=never))
    events = []
    for first in range(0, 23, size):
        events += utterance.advance(y[first : first + size], log_probs[first : first + size])
    partial, final = events, utterance.end()
    assert [event.text for event in final] == [bundle.tokenizer.decode(nbest[0].tokens)]
    assert all(event.text and not event.final for event in partial)
    assert partial
