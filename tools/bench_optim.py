"""A step of ScaledAdam beside one of torch's fused AdamW, each with its clipping of gradients and without.

Tensors of the shapes of Zipformer-S (arXiv:2310.11230) with heads for 500 units and an attention decoder;
the two in turns, medians over the rounds of milliseconds: processor time on a CPU, elapsed time on a GPU.

    python tools/bench_optim.py --rounds 10 --threads 1
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from asr.scaled_adam import PERIOD, ScaledAdam

STACKS = [  # layers, channels, hidden channels, heads, kernel
    (2, 192, 512, 4, 31),
    (2, 256, 768, 4, 31),
    (2, 256, 768, 4, 15),
    (2, 256, 768, 8, 15),
    (2, 256, 768, 4, 15),
    (2, 256, 768, 4, 31),
]
QUERY, VALUE, POSITION, OFFSETS = 32, 12, 4, 48
WARM = 2
DECODER_LAYERS, DECODER, DECODER_HIDDEN, UNITS = 6, 512, 2048, 500


def shapes() -> Iterator[tuple[int, ...]]:
    """The shapes of matrices with their biases, kernels, vectors and scalars."""
    for layers, dim, hidden, heads, kernel in STACKS:
        for _ in range(layers):
            yield from linear(dim, heads * (2 * QUERY + POSITION))
            yield heads * POSITION, OFFSETS
            for _ in range(2):  # attention and convolution
                yield from (*linear(dim, heads * VALUE), *linear(heads * VALUE, dim))
                yield from (*linear(dim, 2 * dim), (dim, 1, kernel), (dim,), *linear(dim, dim))
            for width in (hidden * 3 // 4, hidden, hidden * 5 // 4):
                yield from (*linear(dim, width), *linear(width, dim))
            yield from (*linear(dim, 3 * (dim * 3 // 4)), *linear(dim * 3 // 4, dim))
            yield from ((dim,), (dim,), (dim,), ())  # norm and bypasses
    for _ in range(DECODER_LAYERS):
        yield from (shape for _ in range(8) for shape in linear(DECODER, DECODER))
        yield from (*linear(DECODER, DECODER_HIDDEN), *linear(DECODER_HIDDEN, DECODER))
        yield from [(DECODER,)] * 6
    yield from (*linear(256, UNITS), *linear(DECODER, UNITS))


def linear(inputs: int, outputs: int) -> list[tuple[int, ...]]:
    return [(outputs, inputs), (outputs,)]


def parameters(device: torch.device) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(0.05 * torch.randn(shape, device=device)) for shape in shapes()]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def measure(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds per step of each, the median over rounds of as many steps as ScaledAdam needs for one of
    every kind."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for number in range(rounds + WARM):
        for name, step in steps.items():
            begin = clock()
            for _ in range(PERIOD):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM:
                times[name].append(1000 * (clock() - begin) / PERIOD)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, theirs = parameters(options.device), parameters(options.device)
    scaled, adam = ScaledAdam(ours, lr=1e-5), torch.optim.AdamW(theirs, lr=1e-5, fused=True)
    found = measure(
        {
            "scaled": scaled.step,
            "adamw": adam.step,
            "scaled clipped": lambda: (scaled.clip(2.0), scaled.step()),
            "adamw clipped": lambda: (clip_grad_norm_(theirs, 5.0), adam.step()),
        },
        options.rounds,
        options.device,
    )
    count, size = len(ours), sum(p.numel() for p in ours) / 1e6
    print(f"{count} tensors, {size:.1f} M numbers, {options.device}, {options.threads} threads")
    for name in ("", " clipped"):
        a, b = found[f"scaled{name}"], found[f"adamw{name}"]
        print(f"step{name}: ScaledAdam {a:.1f} ms, AdamW {b:.1f} ms, ratio {a / b:.2f}")


if __name__ == "__main__":
    main()
