"""Reference data, written as the files and folders that each family publishes."""

import argparse
import base64
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import yaml
from torch import Tensor


@dataclass
class GoldenSet:
    """One folder: sizes and options, inputs and outputs, weights."""

    config: dict[str, Any]
    arrays: dict[str, Tensor]
    weights: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]


def symbols(count: int, special: dict[int, str]) -> list[str]:
    """`count` different units, those in `special` with the given names."""
    letters = iter("▁abcdefghijklmnopqrstuvwxyz" + "".join(map(chr, range(0x4E00, 0x4E00 + count))))
    return [special[i] if i in special else next(letters) for i in range(count)]


SIZES = ("num_heads", "query_head_dim", "pos_head_dim", "value_head_dim")


def icefall_options(config: dict) -> dict:
    """icefall's training options, as its checkpoints store them."""
    found = {name: ",".join(map(str, config[name])) for name in SIZES}
    heads = config["attention_decoder"]["num_heads"]
    return found | {"feature_dim": config["feature_dim"], "attention_decoder_num_heads": heads}


def write_icefall(reference: GoldenSet, folder: Path) -> Path:
    """exp/pretrained.pt and data/lang_bpe/tokens.txt, as in its repositories."""
    (folder / "exp").mkdir(parents=True)
    (folder / "data" / "lang_bpe").mkdir(parents=True)
    saved = {"model": reference.weights, "optimizer": None, **icefall_options(reference.config)}
    torch.save(saved, folder / "exp" / "pretrained.pt")
    count = reference.config["vocab_size"]
    end, blank = reference.config["attention_decoder"]["eos_id"], reference.config["blank_id"]
    unknown = next(i for i in range(count) if i not in (end, blank))
    names = [*symbols(count, {blank: "<blk>", end: "<sos/eos>", unknown: "<unk>"}), "#0", "#1"]
    lines = "".join(f"{symbol} {i}\n" for i, symbol in enumerate(names))
    (folder / "data" / "lang_bpe" / "tokens.txt").write_text(lines, encoding="utf-8")
    return folder


MARKS = ("<|nospeech|>", "<|en|>", "<|transcribe|>", "<|pnc|>")
"""Units of Canary whose ids are not in the reference."""


FEATURES = {"sample_rate": 16000, "window_size": 0.025, "window_stride": 0.01, "window": "hann", "n_fft": 512}


def canary_units(config: dict[str, Any]) -> list[str]:
    """The first units of a reference with Canary's decoder, in the order of their ids."""
    special = {config["pad"]: "<pad>", config["eos"]: "<|endoftext|>", config["bos"]: "<|startoftranscript|>"}
    others = iter(("<unk>", *MARKS))
    count = max(max(special) + 1, len(special) + 1 + len(MARKS))
    return [special[i] if i in special else next(others, f"<|spare-{i}|>") for i in range(count)]


def pieces(count: int, first: Sequence[str] = ("<unk>",)) -> bytes:
    """A SentencePiece model of `count` units: those of `first`, then characters."""
    model = io.BytesIO()
    num_characters = count - len(first) - 1  # and a space
    text = "".join(map(chr, [*range(ord("a"), ord("z") + 1), *range(0x4E00, 0x4E00 + count)]))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([text[:num_characters]] * 3),
        model_writer=model,
        model_type="char",
        vocab_size=count,
        character_coverage=1.0,
        max_sentence_length=4 * count + 1000,
        user_defined_symbols=[x for x in first if x != "<unk>"],
        unk_id=list(first).index("<unk>"),
        bos_id=-1,
        eos_id=-1,
        minloglevel=3,
    )
    return model.getvalue()


def pack(
    file: Path, options: dict[str, Any], weights: dict[str, Tensor], model: bytes | dict[str, bytes] | None
) -> Path:
    """Write the archive as NeMo does, with one tokenizer or with several, by file name."""
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    members = {"model_config.yaml": yaml.safe_dump(options).encode(), "model_weights.ckpt": buffer.getvalue()}
    members |= model if isinstance(model, dict) else {"12ab_tokenizer.model": model} if model else {}
    with tarfile.open(file, "w") as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return file


