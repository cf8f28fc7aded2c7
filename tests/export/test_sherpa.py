"""Released sherpa-onnx gives our models' results; it runs in its own process, as it exits on errors."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.export import Dim

from asr.audio import read
from asr.context import Context
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Floats
from asr.errors import BundleError, ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.tokens import load_tokenizer
from export.bundle import Origin
from export.gate import Limit
from export.onnx import Trace, export
from export.sherpa import CONTRACTS, artefacts
from export.sherpa_bundle import check, write_sherpa
from export.sherpa_evaluation import SILENCE_S, SherpaEvaluator
from export.sherpa_graphs import AudioDecoder, AudioEncoder, rescaled
from export.verify import Utterance, made_sound

RECOGNIZE = """
import json, sys
import numpy as np, sherpa_onnx
name, folder, end, audio = sys.argv[1], sys.argv[2], sys.argv[3], np.load(sys.argv[4])
samples = [audio[f"arr_{i}"] for i in range(len(audio.files))]
tokens, model = f"{folder}/tokens.txt", f"{folder}/model{end}"
pair = {"encoder": f"{folder}/encoder{end}", "decoder": f"{folder}/decoder{end}", "tokens": tokens}
if name == "streaming":
    recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
        model=model, tokens=tokens, chunk_size=8, num_left_chunks=2)
else:
    recognizer = {
        "ctc": lambda: sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model=model, tokens=tokens),
        "aed": lambda: sherpa_onnx.OfflineRecognizer.from_moonshine_v2(**pair),
        "fire_red": lambda: sherpa_onnx.OfflineRecognizer.from_fire_red_asr(**pair),
    }[name]()
streams = [recognizer.create_stream() for _ in samples]
for stream, x in zip(streams, samples):
    stream.accept_waveform(16000, x)
if name == "streaming":
    for stream in streams:
        while recognizer.is_ready(stream):
            recognizer.decode_stream(stream)
    print(json.dumps([recognizer.get_result(stream) for stream in streams]))
else:
    recognizer.decode_streams(streams)
    print(json.dumps([stream.result.text for stream in streams]))
"""


def recognized(name: str, folder: Path, samples: Sequence[Floats], end: str = ".onnx") -> list[str]:
    """Texts of sherpa-onnx, without spaces and in one case, since it handles both in its own way."""
    pytest.importorskip("sherpa_onnx")
    path = folder / "samples.npz"
    np.savez(path, *samples)
    command = [sys.executable, "-c", RECOGNIZE, name, str(folder / name), end, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [_plain(text) for text in json.loads(done.stdout.splitlines()[-1])]


def _plain(text: str) -> str:
    return "".join(text.replace("▁", " ").lower().split())


def spelt(folder: Path, tokens: Sequence[int]) -> str:
    """All units literally, as sherpa-onnx writes also those that are not text."""
    return _plain("".join(load_tokenizer(folder).symbols[token] for token in tokens))


@pytest.fixture(scope="module")
def utterances(request: pytest.FixtureRequest) -> list[Floats]:
    """20 real ones of one to four seconds, or synthetic ones if there are none."""
    try:
        folder: Path = request.getfixturevalue("speech_data")
    except pytest.skip.Exception:
        return [made_sound(1 + 0.3 * i, 16000) for i in range(20)]
    paths = sorted((folder / "librispeech_mini").rglob("*.opus"))
    return [
        read(path, 16000)[: 16000 * (1 + i % 4)] for i, path in enumerate(paths[:: len(paths) // 20][:20])
    ]


@pytest.fixture(scope="module")
def sherpa(tiny_model: HybridModel, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sherpa") / "tiny"
    written = write_sherpa(tiny_model, tiny_bundles, Origin("tiny", "Apache-2.0"), out)
    assert set(written.left_out) == {"fire_red", "zipformer"}
    return out


def heard(
    model: HybridModel, folder: Path, mode: str, samples: Sequence[Floats], context: Context
) -> list[str]:
    scorer = TorchScorer(model, "cpu")
    found = [decode(scorer, mode, [x], SearchConfig(beam=1), context)[0][0] for x in samples]
    return [spelt(folder, x.tokens) for x in found]


def greedy(model: HybridModel, x: torch.Tensor, num_tokens: int) -> list[int]:
    """The decoder's best token, step by step, of normalised features x (1, T, F)."""
    tokens = [1]
    with torch.inference_mode():
        y, y_lens = model.encode(x, torch.tensor([x.shape[1]]))
        memory = model.decoder.memory(y)
        while len(tokens) <= num_tokens:
            logits = model.decoder(torch.tensor([tokens]), *memory, y_lens).logits[0, -1]
            logits[2] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == 1:
                break
    return [x for x in tokens[1:] if x != 1]


