"""What encoders cost: memory of attention over time, an hour of audio, 8x beside 4x subsampling, Zipformer.

    python tools/bench_encoder.py --rows memory compute time
    python tools/bench_encoder.py --rows hour --dim 256 --layers 4
    python tools/bench_encoder.py --rows zipformer

memory   attention alone at lengths 2^k: bytes of the largest tensor that an operator makes (as a
         TorchDispatchMode sees it), and growth of the resident set (VmHWM of a child process), with the
         slope of a line through the logarithms
hour     an hour of noise, from samples to the output of the encoder: peak resident set of a child process
compute  floating point operations (torch.utils.flop_counter) of 30 s: a Conformer with 4x subsampling and
         kernel 31 beside Fast Conformer with 8x and kernel 9, the same class at equal width and depth; and
         the rotary one of asr/model/conformer.py
time     the same on the clock, in turns: medians over the rounds
zipformer  both of these for Zipformer M beside Conformers with 4x subsampling and as many parameters
"""

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from asr.features import FbankConfig
from asr.model.conformer import Conformer, ConformerConfig
from asr.model.fast_conformer import FastConformer, FastConformerConfig
from asr.model.limited_attention import Window
from asr.model.masks import ChunkConfig
from asr.model.relative_attention import RelativeAttention, Sight
from asr.model.zipformer import Zipformer, ZipformerConfig
from asr.nemo_features import NemoFbank

NUM_BINS = 80
WINDOW = Window(128, 128, 1)
ATTENTION_DIM, ATTENTION_HEADS = 64, 2
LENGTHS = {"global": [2**k for k in range(8, 13)], "limited": [2**k for k in range(11, 16)]}


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that anything made."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return made


