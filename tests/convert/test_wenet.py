"""WeNet's checkpoints: names and shapes are checked, and a folder as published becomes an experiment."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn, tensor
from torchaudio.compliance import kaldi

from asr.convert.names import Units, load
from asr.convert.origin import read_origin
from asr.convert.wenet import wenet_names
from asr.decode.config import SearchConfig
from asr.decode.modes import decode, modes_for
from asr.errors import CheckpointError
from asr.features import Cmvn
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.torch_scorer import TorchScorer
from asr.model.wenet import WenetConformer, WenetConformerConfig
from asr.train.checkpoint import load_model

from .sources import wenet_unknown

SETS = ["wenet_u2pp_conformer", "wenet_conformer_noncausal"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights as a WeNet checkpoint."""
    weights = {}
    for name, names in wenet_names([]).sources(list(model.state_dict())).items():
        weights.update(zip(names, model.state_dict()[name].clone().chunk(len(names)), strict=True))
    return weights


@pytest.fixture
def model() -> nn.Module:
    """The model for a checkpoint with one decoder."""
    sizes = WenetConformerConfig(dim=24, num_layers=2, num_heads=3, ff_dim=32, kernel_size=4)
    config = DecoderConfig(
        dim=24, num_layers=2, num_heads=3, ff_dim=16, activation="relu", positions="sinusoid"
    )
    decoder = TransformerDecoder(config, 11, memory_dim=24)
    parts = {
        "cmvn": Cmvn(20),
        "encoder": WenetConformer(sizes, 20),
        "ctc": nn.Linear(24, 11),
        "decoder": decoder,
    }
    return nn.ModuleDict(parts)


def test_a_checkpoint_loads_in_the_order_of_units_that_is_asked_for(model):
    weights = weights_of(model) | {"encoder.embed.pos_enc.pe": torch.zeros(1, 9, 24)}
    before = {name: x.clone() for name, x in model.state_dict().items()}
    order = [0, 10, *range(1, 10)]
    for x in model.state_dict().values():
        x.zero_()
    load(model, weights, wenet_names(weights), "final.pt", Units(order, order))
    per_unit = ("ctc.", "decoder.embedding.", "decoder.out.")
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name][order] if name.startswith(per_unit) else before[name])


def test_all_that_does_not_fit_is_named_with_its_shape(model):
    weights = weights_of(model)
    weights["encoder.encoders.0.self_attn.linear_k.lost"] = torch.zeros(3, 4)
    del weights["encoder.encoders.1.norm_mha.weight"]
    weights["ctc.ctc_lo.bias"] = torch.zeros(12)
    with pytest.raises(CheckpointError) as error:
        load(model, weights, wenet_names(weights), "final.pt")
    message = str(error.value)
    assert message.startswith("final.pt: 3 tensors do not fit: ")
    for part in (
        "encoder.encoders.0.self_attn.linear_k.lost (3, 4) is unused",
        "encoder.encoders.1.norm_mha.weight is missing for encoder.layers.1.attention_norm.weight (24,)",
        "ctc.ctc_lo.bias (12,) does not fit ctc.bias (11,)",
    ):
        assert part in message


# ---- from a folder to an experiment


@pytest.fixture(scope="module", params=SETS)
def reference(golden: Path, request: pytest.FixtureRequest) -> Path:
    folder = golden / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture
def source(reference: Path, wenet_source, tmp_path: Path) -> Path:
    return wenet_source(reference, tmp_path / "source")


def test_a_folder_becomes_an_experiment_that_computes_the_same(asr, reference, source, tmp_path):
    status, out, err = asr("convert", "wenet", source, "-o", tmp_path / "exp")
    assert (status, err) == (0, "")
    options = json.loads((reference / "config.json").read_text())
    assert f"{options['vocab_size']}\n" in out
    model, tokenizer, config = load_model(tmp_path / "exp")
    assert (config.features.sample_rate, config.features.num_bins) == (16000, options["input_dim"])
    theirs = [line.split()[0] for line in (source / "units.txt").read_text().splitlines()]
    order = [0, options["eos"], wenet_unknown(options)]
    order += [i for i in range(options["vocab_size"]) if i not in order]
    assert tokenizer.symbols[3:] == [theirs[i] for i in order[3:]]
    with np.load(reference / "io.npz") as arrays, torch.no_grad():
        for i, n in enumerate(arrays["x_lens"].tolist()):
            x = torch.from_numpy(arrays["x"][i : i + 1, :n])
            y, _ = model.encode(model.cmvn(x), tensor([n]))
            expected = torch.from_numpy(arrays[f"full.alone{i}.encoder_out"])
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-3)
        if options["encoder_conf"]["causal"]:
            log_probs = torch.from_numpy(arrays["full.ctc_log_probs"])[:1, :, order]
            found = model.ctc_log_probs(torch.from_numpy(arrays["full.encoder_out"])[:1])
            torch.testing.assert_close(found, log_probs, atol=1e-4, rtol=1e-3)


def test_its_features_are_those_of_torchaudio_on_integers(asr, reference, source, tmp_path):
    assert asr("convert", "wenet", source, "-o", tmp_path / "exp")[0] == 0
    model, _, config = load_model(tmp_path / "exp")
    samples = 0.1 * torch.randn(1, 12345)
    num_bins = config.features.num_bins
    expected = kaldi.fbank(samples * 32768, num_mel_bins=num_bins, sample_frequency=16000)
    x, x_lens = model.fbank(samples, tensor([12345]))
    assert x_lens.tolist() == [len(expected)]
    torch.testing.assert_close(x[0], expected, atol=6e-4, rtol=0)


