"""Feature statistics in every common format give the same mean and deviation."""

import json
import struct

import numpy as np
import pytest
import torch

from asr.convert.kaldi import read_cmvn
from asr.errors import CheckpointError

BINS = 5


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(5).normal(3.0, [1, 2, 3, 4, 5], (200, BINS))


@pytest.fixture
def forms(frames: np.ndarray) -> dict[str, bytes]:
    sums, squares = frames.sum(0), (frames**2).sum(0)
    matrix = np.stack([np.append(sums, len(frames)), np.append(squares, 0)])
    rows = [" ".join(map(repr, row.tolist())) for row in matrix]

    def binary(kind: bytes, dtype: str) -> bytes:
        return b"\0B" + kind + struct.pack("<bibi", 4, 2, 4, BINS + 1) + matrix.astype(dtype).tobytes()

    stats = {"mean_stat": sums.tolist(), "var_stat": squares.tolist(), "frame_num": len(frames)}
    return {
        "text": f" [\n  {rows[0]}\n  {rows[1]} ]\n".encode(),
        "named text": f"global  [\n  {rows[0]}\n  {rows[1]} ]\n".encode(),
        "one line": f"[ {rows[0]} {rows[1]} ]".encode(),
        "float64": binary(b"DM ", "<f8"),
        "float32": binary(b"FM ", "<f4"),
        "archive": b"global " + binary(b"DM ", "<f8"),
        "json": json.dumps(stats).encode(),
    }


NAMES = ["text", "named text", "one line", "float64", "float32", "archive", "json"]


@pytest.mark.parametrize("name", NAMES)
def test_every_form_gives_mean_and_deviation(frames, forms, name):
    mean, istd = read_cmvn(forms[name], BINS, "cmvn")
    assert mean.dtype == istd.dtype == torch.float32
    np.testing.assert_allclose(mean, frames.mean(0), rtol=1e-4)
    np.testing.assert_allclose(istd, 1 / frames.std(0), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_it_and_other_features_are_errors(forms, name):
    with pytest.raises(CheckpointError, match=r"^cmvn: "):
        read_cmvn(forms[name][: len(forms[name]) // 2], BINS, "cmvn")
    with pytest.raises(CheckpointError, match="statistics of 5 features, the model has 80"):
        read_cmvn(forms[name], 80, "cmvn")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "expected \\[ numbers \\]"),
        (b"[ 1 2 x 4 ]", "could not convert"),
        (b"[ 1 2 3 ]", "cannot reshape"),
        (b"[ 1 2 0 4 5 6 ]", "statistics of 0 frames"),
        (b"[ 1 1 1 1 1 ; ]", "could not convert"),
        (b"\0BCM " + bytes(30), "expected a matrix of float32 or float64"),
        (b"\0BDM " + struct.pack("<bibi", 4, 2**30, 4, 2**30), "ends too early"),
        (b"\0BDM " + struct.pack("<bibi", 4, -2, 4, -6) + bytes(96), "ends too early"),
        (b"\0BDM \4", "not a Kaldi matrix"),
        (b'{"mean_stat": 3}', "not statistics in JSON"),
    ],
)
def test_what_is_no_statistics_is_told(data, expected):
    with pytest.raises(CheckpointError, match=expected):
        read_cmvn(data, 2, "cmvn")
