"""A causal Zipformer in released sherpa-onnx: the state that its runtime keeps, and its results."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from asr.audio import read
from asr.context import Context
from asr.decode.ctc import CtcGreedy
from asr.decode.scorer import Floats
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.decoder import DecoderConfig
from asr.model.hybrid import HybridModel
from asr.model.masks import ChunkConfig
from asr.model.torch_scorer import TorchScorer
from asr.model.zipformer import ZipformerConfig
from asr.tokens import load_tokenizer
from export.bundle import Origin
from export.sherpa import CONTRACTS, artefacts
from export.sherpa_bundle import write_sherpa
from export.sherpa_evaluation import SherpaEvaluator, zipformer_silence
from export.verify import Utterance, made_sound

CONTEXT, SHIFT, LENGTH = Context(16, 4), 64, 77
"""For the graph of `zipformer_model`; the last two in feature frames, with an overlap between calls."""

RECOGNIZE = """
import json, sys
import numpy as np, sherpa_onnx
folder, end, audio = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
recognizer = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(
    model=f"{folder}/model{end}", tokens=f"{folder}/tokens.txt")
samples = [audio[f"arr_{i}"] for i in range(len(audio.files))]
streams = [recognizer.create_stream() for _ in samples]
for start in range(0, max(map(len, samples)), 1600):
    for stream, x in zip(streams, samples):
        if start < len(x):
            stream.accept_waveform(16000, x[start : start + 1600])
    while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
        recognizer.decode_streams(ready)
print(json.dumps([recognizer.tokens(stream) for stream in streams]))
"""


def recognized(folder: Path, samples: Sequence[Floats], end: str = ".onnx") -> list[list[str]]:
    """Units by sherpa-onnx, all streams at once, fed 0.1 s at a time."""
    pytest.importorskip("sherpa_onnx")
    path = folder / "samples.npz"
    np.savez(path, *samples)
    command = [sys.executable, "-c", RECOGNIZE, str(folder / "zipformer"), end, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def chunks_heard(num_samples: int) -> int:
    """The number of chunks that it decodes: each needs its overlap and one more frame."""
    num_frames = (num_samples - 280) // 160 + 1
    return len(range(0, num_frames - LENGTH, SHIFT))


def written(model: HybridModel, tokens: Path, samples: Floats) -> list[str]:
    """The model's units for the same chunks."""
    (log_probs,), _ = TorchScorer(model, "cpu").encode([samples], CONTEXT)
    search = CtcGreedy()
    search.advance(log_probs[: CONTEXT.chunk * chunks_heard(len(samples))])
    symbols = load_tokenizer(tokens).symbols
    return [symbols[token].replace("▁", " ") for token in search.best().tokens]


def with_silence(samples: Floats) -> Floats:
    return np.append(samples, np.zeros(zipformer_silence(SHIFT, 16000), np.float32))


@pytest.fixture(scope="module")
def utterances(request: pytest.FixtureRequest) -> list[Floats]:
    """Eight real ones of one to four seconds, or synthetic ones if there are none."""
    try:
        folder: Path = request.getfixturevalue("speech_data")
    except pytest.skip.Exception:
        return [made_sound(1 + 0.37 * i, 16000) for i in range(8)]
    paths = sorted((folder / "librispeech_mini").rglob("*.opus"))[:8]
    return [read(path, 16000)[: 16000 + 5000 * i] for i, path in enumerate(paths)]


