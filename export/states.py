"""Finds the variable sizes of a state by creating it, so that an encoder need not declare them twice.

A size is a number, or a multiple or a fraction of one of

    W    encoder frames kept as left context
    R    those that wait for their look-ahead, in each layer
    U    tokens so far, of a decoder

written as "W", "2*W" or "W/4", the latter two if layers run at several frame rates.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch.export import Dim

from asr.model.decoder import TransformerDecoder
from asr.model.encoder import Encoder, look_ahead_layers
from asr.model.state import State
from asr.runtime.info import Field, parse_size

PROBE = 64
"""Frames by which a size is varied: a multiple of every chunk_unit."""


def encoder_fields(encoder: Encoder) -> tuple[Field, ...]:
    """The state of one stream; empty if the encoder cannot stream."""
    if not encoder.can_stream:
        return ()
    unit = PROBE * encoder.chunk_unit
    varied: dict[str, Callable[[], State]] = {"W": lambda: encoder.init_state(1, 2 * unit)}
    if look_ahead_layers(encoder):
        varied["R"] = lambda: encoder.init_state(1, unit, unit)
    return _fields(encoder.init_state(1, unit), {name: make() for name, make in varied.items()}, unit)


def decoder_fields(decoder: TransformerDecoder) -> tuple[Field, ...]:
    """The state of one hypothesis, layer by layer. It is created without tokens, so a size of 0 is U."""
    return tuple(
        Field(f"{name}_{i}", tuple(size or "U" for size in x.shape[2:]), _dtype(x))
        for name, x in decoder.init_state(1).named().items()
        for i in range(x.shape[1])
    )


def _fields(state: State, varied: Mapping[str, State], unit: int) -> tuple[Field, ...]:
    found = []
    for name, x in state.named().items():
        shape = [
            _size(size, {key: other.named()[name].shape[i] for key, other in varied.items()}, unit)
            for i, size in enumerate(x.shape)
        ]
        found.append(Field(name, tuple(shape[1:]), _dtype(x)))
    return tuple(found)


def _size(size: int, others: Mapping[str, int], unit: int) -> int | str:
    """The notation of a size that becomes others[V] if variable V grows by `unit`."""
    for name, other in others.items():
        if other != size:
            share = Fraction(other - size, unit)
            assert size == (share * unit if name == "W" else 0), "sizes are in proportion to one variable"
            return share_of(name, share)
    return size


def share_of(name: str, share: Fraction) -> str:
    """The size that is `share` times a variable."""
    times = f"{share.numerator}*" if share.numerator > 1 else ""
    part = f"/{share.denominator}" if share.denominator > 1 else ""
    return f"{times}{name}{part}"


def _dtype(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def dynamic_shapes(fields: Sequence[Field], batch: Any) -> dict[str, dict[int, Any]]:
    """The dynamic dimensions of each field, for torch.export, the first of them `batch`."""
    parts: dict[str, int] = {}  # the divisor of each variable: 4 if there is W/4
    for name, share in (parse_size(size) for f in fields for size in f.shape if isinstance(size, str)):
        parts[name] = math.lcm(parts.get(name, 1), share.denominator)
    dims = {name: Dim(name if part == 1 else f"{name}_{part}") for name, part in parts.items()}
    shapes: dict[str, dict[int, Any]] = {}
    for f in fields:
        shapes[f.name] = {0: batch}
        for i, size in enumerate(f.shape, start=1):
            if isinstance(size, str):
                name, share = parse_size(size)
                times = int(share * parts[name])
                shapes[f.name][i] = dims[name] if times == 1 else times * dims[name]
    return shapes
