"""Data for comparisons with reference implementations, and source folders in the published layout."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asr.convert.options import Options
from asr.convert.wenet import read_config, wenet_names
from asr.model.build import build_model
from recipes.cli import main

from .sources import GoldenSet, train_yaml, write_wenet

Result = tuple[int, str, str]
Tables = Callable[[str], Iterator[tuple[dict[str, Any], dict[str, Tensor]]]]


@pytest.fixture(scope="session")
def golden_set(golden_folder: Callable[[str], Path]) -> Callable[[str], GoldenSet]:
    def read(name: str) -> GoldenSet:
        folder = golden_folder(name)
        config = json.loads((folder / "config.json").read_text())
        with np.load(folder / "io.npz") as arrays:
            found = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        return GoldenSet(config, found, load_file(folder / "weights.safetensors"))

    return read


@pytest.fixture(scope="session")
def full_size(golden: Path) -> Tables:
    """Options of the published models whose name begins with `name`, and their tensors, without values."""

    def read(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
        folder = golden / "checkpoint_tables"
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there")
        for model in json.loads((folder / "config.json").read_text()):
            if model["name"].startswith(name):
                rows = [x.split("\t") for x in (folder / f"{model['name']}.tsv").read_text().splitlines()[1:]]
                sizes = {key: [int(n) for n in shape.split("x") if n != "scalar"] for key, shape, _ in rows}
                yield model, {key: torch.empty(size, device="meta") for key, size in sizes.items()}

    return read


@pytest.fixture
def asr(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*args: object) -> Result:
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def wenet_source() -> Callable[[Path, Path], Path]:
    """Write the folder that WeNet publishes for a golden set."""

    def write(reference: Path, folder: Path) -> Path:
        options = json.loads((reference / "config.json").read_text())
        return write_wenet(folder, options, load_file(reference / "weights.safetensors"))

    return write


TINY: dict[str, Any] = {
    "input_dim": 16,
    "vocab_size": 9,
    "special_tokens": None,
    "sos": 8,
    "eos": 8,
    "encoder_conf": {
        "output_size": 8,
        "attention_heads": 2,
        "linear_units": 8,
        "num_blocks": 1,
        "cnn_module_kernel": 4,
        "cnn_module_norm": "layer_norm",
        "causal": True,
        "use_dynamic_chunk": True,
    },
    "decoder": "transformer",
    "decoder_conf": {"attention_heads": 2, "linear_units": 8, "num_blocks": 1},
    "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1},
}


@pytest.fixture
def tiny_source(tmp_path: Path) -> Path:
    """A folder in WeNet's layout with random weights, which needs no reference data."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = read_config(Options(train_yaml(TINY), "tiny"))
        parts = (config.features, config.encoder, config.decoder, config.loss)
        model = build_model(*parts, TINY["vocab_size"]).eval()
        for x in model.state_dict().values():
            x.copy_(torch.randn_like(x))
    weights = {}
    for name, names in wenet_names([]).sources(list(model.state_dict())).items():
        weights.update(zip(names, model.state_dict()[name].clone().chunk(len(names)), strict=True))
    return write_wenet(tmp_path / "source", TINY, weights)
