"""Every family goes the whole way: source, experiment, graphs that are the checkpoint, words of a sound."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asr.audio import write
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle
from asr.runtime.onnx_scorer import OnnxScorer
from asr.train.checkpoint import load_model
from export.verify import Utterance, count_same_searches, made_sound

from .sources import (
    MARKS,
    GoldenSet,
    nemo_options,
    pack,
    pieces,
    write_firered,
    write_icefall,
    write_whisper,
)


def write_nemo(reference: GoldenSet, folder: Path) -> Path:
    folder.mkdir()
    units = pieces(reference.config["vocab_size"], MARKS if "transf_decoder" in reference.config else [])
    return pack(folder / "a.nemo", nemo_options(reference.config), reference.weights, units)


def write_streaming_nemo(reference: GoldenSet, folder: Path) -> Path:
    """The reference has an encoder only, and features of streams are not normalised."""
    folder.mkdir()
    options = nemo_options(reference.config)
    options["preprocessor"]["normalize"] = "NA"
    count, dim = 20, reference.config["encoder"]["d_model"]
    head = torch.randn(count + 1, dim, 1, generator=torch.Generator().manual_seed(0))
    made = {"decoder.decoder_layers.0.weight": head, "decoder.decoder_layers.0.bias": torch.zeros(count + 1)}
    return pack(folder / "a.nemo", options, reference.weights | made, pieces(count, []))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "write_source", "streams"),
    [
        ("icefall", "icefall_zipformer2", write_icefall, False),
        ("icefall", "icefall_zipformer2_causal", write_icefall, True),
        ("nemo", "nemo_fastconformer", write_nemo, False),
        ("nemo", "nemo_fastconformer_streaming", write_streaming_nemo, True),
        ("nemo", "nemo_canary_aed", write_nemo, False),
        ("firered", "fireredasr_aed", write_firered, False),
        ("whisper", "openai_whisper", write_whisper, False),
    ],
)
def test_a_public_model_becomes_a_bundle_that_writes(
    asr: Callable,
    golden_set: Callable[[str], GoldenSet],
    tmp_path: Path,
    family: str,
    name: str,
    write_source: Callable[[GoldenSet, Path], Path],
    streams: bool,
):
    source = write_source(golden_set(name), tmp_path / "source")
    assert asr("convert", family, source, "-o", tmp_path / "exp")[0] == 0
    status, out, err = asr("export", tmp_path / "exp", "--target", "cpu-fp32", "-o", tmp_path / "bundle")
    assert (status, err) == (0, "")
    assert "max |Δ log p|" in out
    bundle = Bundle.load(tmp_path / "bundle")
    assert (bundle.info.streaming is not None) == streams
    sound = made_sound(1.0, bundle.info.features.sample_rate)
    write(tmp_path / "a.wav", sound)
    assert asr("transcribe", tmp_path / "bundle", tmp_path / "a.wav")[0] == 0
    model, tokenizer, _ = load_model(tmp_path / "exp")
    torch_scorer = TorchScorer(model, "cpu", bundle.word_starts, tokenizer.symbols)
    assert count_same_searches("", torch_scorer, OnnxScorer(bundle), [Utterance("a", sound, "")]) == 1
