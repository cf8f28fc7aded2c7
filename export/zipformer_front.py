"""The front of a Zipformer in a graph, written by hand: `asr.model.zipformer_front.ZipformerFront.forward`.

Activations have their channels last, but for convolutions.

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
    write_convolution,
    write_linear,
    write_norm,
)


class Heard(NamedTuple):
    """What the front makes of a call."""

    x: str
    """(N T', C)."""
    lens: str
    """(N,) of T' frames count."""
    length: str
    """(1,): T'."""
    past: str
    """(N, SIDE, F', C), for the next call."""


def write_front(graph: Graph, front: ZipformerFront, x: str, num_frames: str, past: str) -> Heard:
    """x (N, T, F), 0 behind num_frames (N,); past (N, SIDE, F', C)."""
    with graph.scope("encoder.front"):
        x = graph.add("Unsqueeze", x, graph.constant([1]))
        for i, module in enumerate(front.convolutions):
            assert isinstance(module, nn.Conv2d)
            x = swoosh(graph, write_convolution(graph, f"convolutions.{i}", module, x, SWOOSH_R), SWOOSH_R)
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
        x = write_linear(graph, "out", weight, front.out.bias, x)
        x = write_norm(graph, "norm", front.norm, x)
        return Heard(x, graph.add("Min", lens, length), length, following)


def _mix(graph: Graph, module: ConvNeXt, seen: str) -> str:
    """seen (N, T' + 2 SIDE, F', C) -> (N, T', F', C)."""
    with graph.scope("mix"):
        y = graph.add("Transpose", seen, perm=[0, 3, 1, 2])
        y = write_convolution(graph, "depthwise", module.depthwise, y)
        y = graph.add("Transpose", y, perm=[0, 2, 3, 1])
        shape = graph.add("Shape", y)
        y = graph.add("Reshape", y, graph.constant([-1, module.expand.in_channels]))
        assert module.expand.bias is not None
        assert module.contract.bias is not None
        bias = module.expand.bias - SWOOSH_L.shift
        y = swoosh(graph, write_linear(graph, "expand", module.expand.weight.flatten(1), bias, y), SWOOSH_L)
        y = write_linear(graph, "contract", module.contract.weight.flatten(1), module.contract.bias, y)
        return graph.add("Add", graph.slice(seen, SIDE, -SIDE, 1), graph.add("Reshape", y, shape))
