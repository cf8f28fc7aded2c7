"""Every family end to end: source, experiment, graphs that equal the checkpoint, and a transcript."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from asr.audio import write
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Floats
from asr.decode.whisper_windows import Recording
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle, StreamConfig, WindowStream, open_stream
from asr.runtime.onnx_scorer import OnnxScorer
from asr.serve.background import Background, running
from asr.serve.hub import ServeConfig
from asr.train.checkpoint import load_model
from export.verify import Utterance, count_same_searches, made_sound

from .sources import (
    GoldenSet,
    canary_units,
    nemo_options,
    pack,
    pieces,
    write_firered,
    write_icefall,
    write_wenet,
    write_whisper,
)


def write_u2(reference: GoldenSet, folder: Path) -> Path:
    return write_wenet(folder, reference.config, reference.weights)


def write_nemo(reference: GoldenSet, folder: Path) -> Path:
    folder.mkdir()
    first = canary_units(reference.config) if "transf_decoder" in reference.config else ["<unk>"]
    units = pieces(reference.config["vocab_size"], first)
    return pack(folder / "a.nemo", nemo_options(reference.config), reference.weights, units)


def write_streaming_nemo(reference: GoldenSet, folder: Path) -> Path:
    """The reference has only an encoder; streaming features are not normalised."""
    folder.mkdir()
    options = nemo_options(reference.config)
    options["preprocessor"]["normalize"] = "NA"
    count, dim = 20, reference.config["encoder"]["d_model"]
    head = torch.randn(count + 1, dim, 1, generator=torch.Generator().manual_seed(0))
    made = {"decoder.decoder_layers.0.weight": head, "decoder.decoder_layers.0.bias": torch.zeros(count + 1)}
    return pack(folder / "a.nemo", options, reference.weights | made, pieces(count))


def ask(server: Background, path: Path, **options: Any) -> str:
    """What a server writes for a file."""
    client = openai.OpenAI(api_key="any", base_url=f"{server.http}/v1", max_retries=0)
    options |= {"model": "tiny", "file": path, "response_format": "text"}
    return str(client.audio.transcriptions.create(**options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "write_source", "streams"),
    [
        ("icefall", "icefall_zipformer2", write_icefall, False),
        ("icefall", "icefall_zipformer2_causal", write_icefall, True),
        ("wenet", "wenet_u2pp_conformer", write_u2, True),
        ("wenet", "wenet_conformer_noncausal", write_u2, False),
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
    exp = tmp_path / "exp"
    assert asr("convert", family, source, "-o", exp)[0] == 0
    status, out, err = asr("export", exp, "--target", "cpu-fp32")
    assert (status, err) == (0, "")
    assert "max |Δ log p|" in out
    bundle = Bundle.load(exp)
    assert (bundle.info.streaming is not None) == streams
    sound = made_sound(1.0, bundle.info.features.sample_rate)
    write(tmp_path / "a.wav", sound)
    status, written, _ = asr("transcribe", exp, tmp_path / "a.wav")
    assert status == 0
    with running(bundle, ServeConfig(name="tiny")) as server:
        assert ask(server, tmp_path / "a.wav").split() == written.split()
        if family == "whisper":
            with pytest.raises(openai.BadRequestError, match="language is xx, expected one of"):
                ask(server, tmp_path / "a.wav", language="xx")
            assert ask(server, tmp_path / "a.wav", language="en")
    model, tokenizer, _ = load_model(exp)
    torch_scorer = TorchScorer(model, "cpu", bundle.word_starts, tokenizer.symbols)
    assert count_same_searches("", torch_scorer, OnnxScorer(bundle), [Utterance("a", sound, "")]) == 1


@pytest.mark.slow
def test_whisper_hears_recordings_of_any_length(
    asr: Callable, golden_set: Callable[[str], GoldenSet], tmp_path: Path
):
    """The weights are random, so only equality of the texts is checked."""
    source = write_whisper(golden_set("openai_whisper"), tmp_path / "source")
    assert asr("convert", "whisper", source, "-o", tmp_path / "exp")[0] == 0
    assert asr("export", tmp_path / "exp", "--target", "cpu-fp32", "-o", tmp_path / "bundle")[0] == 0
    bundle = Bundle.load(tmp_path / "bundle")
    window_s = bundle.info.features.max_samples / 16000
    sound, config = made_sound(2.5 * window_s, 16000), SearchConfig(beam=2, timestamps=True)
    model, tokenizer, _ = load_model(tmp_path / "exp")
    onnx, of_torch = OnnxScorer(bundle), TorchScorer(model, "cpu", bundle.word_starts, tokenizer.symbols)
    ((expected,),) = decode(of_torch, "whisper", [sound], config)
    ((found,),) = decode(onnx, "whisper", [sound], config)
    assert found.tokens == expected.tokens
    _, memory = onnx.encode([sound[: bundle.info.features.max_samples]])
    _, other = of_torch.encode([sound[: bundle.info.features.max_samples]])
    shown = [1, *found.tokens[:5]]
    heads = of_torch.listen(other, 0, shown)
    np.testing.assert_allclose(onnx.listen(memory, 0, shown), heads.mean(0, keepdims=True), atol=1e-5)
    for block in (1000, len(sound)):
        stream = open_stream(bundle, StreamConfig(search=config))
        assert isinstance(stream, WindowStream)
        events = [x for i in range(0, len(sound), block) for x in stream.accept(sound[i : i + block])]
        events += stream.finish()
        assert stream.encoded_s == stream.duration_s == pytest.approx(len(sound) / 16000)
        assert [x.text for x in events] == [
            text for text in (tokenizer.decode(part) for part in by_stretch(onnx, sound, config)) if text
        ]
        assert all(x.end_s <= len(sound) / 16000 for x in events)


def by_stretch(scorer: OnnxScorer, sound: Floats, config: SearchConfig) -> list[tuple[int, ...]]:
    recording, found = Recording(scorer, config), []
    while len(sound):
        parts, used = recording.hear(sound[: scorer.max_samples])
        found += [x.tokens for x in parts]
        sound = sound[used:]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "write_source"),
    [
        ("icefall", "icefall_zipformer2_causal", write_icefall),
        ("nemo", "nemo_fastconformer_streaming", write_streaming_nemo),
    ],
)
def test_public_encoders_have_an_8_bit_bundle(
    asr: Callable,
    golden_set: Callable[[str], GoldenSet],
    tmp_path: Path,
    family: str,
    name: str,
    write_source: Callable[[GoldenSet, Path], Path],
):
    source = write_source(golden_set(name), tmp_path / "source")
    assert asr("convert", family, source, "-o", tmp_path / "exp")[0] == 0
    assert asr("export", tmp_path / "exp", "--target", "cpu-int8", "-o", tmp_path / "bundle")[0] == 0
    assert 0 < int8_difference(tmp_path / "exp", tmp_path / "bundle") < 0.25
    write(tmp_path / "a.wav", made_sound(1.0, 16000))
    assert asr("transcribe", tmp_path / "bundle", tmp_path / "a.wav")[0] == 0


def int8_difference(exp: Path, folder: Path) -> float:
    """The largest difference of a log-probability, in standard deviations; most best units are equal."""
    bundle = Bundle.load(folder)
    sound = made_sound(3.0, bundle.info.features.sample_rate)
    model, tokenizer, _ = load_model(exp)
    ((expected,), _) = TorchScorer(model, "cpu", bundle.word_starts, tokenizer.symbols).encode([sound])
    ((found,), _) = OnnxScorer(bundle).encode([sound])
    assert (expected.argmax(1) == found.argmax(1)).mean() > 0.8
    return float(np.abs(expected - found).max() / expected.std())
