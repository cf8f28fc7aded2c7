"""What the layers of a Zipformer attend to, in a graph: computed for the front, and subsampled for each rate.

Every rate divides the chunk and the cached frames, so that every `rate`-th row and column of a mask, or of
counts, is that of the rate.

N streams · T' frames, of the front or of a rate · C channels · H heads · D channels per head · D' of queries
for positions · W cached frames · K kernel
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from asr.model.masks import ENDLESS
from asr.model.zipformer import Zipformer, layer_sizes
from asr.model.zipformer_convolution import ChunkConvolution
from asr.model.zipformer_layer import ZipformerLayer
from asr.model.zipformer_stack import Stack
from export.graph import END, Graph


@dataclass(frozen=True)
class Sight:
    """What all layers of one rate share; sizes are (1,)."""

    length: str
    """T'."""
    heads: dict[tuple[int, int], str]
    """Heads and channels of each -> shape (N, T', H, D)."""
    image: dict[int, str]
    """Channels -> shape (N, 1, T', C)."""
    rows: dict[int, str]
    """Channels -> shape (chunks of all streams, 1, frames of a chunk, C)."""
    valid: str
    """(N T', 1) float32: 0 after the end."""
    mask: str
    """(N, 1, T', W + T') float32: 0, or minus infinity."""
    first: str
    """T' - 1: where the scores by key begin in the flattened scores by distance, ..."""
    last: str
    """... and where they end."""
    by_key: str
    """Shape (N, H, T', W + 2 T' - 1) of what is between them; N and H are 0, which keeps them."""
    num_keys: str
    """W + T'."""
    tables: dict[str, str]
    """Name of the layer -> (H, D', W + 2 T'): the factors of position queries."""
    scales: dict[str, list[str]]
    """Name of the layer -> for both convolutions (N T', C): the scale of the part within the chunk."""


