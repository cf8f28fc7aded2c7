"""A folder as published by icefall becomes an experiment with the results of the reference."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import tensor

from asr.convert.names import arrange_units
from asr.convert.origin import read_origin
from asr.decode.config import SearchConfig
from asr.decode.modes import decode, modes_for
from asr.model.torch_scorer import TorchScorer
from asr.train.checkpoint import load_model

from .sources import icefall_options, write_icefall

SETS = ["icefall_zipformer2", "icefall_zipformer2_causal"]
DECODER = "attention_decoder."


@pytest.fixture(params=SETS)
def reference(golden_set, request):
    return golden_set(request.param)


@pytest.fixture
def source(reference, tmp_path: Path) -> Path:
    return write_icefall(reference, tmp_path / "source")


def units_of(reference) -> list[int]:
    """Their ids in the order of our units; public models have the same order."""
    options, count = reference.config, reference.config["vocab_size"]
    end, blank = options["attention_decoder"]["eos_id"], options["blank_id"]
    unknown = next(i for i in range(count) if i not in (end, blank))
    return arrange_units(count, end, end, blank, unknown).outputs


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_it_computes_the_same(asr, reference, source, tmp_path):
    status, out, err = asr("convert", "icefall", source, "-o", tmp_path / "exp")
    assert (status, err) == (0, "")
    assert "the transducer is left out: " in out
    assert f"joiner.output_linear.bias ({reference.config['vocab_size']},)" in out
    model, tokenizer, config = load_model(tmp_path / "exp")
    assert len(tokenizer.symbols) == reference.config["vocab_size"]
    assert config.encoder.num_heads == reference.config["num_heads"]
    order = units_of(reference)
    with torch.no_grad():
        for i, n in enumerate(reference["x_lens"].tolist()):
            y, _ = model.encode(reference["x"][i : i + 1, :n], tensor([n]))
            close(y, reference[f"full.alone{i}.encoder_out"])
        close(model.ctc_log_probs(reference["full.encoder_out"]), reference["full.ctc_log_probs"][..., order])
        y, lens = reference["full.encoder_out"], reference["full.encoder_out_lens"]
        tokens = torch.argsort(tensor(order))[reference["att.ys_in"]]
        found = model.decoder(tokens, *model.decoder.memory(y), lens).logits.log_softmax(-1)
        expected = reference["att.log_probs"][..., order]
        for i, n in enumerate(reference["att.ys_in_lens"].tolist()):
            close(found[i, :n], expected[i, :n])
    samples = 0.1 * np.random.default_rng(1).standard_normal(20000).astype(np.float32)
    for mode in ("ctc-greedy", "joint", "rescore"):
        assert decode(TorchScorer(model, "cpu"), mode, [samples], SearchConfig())[0]


def test_without_its_decoder_it_is_a_model_of_ctc_alone(asr, reference, source, tmp_path):
    weights = {name: x for name, x in reference.weights.items() if not name.startswith(DECODER)}
    torch.save({"model": weights, **icefall_options(reference.config)}, source / "exp" / "pretrained.pt")
    assert asr("convert", "icefall", source, "-o", tmp_path / "exp")[0] == 0
    model, _, config = load_model(tmp_path / "exp")
    assert config.decoder.type == "none"
    assert set(modes_for("none")) == {"ctc-greedy", "ctc-prefix"}
    with torch.no_grad():
        expected = reference["full.ctc_log_probs"][..., units_of(reference)]
        close(model.ctc_log_probs(reference["full.encoder_out"]), expected)
    samples = 0.1 * np.random.default_rng(1).standard_normal(20000).astype(np.float32)
    assert decode(TorchScorer(model, "cpu"), "ctc-prefix", [samples], SearchConfig())[0]


def test_what_shapes_do_not_say_may_stand_in_a_file(asr, reference, source, tmp_path):
    torch.save({"model": reference.weights}, source / "exp" / "pretrained.pt")
    defaults = {"query_head_dim": 32, "value_head_dim": 12, "pos_head_dim": 4}
    if any(set(reference.config[name]) != {size} for name, size in defaults.items()):
        status, _, err = asr("convert", "icefall", source, "-o", tmp_path / "exp")
        assert status == 2
        assert "do not fit; write feature_dim, num_heads" in err
    (source / "icefall.yaml").write_text(yaml.safe_dump(icefall_options(reference.config)))
    assert asr("convert", "icefall", source, "-o", tmp_path / "exp")[0] == 0
    origin = read_origin(tmp_path / "exp")
    assert origin
    assert set(origin.files) == {"exp/pretrained.pt", "icefall.yaml", "data/lang_bpe/tokens.txt"}


def test_a_wrong_name_in_the_file_is_told(asr, source, tmp_path):
    (source / "icefall.yaml").write_text("attention_decoder_heads: 4\n")
    status, _, err = asr("convert", "icefall", source, "-o", tmp_path / "exp")
    assert status == 2
    assert f"{source}/icefall.yaml: attention_decoder_heads, expected feature_dim, " in err


def without(prefix: str):
    return lambda weights: {name: x for name, x in weights.items() if not name.startswith(prefix)}


def without_a_norm(weights: dict) -> dict:
    """Without the norm bias of a middle layer, from which no sizes are inferred."""
    last = next(x for x in reversed(sorted(weights)) if re.search(r"layers\.0\.norm\.bias$", x))
    return {name: x for name, x in weights.items() if name != last}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("ctc_output."), "no CTC head; a transducer alone cannot be represented"),
        (without("encoder_embed."), "no front end of a Zipformer of 2023"),
        (without("encoder.encoders.0."), "no stacks of layers numbered from 0"),
        (without_a_norm, "norm.bias is missing"),
        (without("encoder.downsample_output"), "encoder.downsample_output.bias is missing for"),
        (without(f"{DECODER}decoder.embed."), "attention_decoder.decoder.embed.weight is missing"),
        (
            lambda w: w | {f"{DECODER}decoder.embed.weight": torch.zeros(0)},
            "embed.weight is missing; damaged",
        ),
        (lambda w: w | {"ctc_output.1.weight": torch.tensor(1.0)}, "no CTC head"),
        (lambda w: w | {"encoder.new": torch.zeros(2, 3)}, "encoder.new (2, 3) is unused"),
        (lambda w: w | {"ctc_output.1.weight": torch.zeros(997, 3)}, " units, the checkpoint has 997"),
    ],
)
def test_what_does_not_fit_is_told(asr, reference, source, tmp_path, change, expected):
    saved = {"model": change(reference.weights), **icefall_options(reference.config)}
    torch.save(saved, source / "exp" / "pretrained.pt")
    status, _, err = asr("convert", "icefall", source, "-o", tmp_path / "exp")
    assert status == 2
    assert expected in err
    assert not (tmp_path / "exp").exists()


def test_another_family_is_named(asr, source, tmp_path):
    status, _, err = asr("convert", "wenet", source, "-o", tmp_path / "exp")
    assert status == 2
    assert "it looks like icefall: asr convert icefall" in err
