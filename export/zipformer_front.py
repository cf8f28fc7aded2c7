"""The hand-written graph of a Zipformer's front: `asr.model.zipformer_front.ZipformerFront.forward`.

Activations are channels-last, except in convolutions.

N streams · T feature frames · T' frames of the front · F mel bins · C channels
"""

from typing import NamedTuple

import onnx
from torch import nn

from asr.model.zipformer_front import RATE, SIDE, WINDOW, ConvNeXt, ZipformerFront
from export.graph import Graph
from export.zipformer_layer import (
    SWOOSH_L,
    SWOOSH_R,
    swoosh,
    write_norm,
)

PIECES = 8
"""Pieces in which the ConvNeXt layer computes its large hidden activations, so that they fit the cache and
reuse memory that the process already has."""


class Heard(NamedTuple):
    """The front's output for a call."""

    x: str
    """(N T', C)."""
    lens: str
    """(N,) of T' frames count."""
    length: str
    """(1,): T'."""
    past: str
    """(N, SIDE, F', C), for the next call."""


def write_front(graph: Graph, front: ZipformerFront, x: str, num_frames: str, past: str) -> Heard:
    """x (N, T, F), 0 after num_frames (N,); past (N, SIDE, F', C)."""
    with graph.scope("encoder.front"):
        x = graph.add("Unsqueeze", x, graph.constant([1]))
        for i, module in enumerate(front.convolutions):
            assert isinstance(module, nn.Conv2d)
            x = graph.convolution(f"convolutions.{i}", module, x, SWOOSH_R.shift)
            x = swoosh(graph, x, SWOOSH_R)
        x = graph.add("Transpose", x, perm=[0, 2, 3, 1])  # (N, T' + SIDE, F', C)
        known = graph.size(x, 1)
        length = graph.add("Sub", known, graph.constant([SIDE]))
        lens = graph.add("Sub", num_frames, graph.constant([WINDOW - RATE]))
        lens = graph.add("Max", graph.add("Div", lens, graph.constant([RATE])), graph.constant([0]))
        counts = graph.add("Cast", graph.before(lens, known), to=onnx.TensorProto.FLOAT)
        x = graph.add("Mul", x, graph.add("Unsqueeze", counts, graph.constant([2, 3])))
        seen = graph.add("Concat", past, x, axis=1)
        following = graph.slice(seen, length, known, 1)
        x = _mix(graph, front.mix, seen)
        x = graph.add("Reshape", x, graph.constant([-1, front.out.in_features]))
        weight = front.out.weight.unflatten(1, (-1, front.num_bins)).transpose(1, 2).flatten(1)
        x = graph.affine("out", weight.t(), front.out.bias, x)
        x = write_norm(graph, "norm", front.norm, x)
        return Heard(x, graph.add("Min", lens, length), length, following)


def _mix(graph: Graph, module: ConvNeXt, seen: str) -> str:
    """seen (N, T' + 2 SIDE, F', C) -> (N, T', F', C)."""
    with graph.scope("mix"):
        y = graph.add("Transpose", seen, perm=[0, 3, 1, 2])
        y = graph.convolution("depthwise", module.depthwise, y)
        y = graph.add("Transpose", y, perm=[0, 2, 3, 1])
        shape = graph.add("Shape", y)
        y = graph.add("Reshape", y, graph.constant([-1, module.expand.in_channels]))
        expand = _weights(graph, "expand", module.expand, SWOOSH_L.shift)
        contract = _weights(graph, "contract", module.contract)
        parts = []
        for part in _split(graph, y):
            hidden = swoosh(graph, _map(graph, part, expand), SWOOSH_L)
            parts.append(_map(graph, hidden, contract))
        y = graph.add("Reshape", graph.add("Concat", *parts, axis=0), shape)
        return graph.add("Add", graph.slice(seen, SIDE, -SIDE, 1), y)


def _weights(graph: Graph, name: str, module: nn.Conv2d, shift: float = 0.0) -> tuple[str, str]:
    """The weights of a pointwise convolution as a matrix, and its bias minus `shift`."""
    assert module.bias is not None
    with graph.scope(name):
        weight = graph.weight("weight", module.weight.flatten(1).t())
        return weight, graph.weight("bias", module.bias - shift)


def _split(graph: Graph, x: str) -> list[str]:
    """(M, C) -> PIECES of it, the last ones possibly empty."""
    num_rows = graph.size(x, 0)
    most = graph.add("Add", graph.add("Div", num_rows, graph.constant(PIECES)), graph.constant(1))
    left = graph.add("Sub", num_rows, graph.add("Mul", most, graph.constant(range(PIECES))))
    sizes = graph.add("Max", graph.add("Min", left, most), graph.constant(0))
    return graph.split("Split", x, sizes, count=PIECES, axis=0)


def _map(graph: Graph, x: str, weights: tuple[str, str]) -> str:
    return graph.add("Add", graph.add("MatMul", x, weights[0]), weights[1])
