"""A folder with OpenAI's checkpoint and unit ranks becomes an experiment with the same results."""

from pathlib import Path

import pytest
import torch
from torch import tensor

from asr.convert.source import Source
from asr.convert.whisper import NUM_MARKS, find_ranks, our_units, whisper_units
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.errors import CheckpointError
from asr.model.torch_scorer import TorchScorer
from asr.train.checkpoint import load_model
from asr.whisper_tokens import LANGUAGES

from .sources import write_ranks, write_whisper


@pytest.fixture
def reference(golden_set):
    return golden_set("openai_whisper")


@pytest.fixture
def source(reference, tmp_path: Path) -> Path:
    return write_whisper(reference, tmp_path / "source")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


def test_it_computes_the_same(asr, reference, source, tmp_path):
    status, out, err = asr("convert", "whisper", source, "-o", tmp_path / "exp")
    assert (status, err) == (0, "")
    assert "mode whisper finds the language out" in out
    model, tokenizer, config = load_model(tmp_path / "exp")
    special, dims = reference.config["special"], reference.config["dims"]
    units = whisper_units(dims["n_vocab"], special["sot"], special["eot"])
    for name, i in zip(LANGUAGES, special["languages"].values(), strict=False):  # the files do not name them
        assert tokenizer.symbols[units.outputs.index(i)] == f"<|{name}|>"
    for name, unit in (("transcribe", "transcribe"), ("no_timestamps", "notimestamps")):
        assert tokenizer.symbols[units.outputs.index(special[name])] == f"<|{unit}|>"
    assert tokenizer.symbols[units.outputs.index(special["timestamp_begin"])] == "<|0.00|>"
    assert config.decoder.type == "whisper"
    with torch.no_grad():
        for i in range(len(reference["mel"])):
            wav = reference[f"wav{i}"][None, : 320 * dims["n_audio_ctx"]]
            x, x_lens = model.features(wav, tensor([wav.shape[1]]))
            torch.testing.assert_close(x[0].T, reference["mel"][i], atol=2e-4, rtol=0)
            y, _ = model.encode(x, x_lens)
            close(y[0], reference["encoder_out"][i])
    samples = reference["wav0"].numpy()[: 320 * dims["n_audio_ctx"]]
    found = decode(
        TorchScorer(model, "cpu", symbols=tokenizer.symbols), "", [samples], SearchConfig(max_tokens=5)
    )
    assert found[0]


def test_weights_in_16_bits_are_widened_as_this_family_publishes_them(asr, reference, source, tmp_path):
    halves = {name: x.half() for name, x in reference.weights.items()}
    torch.save({"dims": reference.config["dims"], "model_state_dict": halves}, source / "tiny.pt")
    status, out, _ = asr("convert", "whisper", source, "-o", tmp_path / "halves")
    assert status == 0
    assert f"{len(halves)} tensors were float16, now float32" in out
    rounded = {name: x.float() for name, x in halves.items()}
    torch.save({"dims": reference.config["dims"], "model_state_dict": rounded}, source / "tiny.pt")
    assert asr("convert", "whisper", source, "-o", tmp_path / "rounded")[0] == 0
    one, other = (load_model(tmp_path / name)[0].state_dict() for name in ("halves", "rounded"))
    assert all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize(
    ("num_units", "num_pieces", "languages"),
    [(51865, 50257, 99), (51866, 50257, 100), (51864, 50256, 99), (51865, 50256, 0), (51864, 50257, 0)],
)
def test_published_units_are_those_of_the_model(tmp_path, num_units, num_pieces, languages):
    """English-only models have one unit less, which a different number of languages could hide."""
    write_ranks(tmp_path, num_pieces)
    sizes = {"n_vocab": num_units, "n_audio_ctx": 1500}
    if not languages:
        with pytest.raises(CheckpointError, match=f"{num_pieces} units do not fit"):
            our_units(sizes, tmp_path / "multilingual.tiktoken")
        return
    symbols, found = our_units(sizes, tmp_path / "multilingual.tiktoken")
    assert found == num_pieces
    start = symbols.index("<|startoftranscript|>")
    assert symbols.index("<|translate|>") - start - 1 == languages
    assert len(symbols) == num_units - 1 + 3


@pytest.mark.parametrize(
    ("num_units", "name"), [(51864, "gpt2"), (51865, "multilingual"), (51866, "multilingual")]
)
def test_of_both_files_of_ranks_the_one_of_the_model_is_read(tmp_path, num_units, name):
    for other in ("gpt2", "multilingual"):
        (tmp_path / f"{other}.tiktoken").touch()
    assert find_ranks(Source(tmp_path, "here"), num_units).name == f"{name}.tiktoken"


def changed(source: Path, **dims: int) -> None:
    saved = torch.load(source / "tiny.pt", weights_only=True)
    saved["dims"] |= dims
    torch.save(saved, source / "tiny.pt")


def with_other_ranks(source: Path, languages: int) -> None:
    """Write as many ranks as leave room for `languages` language units."""
    dims = torch.load(source / "tiny.pt", weights_only=True)["dims"]
    num_times = dims["n_audio_ctx"] + 1
    write_ranks(source, dims["n_vocab"] - NUM_MARKS - num_times - languages)


def with_other_positions(source: Path) -> None:
    saved = torch.load(source / "tiny.pt", weights_only=True)
    saved["model_state_dict"]["encoder.positional_embedding"] += 1
    torch.save(saved, source / "tiny.pt")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda x: (x / "multilingual.tiktoken").unlink(),
            "expected one of multilingual.tiktoken",
        ),
        (lambda x: with_other_ranks(x, languages=0), "units do not fit the"),
        (lambda x: with_other_ranks(x, languages=-120), "units do not fit the"),
        (lambda x: (x / "multilingual.tiktoken").write_text("x"), ".tiktoken:1: 'x', expected"),
        (
            lambda x: torch.save({"a": torch.ones(1)}, x / "tiny.pt"),
            "no dims in it; expected OpenAI",
        ),
        (lambda x: changed(x, n_audio_layer=77), "layers of the encoder, dims say 77"),
        (lambda x: changed(x, n_text_state=10**5), "decoder.token_embedding.weight is ("),
        (with_other_positions, "are not the sinusoids of Whisper"),
    ],
)
def test_what_does_not_fit_is_told(asr, source, tmp_path, spoil, expected):
    spoil(source)
    status, _, err = asr("convert", "whisper", source, "-o", tmp_path / "exp")
    assert status == 2
    assert expected in err
    assert not (tmp_path / "exp").exists()