def test_offline_ctc(sherpa, tiny_model, tiny_bundles, utterances):
    expected = heard(tiny_model, tiny_bundles, "ctc-greedy", utterances, Context(0, -1, 0))
    assert recognized("ctc", sherpa, utterances) == expected  # utterances of different lengths in one batch


def test_online_ctc(sherpa, tiny_model, tiny_bundles, utterances):
    padded = [np.pad(x, (0, 16000)) for x in utterances]
    found = recognized("streaming", sherpa, padded)
    expected = heard(tiny_model, tiny_bundles, "ctc-greedy", padded, Context(8, 2, 0))
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.startswith(theirs)  # silence that does not fill a chunk is not decoded
        assert len(ours) - len(theirs) < 8 + 2


def test_attention_decoder_from_samples(sherpa, tiny_model, tiny_bundles, utterances):
    for samples, theirs in zip(utterances, recognized("aed", sherpa, utterances), strict=True):
        x, _ = tiny_model.features(torch.tensor(samples)[None], torch.tensor([len(samples)]))
        ours = spelt(tiny_bundles, greedy(tiny_model, x, 100))
        assert len(theirs) >= 5
        assert ours.startswith(theirs)  # its limit is 15 tokens per 0.6 s of what it takes for frames


@pytest.mark.parametrize("name", ["ctc", "streaming", "aed"])
def test_8_bit_graphs_are_heard(sherpa, utterances, name):
    """Random weights cannot show the loss of 8 bits, only that the graphs run and give similar texts."""
    exact, quantized = (recognized(name, sherpa, utterances[:4], end) for end in (".onnx", ".int8.onnx"))
    assert all(quantized)
    lengths = [len("".join(texts)) for texts in (exact, quantized)]
    assert 0.5 < lengths[1] / lengths[0] < 2


@pytest.mark.parametrize("name", ["ctc", "streaming", "aed"])
def test_what_a_limit_is_measured_on_is_what_sherpa_hears(
    sherpa, tiny_model, tiny_bundles, utterances, name, monkeypatch
):
    monkeypatch.setattr("export.sherpa_evaluation.CHUNK", 8)  # as above
    monkeypatch.setattr("export.sherpa_evaluation.LEFT", 2)
    heard = [Utterance(str(n), x, "") for n, x in enumerate(utterances[:6])]
    evaluator = SherpaEvaluator(name, tiny_model, load_tokenizer(tiny_bundles), heard)
    graphs = {x.stem: onnx.load(x) for x in (sherpa / name).glob("*.onnx") if "int8" not in x.name}
    silence = np.zeros(int(SILENCE_S * 16000) if name == "streaming" else 0, np.float32)
    theirs = recognized(name, sherpa, [np.append(x.samples, silence) for x in heard])
    for n, text in enumerate(theirs):
        a, b = (
            re.sub("⁇|<unk>|<blk>|<sos/eos>", "", x) for x in (_plain(evaluator.texts(graphs, n)[name]), text)
        )
        assert min(len(a), len(b)) >= 3
        assert a == b


@pytest.fixture
def exported_before(sherpa, monkeypatch):
    """Use the graphs of the folder instead of exporting them again."""
    graphs = [onnx.load(x) for x in sherpa.rglob("*.onnx") if "int8" not in x.name]
    by_inputs = {tuple(x.name for x in graph.graph.input): graph for graph in graphs}
    monkeypatch.setattr("export.sherpa_bundle.export", lambda trace, _: by_inputs[tuple(trace.inputs)])