class SightWriter:
    """Writes the sights of one call."""

    def __init__(
        self, graph: Graph, encoder: Zipformer, past: Mapping[str, str], context: Sequence[str]
    ) -> None:
        """past: the state, by field name.  context: values of chunk and left; int64 scalars."""
        self.graph, self.encoder, self.config = graph, encoder, encoder.config
        self.offset, (self.chunk, self.left) = past["offset"], context
        width = graph.size(past["keys.0.0"], 2)
        self.width = graph.add("Mul", width, graph.constant(self.config.rates[0]))
        """W of the front."""
        self.n = graph.size(self.offset, 0)

    def write(self, lens: str, length: str) -> dict[int, Sight]:
        """lens (N,) of length (1,) frames of the front -> rate -> the sight of its layers."""
        graph, zero, one = self.graph, self.graph.constant([0]), self.graph.constant([1])
        self._measure(length)
        self.step = graph.range(zero, self.length)
        self.ends = graph.add("Unsqueeze", lens, one)
        self.valid = graph.add("Less", self.step, self.ends)
        valid = graph.add("Cast", self.valid, to=onnx.TensorProto.FLOAT)
        shared = valid, self._mask(), self._angles(), *self._edges()
        return {rate: self._sight(rate, *shared) for rate in sorted(set(self.config.rates))}

    def nearest(self, lens: str) -> str:
        """(N T',): row of each frame, or of the last frame that counts for those after it."""
        graph, zero, one = self.graph, self.graph.constant([0]), self.graph.constant([1])
        last = graph.add("Max", graph.add("Sub", lens, one), zero)
        frames = graph.add("Min", self.step, graph.add("Unsqueeze", last, one))
        starts = graph.add("Mul", graph.range(zero, self.n), self.length)
        rows = graph.add("Add", frames, graph.add("Unsqueeze", starts, one))
        return graph.add("Reshape", rows, graph.constant([-1]))

    def shape(self, *sizes: str | int) -> str:
        graph = self.graph
        return graph.add("Concat", *(x if isinstance(x, str) else graph.constant([x]) for x in sizes), axis=0)

    def parts(self, x: str, size: str) -> str:
        """x / size, rounded up."""
        graph = self.graph
        return graph.add("Div", graph.add("Sub", graph.add("Add", x, size), graph.constant(1)), size)

    def _measure(self, length: str) -> None:
        """Sizes of the front, (1,)."""
        graph, step = self.graph, self.graph.constant(self.encoder.step)
        self.is_whole = graph.add("LessOrEqual", self.chunk, graph.constant(0))
        chunk = graph.add("Where", self.is_whole, graph.constant(ENDLESS), self.chunk)
        self.size = graph.add("Mul", chunk, graph.constant(2))
        """Frames of a chunk."""
        most = graph.add("Mul", self.parts(length, step), step)
        self.row = graph.add("Min", self.size, most)
        """Frames of a chunk, at most as many as there are."""
        self.length = graph.add("Mul", self.parts(length, self.row), self.row)
        """T': whole chunks."""

    def _mask(self) -> str:
        """(N, 1, T', W + T') by the rule of `asr.model.masks.context_mask`."""
        graph, zero = self.graph, self.graph.constant(0)
        rows, columns = graph.constant([1, 3]), graph.constant([1, 2])
        offset = graph.add("Mul", self.offset, graph.constant(2))
        offset = graph.add("Unsqueeze", offset, graph.constant([1]))
        step = graph.range(graph.add("Neg", self.width), self.length)
        keys, queries = graph.add("Add", offset, step), graph.add("Add", offset, self.step)
        known = graph.add("And", graph.add("Less", step, self.ends), graph.add("GreaterOrEqual", keys, zero))
        queries, keys = graph.add("Unsqueeze", queries, rows), graph.add("Unsqueeze", keys, columns)
        distance = graph.add("Sub", graph.add("Div", queries, self.size), graph.add("Div", keys, self.size))
        is_all = graph.add("Less", self.left, zero)
        left = graph.add("Where", is_all, graph.constant(ENDLESS), self.left)
        near = graph.add("LessOrEqual", distance, left)
        near = graph.add("And", near, graph.add("GreaterOrEqual", distance, zero))
        near = graph.add("And", near, graph.add("Unsqueeze", known, columns))
        near = graph.add("Or", near, graph.add("Equal", queries, keys))
        return graph.add("Where", near, graph.constant(0, "float32"), graph.constant(-np.inf, "float32"))

    def _angles(self) -> str:
        """(channels, W + 2 T') of `asr.model.zipformer_layer.compact_positions`, all cosines first."""
        graph, dim, one = self.graph, self.config.position_dim, self.graph.constant([1])
        unit = math.sqrt(dim)
        first = graph.add("Sub", one, graph.add("Add", self.width, self.length))
        distance = graph.range(first, graph.add("Add", self.length, one))
        distance = graph.add("Cast", distance, to=onnx.TensorProto.FLOAT)
        far = graph.add("Add", graph.add("Abs", distance), graph.constant(unit, "float32"))
        far = graph.add("Sub", graph.add("Log", far), graph.constant(math.log(unit), "float32"))
        squeezed = graph.add("Mul", graph.add("Sign", distance), far)
        scale = graph.constant(2 * math.pi * unit / dim, "float32")
        angle = graph.add("Atan", graph.add("Mul", squeezed, scale))
        multiples = np.arange(1, dim // 2 + 1)[:, None]
        cosines = graph.add("Cos", graph.add("Mul", graph.constant(multiples, "float32"), angle))
        sines = graph.add("Sin", graph.add("Mul", graph.constant(multiples[:-1], "float32"), angle))
        last = graph.add("Cos", graph.add("Mul", graph.constant([[0]], "float32"), angle))
        return graph.add("Concat", cosines, sines, last, axis=0)

    def _edges(self) -> tuple[str, str]:
        """Frames of its chunk before each frame (T',), and after it (N, T'):
        `asr.model.zipformer_convolution.Edges`."""
        graph, zero, one = self.graph, self.graph.constant(0), self.graph.constant([1])
        before = graph.add("Mod", self.step, self.size)
        is_first = graph.add("Unsqueeze", graph.add("Equal", self.offset, zero), one)
        is_short = graph.add("And", is_first, graph.add("Less", self.ends, self.size))
        is_all = graph.add("Or", self.is_whole, is_short)
        ends = graph.add("Sub", self.ends, self.step), graph.add("Sub", self.size, before)
        behind = graph.add("Sub", graph.add("Where", is_all, *ends), one)
        return before, graph.add("Max", behind, zero)

    def _sight(self, rate: int, valid: str, mask: str, angles: str, before: str, behind: str) -> Sight:
        graph = self.graph
        sizes = [
            x for x, other in zip(layer_sizes(self.config), self.config.rates, strict=True) if other == rate
        ]
        length, width = self._at(rate, self.length), self._at(rate, self.width)
        num_keys = graph.add("Add", width, length)
        distances = graph.add("Add", num_keys, length)
        first, fewer = (graph.add("Sub", x, graph.constant([1])) for x in (length, distances))
        if rate > 1:
            valid, mask = self._every(rate, valid, 1), self._every(rate, mask, 2, 3)
            before, behind = (
                self._at(rate, self._every(rate, x, axis)) for x, axis in ((before, 0), (behind, 1))
            )
            start = graph.add("Sub", graph.add("Add", self.width, self.length), num_keys)
            angles = graph.slice(angles, start, graph.add("Add", start, distances), 1)
        heads = [(x.num_heads, 2 * x.query_dim + x.position_head_dim) for x in sizes]
        heads += [(x.num_heads, x.value_dim) for x in sizes]
        channels = {dim for x in sizes for dim in (x.dim, 3 * x.dim // 4)}
        return Sight(
            length=length,
            heads={x: self.shape(self.n, length, *x) for x in dict.fromkeys(heads)},
            image={dim: self.shape(self.n, 1, length, dim) for dim in sorted(channels)},
            rows={dim: self.shape(-1, 1, self._at(rate, self.row), dim) for dim in sorted(channels)},
            valid=graph.add("Reshape", valid, graph.constant([-1, 1])),
            mask=mask,
            first=first,
            last=graph.add("Add", first, graph.add("Mul", length, fewer)),
            by_key=self.shape(0, 0, length, fewer),
            num_keys=num_keys,
            tables=self._tables(rate, angles),
            scales=self._scales(rate, before, behind),
        )

    def _at(self, rate: int, x: str) -> str:
        """Frames of the front -> of a rate."""
        return x if rate == 1 else self.graph.add("Div", x, self.graph.constant(rate))

    def _every(self, rate: int, x: str, *axes: int) -> str:
        """Every `rate`-th element along some axes."""
        graph, count = self.graph, len(axes)
        bounds = [graph.constant(count * [value]) for value in (0, END)]
        return graph.add("Slice", x, *bounds, graph.constant(axes), graph.constant(count * [rate]))

    def _layers(self, rate: int) -> Iterator[tuple[str, ZipformerLayer]]:
        for i, stack in enumerate(self.encoder.stacks):
            if self.config.rates[i] == rate:
                for j, layer in enumerate(cast(Stack, stack).layers):
                    yield f"{i}.{j}", cast(ZipformerLayer, layer)

    def _tables(self, rate: int, angles: str) -> dict[str, str]:
        graph, dim = self.graph, self.config.position_dim
        order = [*range(0, dim, 2), *range(1, dim, 2)]
        tables = {}
        for name, layer in self._layers(rate):
            module = layer.weights
            weight = module.position.weight[:, order].unflatten(0, (module.num_heads, -1))
            tables[name] = graph.add("MatMul", graph.weight(f"positions.{name}", weight), angles)
        return tables

    def _scales(self, rate: int, before: str, behind: str) -> dict[str, list[str]]:
        """`ChunkConvolution._scale` of all convolutions at once."""
        graph = self.graph
        pairs = [pair for _, layer in self._layers(rate) for pair in _tables_of(layer)]
        rows, sizes = max(len(left) for left, _ in pairs), [left.shape[1] for left, _ in pairs]
        found = []
        for name, index, side in (("left", before, 0), ("right", behind, 1)):
            table = torch.cat([F.pad(pair[side], (0, 0, 0, rows - len(pair[side]))) for pair in pairs], dim=1)
            index = graph.add("Min", index, graph.constant(rows - 1))
            weight = graph.weight(f"{name}.{rate}", table + (1 if name == "left" else 0))
            found.append(graph.add("Gather", weight, index, axis=0))
        whole = graph.add("Reshape", graph.add("Add", *found), graph.constant([-1, sum(sizes)]))
        parts = iter(graph.split("Split", whole, graph.constant(sizes), axis=1, count=len(sizes)))
        return {name: [next(parts), next(parts)] for name, _ in self._layers(rate)}


def _tables_of(layer: ZipformerLayer) -> Iterator[tuple[Tensor, Tensor]]:
    """What edges add in both convolutions, by the number of frames before and after a frame (K + 1, C)."""
    for module in (layer.convolution_1, layer.convolution_2):
        left, right = cast(ChunkConvolution, module.depthwise).edges.transpose(1, 2)
        yield F.pad(left, (0, 0, 0, 1)), F.pad(right.flip(0), (0, 0, 0, 1))
