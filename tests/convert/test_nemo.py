"""A .nemo archive with a CTC head or a decoder becomes an experiment with the results of the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, tensor

from asr.convert.names import arrange_units
from asr.convert.nemo_read import resolved
from asr.convert.origin import read_origin
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.model.torch_scorer import TorchScorer
from asr.train.checkpoint import load_model

from .sources import canary_units, nemo_options, pack, pieces


@pytest.fixture
def with_ctc(golden_set: Callable) -> Any:
    return golden_set("nemo_fastconformer")


@pytest.fixture
def canary(golden_set: Callable) -> Any:
    return golden_set("nemo_canary_aed")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def assert_encodes(model: Any, reference: Any, name: str) -> None:
    for i, n in enumerate(reference["x_lens"].tolist()):
        y, _ = model.encode(reference["x"][i : i + 1, :, :n].transpose(1, 2), tensor([n]))
        close(y.transpose(1, 2), reference[f"{name}alone{i}.encoder_out"])


def test_a_model_of_ctc(asr, with_ctc, tmp_path):
    config, count = with_ctc.config, with_ctc.config["vocab_size"]
    archive = pack(tmp_path / "a.nemo", nemo_options(config), with_ctc.weights, pieces(count))
    status, _, err = asr("convert", "nemo", archive, "-o", tmp_path / "exp")
    assert (status, err) == (0, "")
    model, tokenizer, converted = load_model(tmp_path / "exp")
    assert converted.decoder.type == "none"
    assert len(tokenizer.symbols) == count + 2, "their blank and unknown unit are ours, sos/eos is made up"
    order = [count, -1, 0, *range(1, count)]
    with torch.no_grad():
        assert_encodes(model, with_ctc, "rel_pos.")
        log_probs = model.ctc_log_probs(with_ctc["rel_pos.alone0.encoder_out"].transpose(1, 2))
        real = [i for i, theirs in enumerate(order) if theirs >= 0]
        expected = with_ctc["rel_pos.ctc_log_probs"][:1, : log_probs.shape[1]]
        close(log_probs[..., real], expected[..., [order[i] for i in real]])
        samples = torch.randn(1, 16000) * 0.1
        x, x_lens = model.features(samples, tensor([16000]))
        close(x[0, : int(x_lens)].mean(0), torch.zeros(x.shape[2]))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    origin = read_origin(tmp_path / "exp")
    assert origin
    assert list(origin.files) == ["a.nemo"]
    found = decode(
        TorchScorer(model, "cpu", symbols=tokenizer.symbols), "", [samples[0].numpy()], SearchConfig()
    )
    assert found[0]


def test_a_hybrid_model_leaves_its_transducer_out(asr, with_ctc, tmp_path):
    """From a folder, and with characters instead of pieces."""
    count = with_ctc.config["vocab_size"]
    weights = {
        name.replace("decoder.decoder_layers", "ctc_decoder.decoder_layers"): x
        for name, x in with_ctc.weights.items()
    }
    weights["decoder.prediction.embed.weight"] = weights["joint.joint_net.2.weight"] = torch.zeros(2, 3)
    options = nemo_options(with_ctc.config) | {
        "decoder": {"vocabulary": [" ", "a", *map(chr, range(0x4E00, 0x4DFE + count))]}
    }
    del options["tokenizer"]
    (tmp_path / "in").mkdir()
    pack(tmp_path / "in" / "a.nemo", options, weights, None)
    status, out, _ = asr("convert", "nemo", tmp_path / "in", "-o", tmp_path / "exp")
    assert status == 0
    assert "the transducer is left out: " in out
    assert "joint.joint_net.2.weight (2, 3)" in out
    model, tokenizer, _ = load_model(tmp_path / "exp")
    assert tokenizer.symbols[3:5] == ["▁", "a"]
    with torch.no_grad():
        assert_encodes(model, with_ctc, "rel_pos.")


def test_a_model_with_the_decoder_of_canary(asr, canary, tmp_path):
    config, count = canary.config, canary.config["vocab_size"]
    names = canary_units(config)
    archive = pack(tmp_path / "a.nemo", nemo_options(config), canary.weights, pieces(count, names))
    status, _, err = asr("convert", "nemo", archive, "-o", tmp_path / "exp")
    assert (status, err) == (0, "")
    model, tokenizer, converted = load_model(tmp_path / "exp")
    assert model.ctc is None
    assert converted.decoder.prompt == ["<|en|>", "<|transcribe|>", "<|en|>", "<|pnc|>"]
    start, end = names.index("<|startoftranscript|>"), names.index("<|endoftext|>")
    assert (start, end) == (config["bos"], config["eos"])
    units = arrange_units(count, start, end, names.index("<pad>"), names.index("<unk>"))
    ids, lens = canary["dec.input_ids"], canary["dec.input_lens"]
    with torch.no_grad():
        assert_encodes(model, canary, "")
        for i, n in enumerate(lens.tolist()):
            y = canary[f"alone{i}.encoder_out"].transpose(1, 2)
            inputs = tensor([[units.inputs.index(x) for x in ids[i, :n].tolist()]])
            logits = model.decoder(inputs, *model.decoder.memory(y), tensor([y.shape[1]])).logits
            real = [k for k, theirs in enumerate(units.outputs) if theirs >= 0]
            expected = canary["dec.log_probs"][i : i + 1, :n, [units.outputs[k] for k in real]]
            close(logits.log_softmax(-1)[..., real], expected)
    scorer = TorchScorer(model, "cpu", symbols=tokenizer.symbols)
    samples = 0.1 * torch.randn(16000).numpy()
    assert decode(scorer, "", [samples], SearchConfig(max_tokens=5))[0]


def test_units_of_several_languages_may_be_written_alike(asr, canary, tmp_path):
    """As in the public Canary models: special units, and a SentencePiece model for each language."""
    special = canary_units(canary.config)
    num_first = len(special) + 2
    num_english = (canary.config["vocab_size"] - num_first) // 2
    sizes = {"spl": num_first, "en": num_english, "de": canary.config["vocab_size"] - num_first - num_english}
    models = {
        f"{name}_tokenizer.model": pieces(count, special if name == "spl" else ["<unk>"])
        for name, count in sizes.items()
    }
    langs = {name: {"type": "bpe", "model_path": f"nemo:{name}_tokenizer.model"} for name in sizes}
    options = nemo_options(canary.config) | {"tokenizer": {"type": "agg", "langs": langs}}
    archive = pack(tmp_path / "a.nemo", options, canary.weights, models)
    status, _, err = asr("convert", "nemo", archive, "-o", tmp_path / "exp")
    assert (status, err) == (0, "")
    _, tokenizer, _ = load_model(tmp_path / "exp")
    assert len(set(tokenizer.symbols)) == len(tokenizer.symbols)
    ours = [i for i, x in enumerate(tokenizer.symbols) if x.startswith("a") and len(x) < 4]
    assert len(ours) == 3
    assert [tokenizer.decode([i]) for i in ours] == ["a"] * 3
    spaces = [i for i, x in enumerate(tokenizer.symbols) if x.startswith("▁")]
    assert tokenizer.decode([ours[0], spaces[-1], ours[2]]) == "a a"
    assert [word for word, _, _ in tokenizer.words([ours[1], spaces[-1], ours[2]])] == ["a", "a"]


def test_options_that_refer_to_each_other_many_times_are_resolved_once():
    options: dict = {"a0": ["x"] * 9}
    for i in range(1, 15):
        options[f"a{i}"] = [options[f"a{i - 1}"]] * 9
    assert resolved({"b": "${a14}", **options}, "model_config.yaml")["b"][0][0] is not None


WRONG: list[tuple[Callable[[dict, dict], object], str]] = [
    (lambda o, w: o["encoder"].update(subsampling="striding"), "encoder.subsampling"),
    (lambda o, w: o["encoder"].update(n_layers=99), "layers and channels are not those of the weights"),
    (lambda o, w: o["encoder"].update(d_model="wide"), "encoder.d_model: 'wide', expected a whole number"),
    (lambda o, w: o.pop("encoder"), "encoder.d_model: 0, expected a whole number"),
    (lambda o, w: o["preprocessor"].update(window="hamming"), "preprocessor.window"),
    (lambda o, w: o.pop("tokenizer"), "neither tokenizer nor decoder.vocabulary"),
    (lambda o, w: o["tokenizer"].update(model_path=3), "no model_path of a SentencePiece model"),
    (lambda o, w: w.pop("decoder.decoder_layers.0.weight"), "no CTC head and no Transformer decoder"),
    (lambda o, w: w.update({"decoder.decoder_layers.0.weight": torch.zeros(5, 2, 1)}), "5 units with blank"),
    (lambda o, w: w.update({"encoder.more": torch.zeros(2, 3)}), "encoder.more (2, 3) is unused"),
    (lambda o, w: o.update(a="${model.b}", b="${a}"), "in a circle"),
    (lambda o, w: o["encoder"].update(new_trick=3), "encoder.new_trick: 3, an option that is not known"),
    (lambda o, w: o["encoder"].update(n_heads="x"), "encoder.n_heads: 'x', expected a whole number"),
    (lambda o, w: o["encoder"].update(ff_expansion_factor=10**6), "they are of different models"),
    (lambda o, w: o["preprocessor"].update(features=[1]), "preprocessor.features: [1], expected a whole"),
    (lambda o, w: o["preprocessor"].update(n_window_size=400), "preprocessor.n_window_size: 400"),
    (lambda o, w: o["tokenizer"].update(model_path=""), "no model_path of a SentencePiece model"),
    (
        lambda o, w: w.update({"encoder.layers.0.conv.batch_norm.num_batches_tracked": torch.zeros(0)}),
        "num_batches_tracked (0,) does not fit",
    ),
]


@pytest.mark.parametrize(("spoil", "expected"), WRONG, ids=[x for _, x in WRONG])
def test_what_does_not_fit_is_told(asr, with_ctc, tmp_path, spoil, expected):
    options, weights = yaml.safe_load(yaml.safe_dump(nemo_options(with_ctc.config))), dict(with_ctc.weights)
    spoil(options, weights)
    archive = pack(tmp_path / "a.nemo", options, weights, pieces(with_ctc.config["vocab_size"]))
    status, _, err = asr("convert", "nemo", archive, "-o", tmp_path / "exp")
    assert status == 2
    assert expected in err
    assert err.startswith(f"asr: {archive}/model_")
    assert sorted(tmp_path.iterdir()) == [archive]