def test_a_limit_of_errors_is_in_the_folder(
    exported_before, tiny_model, tiny_bundles, utterances, tmp_path, monkeypatch
):
    heard = [Utterance(str(n), x, "some words") for n, x in enumerate(utterances[:3])]
    origin, out = Origin("tiny", "Apache-2.0"), tmp_path / "out"
    written = write_sherpa(tiny_model, tiny_bundles, origin, out, Limit(1000, heard, about={"set": "x"}))
    assert set(written.reports) == {"ctc", "streaming", "aed"}
    found = json.loads((out / "sherpa.json").read_text())["gate"]["aed"]
    assert (found["set"], found["words"], found["kept_in_float32"]) == ("x", 6, {})
    monkeypatch.setattr("export.sherpa_bundle.gate", refuse)
    with pytest.raises(BundleError, match="beyond"):
        write_sherpa(tiny_model, tiny_bundles, origin, tmp_path / "none", Limit(0, heard))
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def refuse(*_):
    raise BundleError("beyond the limit")


def test_attention_decoder_of_fire_red(tiny_model, tiny_bundles, utterances, tmp_path):
    """With the features of that runtime, computed by the library that it uses."""
    fbank = pytest.importorskip("kaldi_native_fbank")
    model = variant(tiny_model, FbankConfig(high_freq_hz=0.0, snip_edges=True, scale=32768.0))
    assert "fire_red" not in artefacts(tiny_model)[0]
    artefact = CONTRACTS["fire_red"][1](model)
    (tmp_path / "fire_red").mkdir()
    (tmp_path / "fire_red" / "tokens.txt").write_bytes((tiny_bundles / "tokens.txt").read_bytes())
    for stem, trace in artefact.graphs.items():
        graph = export(trace, stem)
        onnx.helper.set_model_props(graph, {key: str(value) for key, value in artefact.metadata.items()})
        onnx.save(graph, tmp_path / "fire_red" / f"{stem}.onnx")
    options = fbank.FbankOptions()
    options.mel_opts.num_bins, options.frame_opts.dither, options.mel_opts.high_freq = 80, 0.0, 0.0
    graphs = {x.stem: onnx.load(x) for x in (tmp_path / "fire_red").glob("*.onnx")}
    heard = [Utterance("", x, "") for x in utterances]
    evaluator = SherpaEvaluator("fire_red", model, load_tokenizer(tiny_bundles), heard)
    assert all(evaluator.texts(graphs, n)["fire_red"] for n in range(2))
    for samples, theirs in zip(utterances, recognized("fire_red", tmp_path, utterances), strict=True):
        features = fbank.OnlineFbank(options)
        features.accept_waveform(16000, (samples * 32768).tolist())
        features.input_finished()
        frames = [features.get_frame(i) for i in range(features.num_frames_ready)]
        ours = spelt(tiny_bundles, greedy(model, model.cmvn(torch.tensor(np.array(frames))[None]), 100))
        assert theirs
        assert ours.startswith(theirs)


def variant(model: HybridModel, features: FbankConfig) -> HybridModel:
    config = replace(model.decoder.config, reverse_layers=0)
    other = build_model(features, model.encoder.config, config, LossConfig(), model.ctc.out_features).eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "reverse" not in k})
    with torch.no_grad():
        other.cmvn.mean += 2 * np.log(features.scale)
    return other


