"""Source folders of the real layout, made from golden weights, and the verbs in process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from recipes.cli import main

Result = tuple[int, str, str]


@pytest.fixture
def asr(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*args: object) -> Result:
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def symbols_for(count: int, special: dict[int, str]) -> list[str]:
    """`count` different units, those in `special` by their names."""
    letters = iter("▁abcdefghijklmnopqrstuvwxyz" + "".join(map(chr, range(0x4E00, 0x4E00 + count))))
    return [special[i] if i in special else next(letters) for i in range(count)]


@pytest.fixture(scope="session")
def wenet_source() -> Callable[[Path, Path], Path]:
    """Write the folder that WeNet publishes for a golden set."""

    def write(reference: Path, folder: Path) -> Path:
        folder.mkdir(parents=True)
        options = json.loads((reference / "config.json").read_text())
        parts = ("input_dim", "encoder_conf", "decoder", "decoder_conf", "model_conf")
        special = options["special_tokens"]  # None in the older kind, which has sos/eos at the end
        names = {0: "<blank>", 1: "<unk>", options["sos"]: "<sos/eos>"}
        train = {name: options[name] for name in parts if name in options} | {
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
        (folder / "train.yaml").write_text(yaml.safe_dump(train))
        symbols = symbols_for(options["vocab_size"], names)
        lines = "".join(f"{symbol} {i}\n" for i, symbol in enumerate(symbols))
        (folder / "units.txt").write_text(lines, encoding="utf-8")
        torch.save(load_file(reference / "weights.safetensors"), folder / "final.pt")
        return folder

    return write