def test_every_search_runs_on_it(asr, reference, source, tmp_path):
    assert asr("convert", "wenet", source, "-o", tmp_path / "exp")[0] == 0
    model, _, _ = load_model(tmp_path / "exp")
    samples = 0.1 * np.random.default_rng(1).standard_normal(20000).astype(np.float32)
    for mode in ("ctc-greedy", "ctc-prefix", "attention", "joint", "rescore"):
        assert mode in modes_for("transformer")
        assert decode(TorchScorer(model, "cpu"), mode, [samples], SearchConfig())[0]


def test_where_it_is_from_is_told_and_kept(asr, source, tmp_path):
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: zh\n---\n# A model\n")
    assert "apache-2.0" in asr("convert", "wenet", source, "-o", tmp_path / "exp")[1]
    origin = read_origin(tmp_path / "exp")
    assert origin is not None
    assert (origin.family, origin.source, origin.licence) == ("wenet", str(source), "apache-2.0")
    assert set(origin.files) == {"final.pt", "train.yaml", "units.txt"}
    out = asr("info", tmp_path / "exp")[1]
    assert f"from wenet {source}" in out
    assert "apache-2.0" in out
    assert asr("convert", "wenet", source, "-o", tmp_path / "b", "--licence", "mine")[0] == 0
    assert "mine" in asr("info", tmp_path / "b")[1]


def edited(source: Path, **changes: object) -> None:
    """Change train.yaml; `encoder_conf__causal=False` sets `causal` in encoder_conf."""
    options = yaml.safe_load((source / "train.yaml").read_text())
    for name, value in changes.items():
        *parts, last = name.split("__")
        place = options
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    (source / "train.yaml").write_text(yaml.safe_dump(options))


def test_the_recipes_of_its_version_3_name_the_model_otherwise(asr, source, tmp_path):
    edited(source, model="asrmodel", cmvn="global_cmvn", cmvn_conf={"cmvn_file": "x", "is_json_cmvn": True})
    assert asr("convert", "wenet", source, "-o", tmp_path / "exp")[0] == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"encoder": "ebranchformer"}, "encoder: 'ebranchformer', expected 'conformer'"),
        ({"model": "transducer"}, "model: 'transducer', expected asr_model"),
        ({"decoder": "rnn"}, "decoder: 'rnn', expected transformer or bitransformer"),
        ({"encoder_conf__activation_type": "relu"}, "encoder_conf.activation_type: 'relu', expected 'swish'"),
        ({"encoder_conf__new_trick": 3}, "encoder_conf.new_trick: 3, an option that is not known"),
        ({"encoder_conf__a\n\x1b": 3}, r"encoder_conf.a\n\x1b: 3, an option that is not known"),
        ({"encoder_conf__num_blocks": "many"}, "encoder_conf.num_blocks: 'many', expected a whole number"),
        ({"encoder_conf__num_blocks": 10**9}, "encoder_conf.num_blocks: 1000000000, expected a whole"),
        ({"encoder_conf__num_blocks": 77}, "layers of the encoder, train.yaml says 77"),
        ({"encoder_conf__output_size": 4096}, "channels, train.yaml says 4096"),
        ({"encoder_conf__linear_units": 7}, "does not fit encoder.layers.0.feed_forward_1.1.weight (7, "),
        ({"decoder_conf__input_layer": "linear"}, "decoder_conf.input_layer: 'linear', expected 'embed'"),
        ({"dataset_conf__feats_type": "log_mel_spectrogram"}, "feats_type: 'log_mel_spectrogram'"),
        ({"dataset_conf__fbank_conf__num_mel_bins": 997}, "input_dim is not the 997 mel bins"),
        ({"dataset_conf": 3}, "dataset_conf: 3, expected options by name"),
        ({"tokenizer_conf__special_tokens": {"<eos>": 999}}, "no id 999"),
        ({"tokenizer_conf__special_tokens": {"<eos>": 0}}, "are not distinct"),
        (
            {"encoder_conf__attention_heads": 0},
            "encoder_conf.attention_heads: 0, expected a whole number from 1",
        ),
        ({"encoder_conf__dropout_rate": 3}, "encoder_conf.dropout_rate: 3, expected a number from 0 to 1"),
        ({"model_conf__ctc_weight": 10**400}, "model_conf.ctc_weight: 1000"),
        ({"encoder_conf__linear_units": 10**6}, "they are of different models"),
        ({"decoder_conf__num_blocks": 10**6}, "layers of the decoder, train.yaml says 1000000"),
        ({"dataset_conf__fbank_conf__frame_length": float("nan")}, "frame_length: nan, expected a number"),
        ({"dataset_conf__fbank_conf__window_type": "hamming"}, "window_type: 'hamming', expected 'povey'"),
        ({"model_conf__apply_non_blank_embedding": True}, "apply_non_blank_embedding: True, expected False"),
    ],
)
def test_what_ours_cannot_be_is_refused(asr, source, tmp_path, changes, expected):
    edited(source, **changes)
    status, _, err = asr("convert", "wenet", source, "-o", tmp_path / "exp")
    assert status == 2
    assert expected in err
    assert sorted(tmp_path.iterdir()) == [source]