def nemo_options(config: dict[str, Any]) -> dict[str, Any]:
    bins = config["encoder"]["feat_in"]
    preprocessor = FEATURES | config.get("preprocessor", {}) | {"features": bins, "normalize": "per_feature"}
    tokenizer = {"dir": None, "type": "bpe", "model_path": "nemo:12ab_tokenizer.model"}
    rate = preprocessor["sample_rate"]
    model = {"sample_rate": rate, "preprocessor": preprocessor | {"sample_rate": "${model.sample_rate}"}}
    parts: dict[str, Any] = {}
    if "transf_decoder" in config:
        inner = dict(config["transf_decoder"])
        outer = {"pre_ln_final_layer_norm": inner.pop("pre_ln_final_layer_norm"), "encoder": None}
        parts["transf_decoder"] = outer | {"config_dict": inner | {"vocab_size": config["vocab_size"]}}
    return model | {"encoder": config["encoder"], "tokenizer": tokenizer} | parts


def write_firered(reference: GoldenSet, folder: Path) -> Path:
    """model.pth.tar, dict.txt and cmvn.ark."""
    args = reference.config["args"]
    folder.mkdir()
    saved = {"args": argparse.Namespace(**args), "model_state_dict": reference.weights}
    torch.save(saved, folder / "model.pth.tar")
    special = {0: "<blank>", 1: "<unk>", args["sos_id"]: "<sos>", args["eos_id"]: "<eos>"}
    names = symbols(args["odim"], special | {args["pad_id"]: "<pad>"})
    lines = "".join(f"{symbol} {i}\n" for i, symbol in enumerate(names))
    (folder / "dict.txt").write_text(lines, encoding="utf-8")
    frames = np.random.default_rng(2).normal(10.0, 3.0, (500, args["idim"]))
    rows = [np.append(frames.sum(0), 500), np.append((frames**2).sum(0), 0)]
    text = "\n".join(" ".join(map(repr, row.tolist())) for row in rows)
    (folder / "cmvn.ark").write_text(f" [\n{text} ]\n")
    return folder


def train_yaml(options: dict[str, Any]) -> dict[str, Any]:
    """WeNet's train.yaml for options as in a golden set."""
    parts = ("input_dim", "encoder_conf", "decoder", "decoder_conf", "model_conf")
    special = options["special_tokens"]  # None in the older format, which has sos/eos at the end
    return {name: options[name] for name in parts if name in options} | {
        "model": "asr_model",
        "encoder": "conformer",
        "output_dim": options["vocab_size"],
        "tokenizer": "char",
        "tokenizer_conf": {"special_tokens": special, "symbol_table_path": "data/lang_char.txt"},
        "ctc_conf": {"ctc_blank_id": 0},
        "dataset_conf": {
            "fbank_conf": {"num_mel_bins": options["input_dim"], "frame_shift": 10, "frame_length": 25},
            "resample_conf": {"resample_rate": 16000},
            "batch_conf": {"batch_type": "static"},
        },
        "max_epoch": 360,
    }


def wenet_unknown(options: dict[str, Any]) -> int:
    """The unit for what is unknown; the reference names it in some sets only."""
    named = options["special_tokens"] or {}
    taken = (0, options["sos"], options["eos"])
    return named.get("<unk>", next(i for i in range(options["vocab_size"]) if i not in taken))


def write_wenet(folder: Path, options: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """final.pt, train.yaml and units.txt."""
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text(yaml.safe_dump(train_yaml(options)))
    sos, eos, unknown = options["sos"], options["eos"], wenet_unknown(options)
    ends = {sos: "<sos/eos>"} if sos == eos else {sos: "<sos>", eos: "<eos>"}
    found = symbols(options["vocab_size"], {0: "<blank>", unknown: "<unk>"} | ends)
    lines = "".join(f"{symbol} {i}\n" for i, symbol in enumerate(found))
    (folder / "units.txt").write_text(lines, encoding="utf-8")
    torch.save(weights, folder / "final.pt")
    return folder


def write_ranks(folder: Path, count: int) -> None:
    lines = "".join(f"{base64.b64encode(bytes([i % 256, i // 256])).decode()} {i}\n" for i in range(count))
    (folder / "multilingual.tiktoken").write_text(lines)


def write_whisper(reference: GoldenSet, folder: Path) -> Path:
    """OpenAI's file, and the ranks of its units."""
    folder.mkdir()
    saved = {"dims": reference.config["dims"], "model_state_dict": reference.weights}
    torch.save(saved, folder / "tiny.pt")
    write_ranks(folder, reference.config["special"]["eot"])
    return folder