@pytest.mark.parametrize("subsampling", [4, 8])
def test_caches_of_sherpa_hold_the_whole_state(subsampling):
    """Its loop over chunks, with caches that start at zero, equals the masked whole utterance."""
    encoder = ConformerConfig(
        dim=32, num_layers=2, num_heads=2, ff_dim=32, subsampling=subsampling, subsampling_channels=4
    )
    decoder = DecoderConfig(dim=16, num_layers=1, num_heads=2, ff_dim=16)
    model = build_model(FbankConfig(), encoder, decoder, LossConfig(), 9).eval()
    artefact = CONTRACTS["streaming"][1](model)
    session = ort.InferenceSession(artefact.written["model"]().SerializeToString())
    names = [x.name for x in session.get_inputs()]
    chunk, left, num_chunks = 8, 2, 5
    x = torch.randn(1, num_chunks * chunk * 4, 80) - 8
    caches = [
        torch.zeros(2, 2, chunk * left, 2 * model.encoder.head_dim),
        torch.zeros(2, 1, 32, int(artefact.metadata["cnn_module_kernel"]) - 1),
    ]
    required, found = torch.tensor([chunk * left]), []
    with torch.inference_mode():
        for i in range(num_chunks):
            part = x[:, i * chunk * 4 : (i + 1) * chunk * 4] + 2 * np.log(32768)
            mask = torch.ones(1, 1, chunk * (left + 1), dtype=torch.bool)
            inputs = [part, required + i * chunk, required, *caches, mask]
            outputs = session.run(None, {k: x.numpy() for k, x in zip(names, inputs, strict=True)})
            log_probs, *caches = map(torch.from_numpy, outputs)
            found.append(log_probs)
        context = Context(chunk * 4 // subsampling, left, 0)
        y, _ = model.encode(model.cmvn(x), torch.tensor([x.shape[1]]), context)
        expected = model.ctc_log_probs(y).repeat_interleave(subsampling // 4, dim=1)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ctc", "streaming"])
@pytest.mark.parametrize("subsampling", [4, 8])
def test_graphs_written_by_hand_are_the_modules(subsampling, name):
    config = ConformerConfig(
        dim=32, num_layers=2, num_heads=2, ff_dim=32, subsampling=subsampling, subsampling_channels=4
    )
    model = build_model(
        FbankConfig(scale=0.5), config, DecoderConfig(dim=16, num_layers=1), LossConfig(), 9
    ).eval()
    artefact = CONTRACTS[name][1](model)
    graph = artefact.written["model"]()
    check(artefact.graphs["model"], graph)
    with torch.no_grad():
        model.encoder.layers[1].feed_forward_2[1].bias[3] += 1
    with pytest.raises(BundleError, match="from the checkpoint's"):
        check(artefact.graphs["model"], graph)


def test_frames_given_twice_are_not_heard_twice(tiny_model):
    """For a model with 8x subsampling, which may then emit twice as many tokens."""
    module = AudioEncoder(tiny_model).eval()
    decoder, tokens = AudioDecoder(tiny_model).eval(), torch.tensor([[5]])
    config = tiny_model.decoder.config
    past = [
        torch.randn(1, config.num_heads, 3, tiny_model.decoder.head_dim) for _ in range(4 * config.num_layers)
    ]
    with torch.inference_mode():
        once = module(torch.randn(1, 8000))
        twice = once.repeat_interleave(2, dim=1)
        found = [decoder(tokens, x, *past, torch.tensor([True]))[0] for x in (once, twice)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_quiet_bins_have_the_floor_of_training():
    x = torch.tensor([-15.942385, -10.0, 3.0]) + 2 * np.log(32768)
    torch.testing.assert_close(rescaled(x, 32768.0, 1.0), torch.tensor([-15.942385, -10.0, 3.0]))
    assert rescaled(torch.tensor(-15.9), 32768.0, 1.0) == pytest.approx(np.log(np.finfo(np.float32).eps))


def test_a_folder_says_how_it_is_used(sherpa):
    readme = (sherpa / "README.md").read_text()
    for name in ("ctc", "streaming", "aed"):
        assert f"## {name}" in readme
        assert f'"{name}/' in readme
    listed = json.loads((sherpa / "sherpa.json").read_text())
    assert listed["left_out"] == {
        "zipformer": "the encoder is of type conformer, expected zipformer",
        "fire_red": "features.high_freq_hz is -400.0, its runtime has 0.0",
    }
    assert set(listed["files"]) >= {"ctc/model.onnx", "aed/decoder.int8.onnx", "README.md"}
    symbol, token = (sherpa / "aed" / "tokens.txt").read_text().splitlines()[3].split()
    assert (base64.b64decode(symbol), token) == (b" ", "3")


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Otherwise(torch.nn.Module):
    """The same function, but only up to three frames."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x if x.shape[1] <= 3 else 3 * x


def test_a_graph_that_is_not_the_model_is_refused():
    trace = Trace(Twice(), {"x": torch.full((2, 3), 5.0)}, {"x": {1: Dim("T")}}, ["y"], 0)
    graph = export(trace, "twice")
    check(trace, graph)
    for other in (torch.nn.Identity(), Otherwise()):
        with pytest.raises(BundleError, match=r"twice.onnx: y is 5.0e\+00 from the checkpoint's"):
            check(replace(trace, module=other), graph)


def test_what_sherpa_cannot_run_is_refused_with_reasons(tiny_model):
    model = variant(tiny_model, FbankConfig(sample_rate=8000, high_freq_hz=0.0))
    found, left_out = artefacts(model)
    assert list(found) == ["aed"]
    assert left_out["ctc"] == "features.sample_rate is 8000, its runtime has 16000"
    model.decoder.config.type = "chunked"
    with pytest.raises(ConfigError, match=r"sherpa-onnx cannot run this model: ctc: features\.sample_rate"):
        artefacts(model)
