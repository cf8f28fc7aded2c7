"""Whisper's units and its mode; its checkpoints in the hub's format are the same model."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import tensor

from asr.byte_tokens import symbol_of
from asr.convert.source import Source, open_source
from asr.convert.whisper import MARK, read
from asr.convert.whisper_hub import RENAMED, byte_letters, hub_weights
from asr.decode.config import SearchConfig
from asr.decode.modes import decode, modes_for
from asr.decode.whisper import MUSIC, NO_SPEECH, Specials, unspoken
from asr.errors import CheckpointError, ConfigError
from asr.model.torch_scorer import TorchScorer
from asr.model.whisper import sinusoid_table
from asr.tokens import SPECIAL, load_tokenizer, write_tokens
from asr.whisper_tokens import LANGUAGES, whisper_symbols

PIECES = [*(bytes([x]) for x in range(256)), b" t", b"he", b" the", b" -", b" '", b"=="]
DIMS = {
    "n_mels": 16,
    "n_audio_ctx": 20,
    "n_audio_state": 24,
    "n_audio_head": 2,
    "n_audio_layer": 2,
    "n_vocab": len(PIECES) + 1 + 1 + 100 + 6 + 21,
    "n_text_ctx": 12,
    "n_text_state": 16,
    "n_text_head": 2,
    "n_text_layer": 2,
}


def random_weights(dims):
    """All tensors of the reference implementation."""
    shapes = {"encoder.conv1": (dims["n_mels"], 3), "encoder.conv2": (dims["n_audio_state"], 3)}
    found = {}

    def linear(name, out, *inner, bias=True):
        found[f"{name}.weight"] = torch.randn(out, *inner) * 0.3
        if bias:
            found[f"{name}.bias"] = torch.randn(out)

    for name, inner in shapes.items():
        linear(name, dims["n_audio_state"], *inner)
    for part, kind in (("encoder", "audio"), ("decoder", "text")):
        dim = dims[f"n_{kind}_state"]
        for i in range(dims[f"n_{kind}_layer"]):
            block = f"{part}.blocks.{i}."
            for attention in ("attn", "cross_attn")[: 1 + (part == "decoder")]:
                for x in ("query", "key", "value", "out"):
                    inner = (
                        dims["n_audio_state"] if attention == "cross_attn" and x in ("key", "value") else dim
                    )
                    linear(f"{block}{attention}.{x}", dim, inner, bias=x != "key")
                linear(f"{block}{attention}_ln", dim)
            linear(f"{block}mlp.0", 4 * dim, dim)
            linear(f"{block}mlp.2", dim, 4 * dim)
            linear(f"{block}mlp_ln", dim)
        linear(f"{part}.ln_post" if part == "encoder" else "decoder.ln", dim)
    found["encoder.positional_embedding"] = sinusoid_table(dims["n_audio_ctx"], dims["n_audio_state"])
    found["decoder.positional_embedding"] = torch.randn(dims["n_text_ctx"], dims["n_text_state"])
    found["decoder.token_embedding.weight"] = torch.randn(dims["n_vocab"], dims["n_text_state"])
    return found


def write(folder, dims=DIMS, pieces=PIECES, **weights):
    folder.mkdir()
    torch.manual_seed(1)
    torch.save({"dims": dims, "model_state_dict": random_weights(DIMS) | weights}, folder / "tiny.pt")
    lines = "".join(f"{base64.b64encode(x).decode()} {i}\n" for i, x in enumerate(pieces))
    (folder / "multilingual.tiktoken").write_text(lines)
    return Source(folder, str(folder))


def write_of_hub(folder):
    """Write the same model in the hub's format."""
    folder.mkdir()
    torch.manual_seed(1)
    back = {
        r"\.blocks\.": ".layers.",
        r"\.attn_ln\.": ".self_attn_layer_norm.",
        r"\.cross_attn_ln\.": ".encoder_attn_layer_norm.",
        r"\.mlp_ln\.": ".final_layer_norm.",
        r"\.ln(_post)?\.": ".layer_norm.",
        r"\.attn\.": ".self_attn.",
        r"\.cross_attn\.": ".encoder_attn.",
        r"\.(query|key|value)\.": lambda x: f".{x[1][0]}_proj.",
        r"attn\.out\.": "attn.out_proj.",
        r"\.mlp\.0\.": ".fc1.",
        r"\.mlp\.2\.": ".fc2.",
        r"\.positional_embedding$": ".embed_positions.weight",
        r"\.token_embedding\.": ".embed_tokens.",
    }
    weights = {}
    for name, x in random_weights(DIMS).items():
        for ours, theirs in back.items():
            name = re.sub(ours, theirs, name)
        weights[f"model.{name}"] = x
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in piece): i for i, piece in enumerate(PIECES)}
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(PIECES)}))
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(heads))
    return Source(folder, str(folder))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return read(write(tmp_path_factory.mktemp("source") / "whisper"))