@pytest.fixture(scope="module")
def sherpa(zipformer_model: HybridModel, tiny_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sherpa") / "tiny"
    write_sherpa(zipformer_model, tiny_tokens, Origin("tiny", "Apache-2.0"), out, only=["zipformer"])
    return out


@pytest.mark.slow
def test_streams_side_by_side_are_heard_as_the_model_hears_them(
    sherpa, zipformer_model, tiny_tokens, utterances
):
    samples = [with_silence(x) for x in utterances]
    expected = [written(zipformer_model, tiny_tokens, x) for x in samples]
    assert min(map(len, expected)) >= 3
    assert recognized(sherpa, samples) == expected
    assert recognized(sherpa, samples[2:3]) == expected[2:3]


@pytest.mark.slow
def test_with_silence_behind_it_an_utterance_is_heard_up_to_its_end(
    sherpa, zipformer_model, tiny_tokens, utterances
):
    samples = [utterances[-1][: 20000 + 640 * i] for i in range(17)]
    padded = [with_silence(x) for x in samples]
    for x, y in zip(samples, padded, strict=True):
        assert 160 * SHIFT * chunks_heard(len(y)) >= len(x)
    assert recognized(sherpa, padded) == [written(zipformer_model, tiny_tokens, x) for x in padded]


@pytest.mark.slow
def test_8_bit_graphs_are_heard(sherpa, utterances):
    """Random weights cannot show the loss of 8 bits, only that the graphs run and give similar texts."""
    samples = [with_silence(x) for x in utterances]
    exact, quantized = (sum(map(len, recognized(sherpa, samples, end))) for end in (".onnx", ".int8.onnx"))
    assert 0.5 < quantized / exact < 2


@pytest.mark.slow
def test_what_a_limit_is_measured_on_is_what_sherpa_hears(sherpa, zipformer_model, tiny_tokens, utterances):
    heard = [Utterance(str(n), x, "") for n, x in enumerate(utterances)]
    tokenizer = load_tokenizer(tiny_tokens)
    evaluator = SherpaEvaluator("zipformer", zipformer_model, tokenizer, heard)
    graphs = {"model": onnx.load(sherpa / "zipformer" / "model.onnx")}
    numbers = {symbol.replace("▁", " "): i for i, symbol in enumerate(tokenizer.symbols)}
    theirs = recognized(sherpa, [with_silence(x) for x in utterances])
    for n, symbols in enumerate(theirs):
        expected = tokenizer.decode([numbers[symbol] for symbol in symbols])
        assert evaluator.texts(graphs, n)["zipformer"] == expected


@pytest.mark.slow
def test_a_folder_says_how_it_is_used(sherpa):
    readme = (sherpa / "README.md").read_text()
    assert "from_zipformer2_ctc" in readme
    assert "A chunk is 640 ms" in readme


def made_of(metadata: dict[str, Any], n: int) -> list[Tensor]:
    """The states of n new streams, as the C++ code creates them from the metadata."""
    names = ("encoder_dims", "query_head_dims", "value_head_dims", "num_heads", "num_encoder_layers")
    names += ("cnn_module_kernels", "left_context_len")
    states = []
    for row in zip(*(map(int, metadata[name].split(",")) for name in names), strict=True):
        dim, query_dim, value_dim, heads, depth, kernel, left = row
        values, side = (left, n, value_dim * heads), (n, dim, kernel // 2)
        shapes = [(left, n, query_dim * heads), (1, n, left, 3 * dim // 4), values, values, side, side]
        states += depth * [torch.zeros(shape) for shape in shapes]
    return [*states, torch.zeros(n, 128, 3, 19), torch.zeros(n, dtype=torch.int64)]


@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_states_of_sherpa_hold_the_whole_state(chunk):
    """Its loop over chunks, with states that start at zero, equals the masked whole utterance."""
    config = ZipformerConfig(
        dims=[16, 24, 20],
        unmasked_dims=[8, 8, 8],
        rates=[1, 4, 2],
        depths=[1, 2, 1],
        num_heads=[2, 3, 2],
        query_dims=[8, 4, 8],
        value_dims=[8, 6, 4],
        position_head_dims=[2, 2, 2],
        position_dim=8,
        ff_dims=[16, 16, 16],
        kernel_sizes=[7, 3, 5],
        causal=True,
        chunk=ChunkConfig(chunks=[chunk, 0]),
    )
    decoder = DecoderConfig(dim=16, num_layers=1, num_heads=2, ff_dim=16)
    model = build_model(FbankConfig(scale=0.5), config, decoder, LossConfig(), 9).eval()
    artefact = CONTRACTS["zipformer"][1](model)
    module, num_chunks = artefact.graphs["model"].module, 7
    length, shift = artefact.metadata["T"], artefact.metadata["decode_chunk_len"]
    assert (length, shift) == (4 * chunk + 13, 4 * chunk)
    x = torch.randn(2, shift * (num_chunks - 1) + length, 80) - 8
    states, found = made_of(artefact.metadata, 2), []
    with torch.inference_mode():
        for start in range(0, shift * num_chunks, shift):
            log_probs, *after = module(x[:, start : start + length], *states)
            assert [y.shape for y in after] == [y.shape for y in states]
            states = after
            found.append(log_probs)
        lens = torch.tensor(2 * [x.shape[1]])
        y, _ = model.encode(model.cmvn(x + 2 * np.log(0.5)), lens, Context(chunk, 4, 0))
        expected = model.ctc_log_probs(y)[:, : num_chunks * chunk]
    assert states[-1].tolist() == 2 * [2 * num_chunks * chunk]  # frames of the front end
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"causal": False}, "encoder.causal is false"),
        ({"chunk": ChunkConfig(dynamic=False)}, "names no chunk that the model was trained with"),
        ({"chunk": ChunkConfig(chunks=[0])}, "names no chunk that the model was trained with"),
    ],
)
def test_what_has_no_fixed_chunk_is_refused(zipformer_model, monkeypatch, changed, reason):
    config = replace(zipformer_model.encoder.config, **changed)
    monkeypatch.setattr(zipformer_model.encoder, "config", config)
    assert reason in artefacts(zipformer_model)[1]["zipformer"]
