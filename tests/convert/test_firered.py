"""A folder as published by FireRedASR-AED becomes an experiment with the results of the reference."""

from pathlib import Path

import pytest
import torch
from torch import tensor
from torchaudio.compliance import kaldi

from asr.convert import firered
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.model.torch_scorer import TorchScorer
from asr.tokens import SPACE, TWIN
from asr.train.checkpoint import load_model

from .sources import write_firered


@pytest.fixture
def reference(golden_set):
    return golden_set("fireredasr_aed")


@pytest.fixture
def source(reference, tmp_path: Path) -> Path:
    return write_firered(reference, tmp_path / "source")


def saved_again(source: Path, **changes: object) -> None:
    saved = torch.load(source / "model.pth.tar", weights_only=False)
    vars(saved["args"]).update(changes)
    torch.save(saved, source / "model.pth.tar")


def test_it_computes_the_same(asr, reference, source, tmp_path):
    status, _, err = asr("convert", "firered", source, "-o", tmp_path / "exp")
    assert (status, err) == (0, "")
    model, tokenizer, _ = load_model(tmp_path / "exp")
    order = firered.units(reference.config["args"])
    assert len(tokenizer.symbols) == len(order.outputs)
    assert model.ctc is None
    with torch.no_grad():
        for i, n in enumerate(reference["x_lens"].tolist()):
            y, y_lens = model.encode(reference["x"][i : i + 1, :n], tensor([n]))
            expected = reference["encoder_out"][i : i + 1, : int(y_lens)]
            torch.testing.assert_close(y[:, : int(y_lens)], expected, atol=1e-4, rtol=1e-3)
        samples = 0.1 * torch.randn(1, 16000)
        x, _ = model.features(samples, tensor([16000]))
        bins = reference.config["args"]["idim"]
        raw = kaldi.fbank(samples * 32768, num_mel_bins=bins, sample_frequency=16000)
        expected = (raw - model.cmvn.mean) * model.cmvn.istd
        torch.testing.assert_close(x[0], expected, atol=6e-4, rtol=0)
    assert 2.0 < (1 / model.cmvn.istd).mean() < 4.0
    config = SearchConfig(max_tokens=5)
    assert decode(TorchScorer(model, "cpu"), "unbounded", [samples[0].numpy()], config)[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<blank> 0\n<unk> 1\n一 2\n▁A 3\n", ["<blank>", "<unk>", "一", "▁A"]),
        ("<blank>\r\n<unk>\r\n一\r\n▁A\r\n", ["<blank>", "<unk>", "一", "▁A"]),
        ("<blank>\n<unk>\n\nA", ["<blank>", "<unk>", SPACE, "A"]),
        ("<blank>\n<space>\n▁\nA\n", ["<blank>", SPACE + TWIN, SPACE, "A"]),
    ],
)
def test_each_form_of_the_dictionary_is_read(text: str, expected: list[str]):
    assert firered.read_dictionary(text, "dict.txt") == expected


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda x: saved_again(x, n_layers_enc=99), "layers of the encoder, args.n_layers_enc is 99"),
        (lambda x: saved_again(x, d_model=996), "channels, args.d_model is 996"),
        (lambda x: saved_again(x, d_model="big"), "args.d_model: 'big', expected a whole number"),
        (lambda x: saved_again(x, odim=998), "units, the checkpoint has 998; it is from another model"),
        (
            lambda x: saved_again(x, residual_dropout=-1),
            "args.residual_dropout: -1, expected a number from 0",
        ),
        (lambda x: saved_again(x, idim=10**6), "they are of different models"),
        (lambda x: saved_again(x, kernel_size=95), "does not fit encoder.layers.0.convolution.depthwise"),
        (
            lambda x: torch.save({"model_state_dict": {"a": torch.ones(1)}}, x / "model.pth.tar"),
            "no args with",
        ),
        (lambda x: (x / "cmvn.ark").unlink(), "incomplete, expected one of cmvn.ark"),
        (lambda x: (x / "dict.txt").unlink(), "incomplete, expected one of dict.txt"),
        (lambda x: (x / "cmvn.ark").write_bytes(b"\0BDM "), "cmvn.ark: not a Kaldi matrix"),
    ],
)
def test_what_does_not_fit_is_told(asr, source, tmp_path, spoil, expected):
    spoil(source)
    status, _, err = asr("convert", "firered", source, "-o", tmp_path / "exp")
    assert status == 2
    assert expected in err
    assert not (tmp_path / "exp").exists()
