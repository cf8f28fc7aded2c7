"""The hand-written graph of a Zipformer layer: `asr.model.zipformer_layer.ZipformerLayer.forward`.

Activations are (N T, C), so that a matrix and its bias are one operation. Shares and scales are folded into
the weights where that is exact. Each layer has its own state tensors; while streams go on, all frames of a
call count, and the state that they keep is a slice.

N streams · T frames at the rate of the layer · W cached frames · C channels · H heads · D channels per head
· D' of the queries for positions · K kernel
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from asr.model.layers import BiasNorm
from asr.model.zipformer_convolution import ChunkConvolution, Convolution
from asr.model.zipformer_layer import (
    Attention,
    AttentionWeights,
    Bypass,
    NonlinearAttention,
    ZipformerFeedForward,
    ZipformerLayer,
)
from export.graph import END, Graph
from export.zipformer_sight import Sight

SLOPE = 0.08
"""The slope of both activations, far to the left."""

MOST = 80.0
"""Maximum exponent; above it log(exp(-c) + exp(z)) is z, and exp(z) soon infinite."""


class Swoosh(NamedTuple):
    """log(1 + exp(x - a)) - SLOPE x - b as log(exp(-c) + exp(z)) - SLOPE z, where z = x - a - c.

    What is subtracted from x is folded into the preceding bias.
    """

    floor: float
    """exp(-c)."""
    shift: float
    """a + c."""

    @classmethod
    def of(cls, a: float, b: float) -> "Swoosh":
        c = (SLOPE * a + b) / (1 - SLOPE)
        return cls(math.exp(-c), a + c)


SWOOSH_L, SWOOSH_R = Swoosh.of(4.0, 0.035), Swoosh.of(1.0, 0.313261687)


def swoosh(graph: Graph, z: str, kind: Swoosh) -> str:
    """Softplus, which is slow in onnxruntime, would take three times as long as all of this."""
    y = graph.add("Exp", graph.add("Clip", z, "", graph.constant(MOST, "float32")))
    y = graph.add("Log", graph.add("Add", y, graph.constant(kind.floor, "float32")))
    straight = graph.add("Mul", z, graph.constant(SLOPE, "float32"))
    return graph.add("Sub", graph.add("Max", y, z), straight)


def write_norm(graph: Graph, name: str, module: BiasNorm, x: str, scale: float | Tensor = 1.0) -> str:
    """x (..., C) -> the scaled output; scale: a number, or (C,)."""
    with graph.scope(name):
        y = graph.add("Sub", x, graph.weight("bias", module.bias))
        length = graph.add("ReduceL2", y, graph.constant([-1]), keepdims=1)
        factor = scale * module.log_scale.exp() * math.sqrt(len(module.bias))
        return graph.add("Mul", graph.add("Div", x, length), graph.weight("scale", factor))


class LayerWriter:
    """Writes one layer."""

    def __init__(
        self, graph: Graph, name: str, layer: ZipformerLayer, past: Mapping[str, str], sight: Sight
    ) -> None:
        """past: the state, by field names, which end with the name of the layer."""
        self.graph, self.name, self.layer, self.past, self.sight = graph, name, layer, past, sight
        self.following: dict[str, str] = {}
        """Field -> its value after the call."""

    def write(self, x: str) -> str:
        """x (N T, C) -> (N T, C)."""
        graph, layer, before = self.graph, self.layer, x
        weights = self._weights(layer.weights, x)
        x = graph.add("Add", x, self._feed_forward("feed_forward_1", layer.feed_forward_1, x))
        x = graph.add("Add", x, self._nonlinear(layer.nonlinear, x, weights))
        x = graph.add("Add", x, self._attention("attention_1", layer.attention_1, x, weights))
        x = graph.add("Add", x, self._convolution(1, layer.convolution_1, x))
        x = graph.add("Add", x, self._feed_forward("feed_forward_2", layer.feed_forward_2, x))
        x = self._bypass(layer.bypass_middle, before, x)
        x = graph.add("Add", x, self._attention("attention_2", layer.attention_2, x, weights))
        x = graph.add("Add", x, self._convolution(2, layer.convolution_2, x))
        x = graph.add("Add", x, self._feed_forward("feed_forward_3", layer.feed_forward_3, x))
        share = layer.bypass.scale
        with graph.scope("bypass"):
            kept = graph.add("Mul", before, graph.weight("kept", 1 - share))
        return graph.add("Add", kept, write_norm(graph, "norm", layer.norm, x, share))

    def _weights(self, module: AttentionWeights, x: str) -> str:
        """x (N T, C) -> attention (N, H, T, W + T)."""
        graph, sight, heads = self.graph, self.sight, module.num_heads
        with graph.scope("weights"):
            # queries, keys and position queries of a head side by side
            parts = [x.unflatten(0, (heads, -1)) for x in module.project.weight.split(module.splits)]
            biases = [x.unflatten(0, (heads, -1)) for x in module.project.bias.split(module.splits)]
            weight, bias = torch.cat(parts, 1).flatten(0, 1), torch.cat(biases, 1).flatten()
            y = graph.affine("project", weight.t(), bias, x)
            dims = [part.shape[1] for part in parts]
            y = self._split_heads(y, heads, sum(dims))
            q, k, p = graph.split("Split", y, graph.constant(dims), count=3, axis=3)
            k = self._extend("keys", k)
            near = graph.add("MatMul", p, sight.tables[self.name])
            near = graph.add("Reshape", near, graph.constant([0, 0, -1]))
            near = graph.add("Reshape", graph.slice(near, sight.first, sight.last, 2), sight.by_key)
            near = graph.add("Add", graph.slice(near, 0, sight.num_keys, 3), sight.mask)
            scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
            return graph.add("Softmax", graph.add("Add", scores, near), axis=-1)

    def _split_heads(self, x: str, heads: int, head_dim: int) -> str:
        """(N T, H D) -> (N, H, T, D)."""
        x = self.graph.add("Reshape", x, self.sight.heads[heads, head_dim])
        return self.graph.add("Transpose", x, perm=[0, 2, 1, 3])

    def _extend(self, field: str, new: str) -> str:
        """Frames (N, ., T, C) appended to the cached ones; also sets the next cache."""
        field = f"{field}.{self.name}"
        seen = self.graph.add("Concat", self.past[field], new, axis=2)
        self.following[field] = self.graph.slice(seen, self.sight.length, END, 2)
        return seen

    def _feed_forward(self, name: str, module: ZipformerFeedForward, x: str) -> str:
        graph = self.graph
        with graph.scope(name):
            bias = module.hidden.bias - SWOOSH_L.shift
            y = graph.affine("hidden", module.hidden.weight.t(), bias, x)
            return graph.linear("out", module.out, swoosh(graph, y, SWOOSH_L))

    def _nonlinear(self, module: NonlinearAttention, x: str, weights: str) -> str:
        graph, hidden_dim = self.graph, module.out.in_features
        with graph.scope("nonlinear"):
            y = graph.linear("project", module.project, x)
            scale, hidden, gate = graph.split("Split", y, count=3, axis=1)
            hidden = graph.add("Mul", hidden, graph.add("Tanh", scale))
            hidden = self._extend("hidden", graph.add("Reshape", hidden, self.sight.image[hidden_dim]))
            y = graph.add("MatMul", graph.slice(weights, 0, 1, 1), hidden)
            y = graph.add("Reshape", y, graph.constant([-1, hidden_dim]))
            return graph.linear("out", module.out, graph.add("Mul", y, gate))

    def _attention(self, name: str, module: Attention, x: str, weights: str) -> str:
        graph, size = self.graph, module.out.in_features
        with graph.scope(name):
            y = graph.linear("project", module.project, x)
            values = self._split_heads(y, module.num_heads, size // module.num_heads)
            y = graph.add("MatMul", weights, self._extend(f"values_{name[-1]}", values))
            y = graph.add("Transpose", y, perm=[0, 2, 1, 3])
            return graph.linear("out", module.out, graph.add("Reshape", y, graph.constant([-1, size])))

    def _bypass(self, module: Bypass, before: str, x: str) -> str:
        graph = self.graph
        with graph.scope("bypass_middle"):
            change = graph.add("Mul", graph.add("Sub", x, before), graph.weight("scale", module.scale))
            return graph.add("Add", before, change)

    def _convolution(self, number: int, module: Convolution, x: str) -> str:
        graph, sight, dim = self.graph, self.sight, module.out.in_features
        with graph.scope(f"convolution_{number}"):
            y, gate = graph.split("Split", graph.linear("gated", module.gated, x), count=2, axis=1)
            y = graph.add("Mul", graph.add("Mul", y, graph.add("Sigmoid", gate)), sight.valid)
            seen = self._extend(f"convolution_{number}", graph.add("Reshape", y, sight.image[dim]))
            depthwise = cast(ChunkConvolution, module.depthwise)
            past = self._depthwise("depthwise.past", depthwise.past, seen, dim, SWOOSH_R.shift)
            rows = graph.add("Reshape", y, sight.rows[dim])
            within = self._depthwise("depthwise.within", depthwise.within, rows, dim)
            y = graph.add("Add", past, graph.add("Mul", within, sight.scales[self.name][number - 1]))
            return graph.linear("out", module.out, swoosh(graph, y, SWOOSH_R))

    def _depthwise(self, name: str, module: nn.Conv2d, x: str, dim: int, less: float = 0.0) -> str:
        """x (..., 1, T, C) -> the output minus `less` (N T, C)."""
        graph = self.graph
        y = graph.add("Transpose", x, perm=[0, 3, 1, 2])
        y = graph.convolution(name, module, y, less)
        y = graph.add("Transpose", y, perm=[0, 2, 3, 1])
        return graph.add("Reshape", y, graph.constant([-1, dim]))