def attend(kind: str, length: int) -> None:
    """One layer of attention over `length` frames."""
    lens, attention = torch.tensor([length]), RelativeAttention(ATTENTION_DIM, ATTENTION_HEADS)
    if kind == "limited":
        sight = Sight.of_window(lens, length, WINDOW, ATTENTION_DIM)
    else:
        sight = Sight.of_mask(lens, torch.ones(1, length, length, dtype=torch.bool), ATTENTION_DIM)
    past = torch.zeros(1, ATTENTION_HEADS, 0, ATTENTION_DIM // ATTENTION_HEADS)
    with torch.no_grad():
        attention(torch.randn(1, length, ATTENTION_DIM), past, past, sight)


def resident_bytes() -> int:
    """The peak resident set so far; ru_maxrss of a new process starts with that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def growth_of_attention(kind: str, length: int) -> int:
    torch.set_num_threads(1)
    attend(kind, 64)
    before = resident_bytes()
    attend(kind, length)
    return resident_bytes() - before


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a fresh process, which has its own resident set."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def slope(lengths: Sequence[int], sizes: Sequence[int]) -> float:
    x, y = ([math.log2(v) for v in values] for values in (lengths, sizes))
    return statistics.linear_regression(x, y).slope


def print_memory() -> None:
    print("attention      frames  largest tensor, MB  resident set, MB")
    for kind, lengths in LENGTHS.items():
        tensors, residents = [], []
        for length in lengths:
            with Largest() as largest:
                attend(kind, length)
            tensors.append(largest.bytes)
            residents.append(in_child(growth_of_attention, kind, length))
            print(f"{kind:12} {length:8} {tensors[-1] / 1e6:19.1f} {residents[-1] / 1e6:17.1f}")
        # the shortest are smaller than the other memory of a process
        of_residents = slope(lengths[-3:], residents[-3:])
        print(
            f"{kind:12}    slope {slope(lengths, tensors):19.2f} {of_residents:17.2f}  (last three lengths)"
        )


def encoder(dim: int, num_layers: int, heads: int, **changes: Any) -> FastConformer:
    config = FastConformerConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=heads,
        ff_dim=4 * dim,
        causal=False,
        norm="batch_norm",
        chunk=ChunkConfig(dynamic=False),
        **changes,
    )
    return FastConformer(config, NUM_BINS).eval()


def pair(dim: int, num_layers: int, heads: int) -> dict[str, nn.Module]:
    """The two that are compared, and ours with rotary positions."""
    return {
        "conformer 4x, kernel 31": encoder(dim, num_layers, heads, subsampling=4, kernel_size=31),
        "fast conformer 8x, kernel 9": encoder(dim, num_layers, heads),
        "rotary conformer 4x, kernel 31": rotary(dim, num_layers, heads),
    }


def as_large_as_zipformer() -> dict[str, nn.Module]:
    """Zipformer M and two Conformers of 512 channels, with as many layers as give equal parameters."""
    models: dict[str, nn.Module] = {
        "zipformer M": Zipformer(ZipformerConfig(), NUM_BINS).eval(),
        "conformer 4x, kernel 31": encoder(512, 1, 8, subsampling=4, kernel_size=31),
        "rotary conformer 4x, kernel 31": rotary(512, 1, 8),
    }
    wanted, *ones = map(parameters, models.values())
    layers = [parameters(model.get_submodule("layers.0")) for model in list(models.values())[1:]]
    first, second = (1 + round((wanted - one) / layer) for one, layer in zip(ones, layers, strict=True))
    models["conformer 4x, kernel 31"] = encoder(512, first, 8, subsampling=4, kernel_size=31)
    models["rotary conformer 4x, kernel 31"] = rotary(512, second, 8)
    for name, model in models.items():
        print(f"{name:32} {parameters(model) / 1e6:8.1f} M parameters")
    return models


def rotary(dim: int, num_layers: int, heads: int) -> Conformer:
    config = ConformerConfig(dim=dim, num_layers=num_layers, num_heads=heads, ff_dim=4 * dim, kernel_size=31)
    return Conformer(config, NUM_BINS).eval()


def parameters(model: nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())


def print_compute(models: dict[str, nn.Module], seconds: float) -> None:
    x, x_lens = batch_of(seconds)
    operations = {}
    for name, model in models.items():
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x, x_lens)
        operations[name] = counter.get_total_flops()
    least = min(operations.values())
    for name, count in operations.items():
        print(f"{name:32} {count / 1e9:8.1f} GFLOP  ratio {count / least:.2f}")


def print_time(models: dict[str, nn.Module], seconds: float, rounds: int) -> None:
    x, x_lens = batch_of(seconds)
    measured: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            with torch.no_grad():
                model(x, x_lens)
            if number:  # the first is a warm-up
                measured[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in measured.items()}
    least = min(medians.values())
    for name, median in medians.items():
        print(f"{name:32} {median:8.2f} s      ratio {median / least:.2f}")


def batch_of(seconds: float) -> tuple[Tensor, Tensor]:
    frames = int(seconds * 100)
    return torch.randn(1, frames, NUM_BINS), torch.tensor([frames])


def encode_long(
    seconds: float, dim: int, num_layers: int, heads: int, threads: int
) -> tuple[float, float, int]:
    """Wall seconds, bytes of the resident set before and at its peak."""
    torch.set_num_threads(threads)
    model = encoder(dim, num_layers, heads, context=[WINDOW.left, WINDOW.right], global_tokens=1)
    features = FbankConfig(type="nemo", low_freq_hz=0, high_freq_hz=0, normalize="per_feature")
    fbank, before, start = NemoFbank(features), resident_bytes(), time.perf_counter()
    samples = torch.randn(1, int(seconds * features.sample_rate)) * 0.1
    with torch.no_grad():
        x, x_lens = fbank(samples, torch.tensor([samples.shape[1]]))
        y, y_lens, _ = model(x, x_lens)
    assert y.isfinite().all()
    assert y.shape[1] == int(y_lens)
    return time.perf_counter() - start, before, resident_bytes()


def print_hour(dim: int, num_layers: int, heads: int, threads: int) -> None:
    found, before, peak = in_child(encode_long, 3600.0, dim, num_layers, heads, threads)
    print(
        f"an hour, {num_layers} layers of {dim}, context [{WINDOW.left}, {WINDOW.right}], 1 global token: "
        f"{found:.0f} s, resident set {peak / 1e9:.2f} GB at most, {before / 1e9:.2f} GB before"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = ["memory", "hour", "compute", "time", "zipformer"]
    parser.add_argument("--rows", nargs="+", choices=rows, default=["memory", "compute", "time"])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    sizes = (options.dim, options.layers, options.heads)
    if "memory" in options.rows:
        print_memory()
    models = pair(*sizes) if {"compute", "time"} & set(options.rows) else {}
    if "compute" in options.rows:
        print_compute(models, options.seconds)
    if "time" in options.rows:
        print_time(models, options.seconds, options.rounds)
    if "zipformer" in options.rows:
        models = as_large_as_zipformer()
        print_compute(models, options.seconds)
        print_time(models, options.seconds, options.rounds)
    if "hour" in options.rows:
        print_hour(*sizes, options.threads)


if __name__ == "__main__":
    main()