def test_the_units_are_written_and_read(converted, tmp_path):
    write_tokens(tmp_path / "tokens", *converted.tokens)
    tokenizer = load_tokenizer(tmp_path / "tokens")
    assert tokenizer.kind == "bytes"
    assert len(tokenizer.symbols) == converted.model.decoder.out.out_features == DIMS["n_vocab"] + 2
    ids = tokenizer.encode("the é 字")
    assert tokenizer.decode(ids) == "the é 字"
    assert tokenizer.symbols[ids[0]] == "▁the"
    specials = Specials.of(tokenizer.symbols)
    assert list(specials.languages) == list(LANGUAGES)
    assert tokenizer.symbols[specials.timestamps :] == [f"<|{0.02 * i:.2f}|>" for i in range(21)]
    assert [tokenizer.symbols[x] for x in specials.others[:3]] == [
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
    ]


@pytest.mark.parametrize("more", [[], ["♪♪", " ♪", "<<", " <"], ["♯".encode()[:2], b" \xe2", "((", " ♬"]])
def test_what_is_not_spoken_is_known_by_its_symbols(more, tmp_path):
    """Symbols encoded as units: those that are one unit, and the first unit of musical symbols."""
    pieces = [*PIECES]
    for piece in (x.encode() if isinstance(x, str) else x for x in more):
        pieces += [x for i in range(2, len(piece) + 1) if (x := piece[:i]) not in pieces]
    write_tokens(tmp_path, [*SPECIAL, *map(symbol_of, pieces)])
    tokenizer = load_tokenizer(tmp_path)
    encode = tokenizer.encode_exactly
    expected = {encode(" -")[0], encode(" '")[0]}
    for sign in (*NO_SPEECH, *MUSIC):
        for units in (encode(sign), encode(f" {sign}")):
            if len(units) == 1 or sign in MUSIC:
                expected.add(units[0])
    assert set(unspoken(tokenizer.symbols)) == expected


@torch.no_grad()
def test_it_transcribes_what_its_window_holds(converted):
    scorer = TorchScorer(converted.model, "cpu", symbols=converted.tokens.symbols)
    specials = Specials.of(scorer.symbols)
    samples = [np.random.default_rng(0).normal(size=n).astype(np.float32) for n in (6000, 3000)]
    assert modes_for(scorer.decoder_type, scorer.has_ctc) == ["whisper"]
    for timestamps in (False, True):
        config = SearchConfig(beam=3, timestamps=timestamps)
        found = [nbest[0] for nbest in decode(scorer, "", samples, config)]
        alone = [decode(scorer, "whisper", [x], config)[0][0] for x in samples]
        for one, other in zip(found, alone, strict=True):
            assert one.tokens == other.tokens
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert len(one.tokens) == len(one.frames) == len(one.confidence) <= DIMS["n_text_ctx"] // 2
            assert sorted(one.frames) == list(one.frames)
            assert all(0 <= x <= 1 for x in one.confidence)
            assert not {*unspoken(scorer.symbols), *specials.others} & set(one.tokens)
            assert (one.tokens[0] >= specials.timestamps) == timestamps or not timestamps
    english = decode(scorer, "", samples, SearchConfig(beam=1, language="en", task="translate"))
    assert english != decode(scorer, "", samples, SearchConfig(beam=1, language="de"))
    with pytest.raises(ConfigError, match="language is xx, expected one of en, zh"):
        decode(scorer, "", samples, SearchConfig(language="xx"))
    with pytest.raises(ConfigError, match="prompt: mode whisper makes its own"):
        decode(scorer, "", samples, SearchConfig(prompt=(5,)))
    with pytest.raises(ConfigError, match="mode attention: this model's decoder is of type whisper"):
        decode(scorer, "attention", samples, SearchConfig())
    with pytest.raises(ConfigError, match="expected the units of Whisper"):
        decode(TorchScorer(converted.model, "cpu"), "", samples, SearchConfig())


