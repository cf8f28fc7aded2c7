"""Mean and variance of features as written by Kaldi and its successors: a matrix of sums, or JSON.

    [ sum_1 ... sum_F  frames
      sum of squares_1 ... F  0 ]        as text, or in binary as \\0B, `FM ` or `DM `, sizes and numbers
    {"mean_stat": [...], "var_stat": [...], "frame_num": ...}

F mel bins
"""

import json
import math
import struct

import numpy as np
import torch
from torch import Tensor

from asr.errors import CheckpointError

LEAST_VARIANCE = 1e-20
KINDS = {b"FM ": "<f4", b"DM ": "<f8"}
HEADER = struct.Struct("<bibi")


def read_cmvn(data: bytes, num_bins: int, where: str) -> tuple[Tensor, Tensor]:
    """The content of a statistics file -> mean (F,) and 1 / standard deviation (F,), float32.

    where: the file, for errors. Raises CheckpointError if it is something else, or for other features.
    """
    sums, squares, count = _json(data, where) if data.lstrip()[:1] == b"{" else _matrix(data, where)
    if len(sums) != num_bins or len(squares) != num_bins:
        raise CheckpointError(f"{where}: statistics of {len(sums)} features, the model has {num_bins}")
    is_number = 0 < count < math.inf
    mean = sums / count if is_number else np.full(num_bins, math.nan)
    variance = squares / count - mean**2 if is_number else mean
    if not np.isfinite(mean).all() or not np.isfinite(variance).all():
        raise CheckpointError(f"{where}: statistics of {count:g} frames with no finite mean")
    istd = np.maximum(variance, LEAST_VARIANCE) ** -0.5
    return torch.from_numpy(mean).float(), torch.from_numpy(istd).float()


def _json(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray, float]:
    try:
        found = json.loads(data)
        sums, squares = (np.array(found[key], dtype=np.float64) for key in ("mean_stat", "var_stat"))
        return sums.reshape(-1), squares.reshape(-1), float(found["frame_num"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: not statistics in JSON: {error}") from None


def _matrix(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray, float]:
    start = data.find(b"\0B")
    try:
        matrix = _text(data) if start < 0 else _binary(data[start + 2 :])
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{where}: not a Kaldi matrix: {error}") from None
    if matrix.ndim != 2 or len(matrix) != 2 or matrix.shape[1] < 2:
        raise CheckpointError(f"{where}: a matrix {matrix.shape}, expected sums and squares, (2, bins + 1)")
    return matrix[0, :-1], matrix[1, :-1], float(matrix[0, -1])


def _text(data: bytes) -> np.ndarray:
    """An optional name, then [ rows, each on its own line or, as WeNet writes them, all on one ]."""
    _, opening, rest = data.decode("ascii").partition("[")
    body, closing, _ = rest.partition("]")
    if not (opening and closing):
        raise ValueError("expected [ numbers ]")
    return np.array([float(x) for x in body.split()]).reshape(2, -1)


def _binary(data: bytes) -> np.ndarray:
    kind, rest = data[:3], data[3:]
    if kind not in KINDS:
        raise ValueError(f"{kind!r}, expected a matrix of float32 or float64")
    four, rows, four_too, columns = HEADER.unpack_from(rest)
    numbers = rest[HEADER.size :]
    size = np.dtype(KINDS[kind]).itemsize
    if (four, four_too) != (4, 4) or min(rows, columns) < 1 or len(numbers) < rows * columns * size:
        raise ValueError("it ends too early")
    return np.frombuffer(numbers, KINDS[kind], rows * columns).reshape(rows, columns).astype(np.float64)