@torch.no_grad()
def test_models_of_english_alone_are_told_no_language(converted):
    symbols = whisper_symbols(PIECES, 100, 21, only_english=True)
    assert Specials.of(symbols).languages == {}
    scorer = TorchScorer(converted.model, "cpu", symbols=symbols)
    samples = [np.random.default_rng(0).normal(size=6000).astype(np.float32)]
    shown = []
    step, scorer.step = scorer.step, lambda state, tokens, k: shown.append(tokens) or step(state, tokens, k)
    assert decode(scorer, "", samples, SearchConfig(beam=1))[0][0].tokens
    assert shown[0].tolist() == [[1]]
    assert shown[1].tolist() == [[Specials.of(symbols).no_timestamps]]
    for changes in ({"language": "de"}, {"task": "translate"}):
        with pytest.raises(ConfigError, match="this model only transcribes, and only English"):
            decode(scorer, "", samples, SearchConfig(**changes))


@torch.no_grad()
def test_the_form_of_the_hub_is_the_same_model(converted, tmp_path):
    found = read(write_of_hub(tmp_path / "hub"))
    assert found.tokens == converted.tokens
    assert found.config == converted.config
    for name, x in converted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], x), name


def test_names_of_the_hub_are_known(tmp_path):
    """Every renaming is used, and the reference's names stay valid."""
    source = write_of_hub(tmp_path / "hub")
    names = source.tensors(tmp_path / "hub" / "model.safetensors").weights
    for theirs, _ in RENAMED[1:]:
        assert any(re.search(theirs, name.removeprefix("model.")) for name in names), theirs
    assert any(re.search(MARK, name) for name in names)
    ours = random_weights(DIMS)
    assert set(hub_weights(names, "model.safetensors")) == set(ours)
    assert set(hub_weights(ours, "model.safetensors")) == set(ours)
    assert any(re.search(MARK, name) for name in ours)


def test_what_is_wrong_with_a_folder_of_the_hub_is_said(tmp_path):
    def spoil(name, text):
        source = write_of_hub(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        (source.folder / name).write_text(text)
        return source

    for name, text, message in (
        ("vocab.json", "[", "vocab.json: not JSON"),
        ("vocab.json", "[]", "vocab.json: list, expected values by name"),
        ("vocab.json", '{"a": 1}', "vocab.json: no piece or byte 0"),
        ("vocab.json", '{"a": 0}', "1 units do not fit"),
        ("config.json", '{"encoder_attention_heads": 0}', "encoder_attention_heads: 0, expected a size"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(spoil(name, text))


def test_one_file_is_a_source_with_what_lies_beside_it(tmp_path):
    write(tmp_path / "whisper")
    assert read(open_source(tmp_path / "whisper" / "tiny.pt", tmp_path)).config.encoder.dim == 24


def test_a_text_beyond_the_decoder_is_no_answer(converted):
    decoder = converted.model.decoder
    keys = decoder.memory(torch.zeros(1, 20, 24))
    with pytest.raises(ConfigError, match="12 positions were learnt"):
        decoder(tensor([[1] * 13]), *keys, tensor([20]))


@pytest.mark.parametrize(
    ("heads", "message"),
    [(3, "has 3, expected"), ([[0, 1], [0]], r"has \[0\], expected"), ([[2, 0]], "of 2 layers and 2 heads")],
)
def test_heads_that_follow_the_speech_come_along(tmp_path, heads, message):
    source = write_of_hub(tmp_path / "hub")
    assert read(source).config.decoder.alignment_heads == []
    file = tmp_path / "hub" / "generation_config.json"
    file.write_text(json.dumps({"alignment_heads": [[1, 0], [0, 1], [1, 1]]}))
    guide = read(source).model.decoder.guide
    assert [guide.of(layer) for layer in range(2)] == [[1], [0, 1]]
    file.write_text(json.dumps({"alignment_heads": heads}))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read(source)


def test_an_output_layer_that_is_not_the_embedding_is_refused(tmp_path):
    source = write_of_hub(tmp_path / "hub")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    weights["proj_out.weight"] += 1
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: proj_out\.weight is not the embedding"):
        read(source)


def test_weights_in_several_files_are_told(tmp_path):
    source = write_of_hub(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "hub" / "model-00001-of-00002.safetensors")
    (tmp_path / "hub" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weights in several files; save them as one"):
        read(source)


def test_sizes_of_the_hub_are_checked_with_the_tensors(tmp_path):
    source = write_of_hub(tmp_path / "hub")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    weights["model.decoder.embed_tokens.weight"] = weights["proj_out.weight"] = torch.zeros(7)
    save_file({x: y.clone() for x, y in weights.items()}, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.token_embedding\.weight is \(7, 16\)"):
        read(source)
