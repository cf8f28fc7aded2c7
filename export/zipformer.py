"""The graph of a causal Zipformer and its features, hand-written because a traced graph is slower.

What made the trace slow: softplus, which is slow in onnxruntime; a convolution within chunks of any length,
by gathered taps; a state that was split and concatenated; many small operations. The graph is tested against
the modules (tests/export/test_encoder.py).

N streams · T feature frames · T' frames, of the front or of a rate · F mel bins · C channels · H heads · D
channels per head · L layers · W cached frames · K kernel
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import cast

import onnx

from asr.model.hybrid import HybridModel
from asr.model.zipformer import Zipformer, layer_sizes
from asr.model.zipformer_front import CHANNELS, SIDE
from asr.model.zipformer_layer import ZipformerLayer
from asr.model.zipformer_stack import Bypass, Downsample, Stack
from asr.runtime.info import Field
from export.encoder import write_encoder
from export.graph import Graph
from export.states import share_of
from export.zipformer_front import write_front
from export.zipformer_layer import LayerWriter
from export.zipformer_sight import Sight, SightWriter


def zipformer_fields(encoder: Zipformer) -> tuple[Field, ...]:
    """The state of one stream."""
    config = encoder.config
    fields = [Field("frames", (SIDE, encoder.front.num_bins, CHANNELS[-1]), "float32")]
    stacks = zip(layer_sizes(config), config.rates, config.depths, strict=True)
    for i, (sizes, rate, depth) in enumerate(stacks):
        width = share_of("W", Fraction(2, rate))
        shapes: dict[str, tuple[int | str, ...]] = {
            "keys": (sizes.num_heads, width, sizes.query_dim),
            "hidden": (1, width, 3 * sizes.dim // 4),
            "values_1": (sizes.num_heads, width, sizes.value_dim),
            "values_2": (sizes.num_heads, width, sizes.value_dim),
            "convolution_1": (1, sizes.past_frames, sizes.dim),
            "convolution_2": (1, sizes.past_frames, sizes.dim),
        }
        for j in range(depth):
            fields += [Field(f"{name}.{i}.{j}", shape, "float32") for name, shape in shapes.items()]
    return *fields, Field("offset", (), "int64")


def zipformer_graph(model: HybridModel) -> onnx.ModelProto:
    """The graph that `write_encoder` returns."""
    encoder = cast(Zipformer, model.encoder)
    return write_encoder(model, zipformer_fields(encoder), 2, partial(ZipformerWriter, encoder))


class ZipformerWriter:
    """Writes `asr.model.zipformer.Zipformer.forward`, once."""

    def __init__(
        self, encoder: Zipformer, graph: Graph, past: Mapping[str, str], context: Sequence[str]
    ) -> None:
        """past: the state, by field name.  context: values of chunk and left; int64 scalars."""
        self.graph, self.encoder, self.config, self.past = graph, encoder, encoder.config, past
        self.sights = SightWriter(graph, encoder, past, context)
        self.following: dict[str, str] = {}
        """Field -> its value after the call."""

    def encode(self, x: str, num_frames: str) -> tuple[str, str]:
        """x (N, T, F), frames that count (N,) -> y (N, T', C), y_lens (N,)."""
        graph, dims = self.graph, self.config.dims
        counts = graph.add("Unsqueeze", graph.before(num_frames, graph.size(x, 1)), graph.constant([2]))
        x = graph.add("Where", counts, x, graph.constant(0, "float32"))
        x, self.lens, length, self.following["frames"] = write_front(
            graph, self.encoder.front, x, num_frames, self.past["frames"]
        )
        with graph.scope("encoder.context"):
            sights = self.sights.write(self.lens, length)
            self.nearest = self.sights.nearest(self.lens)
        x = self._padded(x, length, dims[0])
        outputs = []
        for i, stack in enumerate(self.encoder.stacks):
            with graph.scope(f"encoder.stacks.{i}"):
                x = self._with_channels(x, dims[max(i - 1, 0)], dims[i])
                x = self._stack(i, cast(Stack, stack), x, sights[self.config.rates[i]])
            outputs.append(x)
        return self._end(self._latest_channels(outputs), length)

    def _padded(self, x: str, length: str, dim: int) -> str:
        """Frames (N length, C) -> (N T', C)."""
        graph = self.graph
        x = graph.add("Reshape", x, self.sights.shape(self.sights.n, length, dim))
        missing = graph.add("Sub", self.sights.length, length)
        x = graph.add("Pad", x, self.sights.shape(0, missing), "", graph.constant([1]))
        return graph.add("Reshape", x, graph.constant([-1, dim]))

    def _with_channels(self, x: str, dim: int, new: int) -> str:
        """(N T', C) -> the number of channels of the next stack."""
        graph = self.graph
        if new <= dim:
            return x if new == dim else graph.slice(x, 0, new, 1)
        return graph.add("Pad", x, graph.constant([0, new - dim]), "", graph.constant([1]))

    def _stack(self, i: int, stack: Stack, x: str, sight: Sight) -> str:
        """x (N T', C) at the rate of the front."""
        graph, dim = self.graph, self.config.dims[i]
        y = self._downsample(stack.downsample, x, dim) if stack.downsample else x
        for j, layer in enumerate(stack.layers):
            with graph.scope(f"layers.{j}"):
                writer = LayerWriter(graph, f"{i}.{j}", cast(ZipformerLayer, layer), self.past, sight)
                y = writer.write(y)
                self.following |= writer.following
        return self._repeat(stack.bypass, stack.rate, x, y, dim) if stack.bypass else y

    def _downsample(self, module: Downsample, x: str, dim: int) -> str:
        graph, rate = self.graph, len(module.scores)
        with graph.scope("downsample"):
            x = graph.add("Gather", x, self.nearest, axis=0)
            x = graph.add("Reshape", x, graph.constant([-1, rate, dim]))
            x = graph.add("Mul", x, graph.weight("weights", module.scores.softmax(0)[:, None]))
            return graph.add("ReduceSum", x, graph.constant([1]), keepdims=0)

    def _repeat(self, module: Bypass, rate: int, before: str, x: str, dim: int) -> str:
        """before (N T', C), x (N T' / rate, C) -> (N T', C)."""
        graph = self.graph
        with graph.scope("bypass"):
            before = graph.add("Mul", before, graph.weight("kept", 1 - module.scale))
            x = graph.add(
                "Unsqueeze", graph.add("Mul", x, graph.weight("scale", module.scale)), graph.constant([1])
            )
            rows = graph.add("Reshape", before, graph.constant([-1, rate, dim]))
            return graph.add("Reshape", graph.add("Add", rows, x), graph.constant([-1, dim]))

    def _latest_channels(self, outputs: Sequence[str]) -> str:
        """(N T', C): every channel from the last stack that has it."""
        pieces, dim = [], 0
        for y, size in reversed(list(zip(outputs, self.config.dims, strict=True))):
            if size > dim:
                pieces.append(self.graph.slice(y, dim, size, 1) if dim else y)
                dim = size
        return pieces[0] if len(pieces) == 1 else self.graph.add("Concat", *pieces, axis=1)

    def _end(self, x: str, length: str) -> tuple[str, str]:
        """x (N T', C) of all stacks -> y (N, ., C) at half the rate, 0 after the end, and y_lens (N,)."""
        graph, two = self.graph, self.graph.constant([2])
        with graph.scope("encoder"):
            y = self._downsample(self.encoder.downsample, x, self.encoder.dim)
            y = graph.add("Reshape", y, self.sights.shape(self.sights.n, -1, self.encoder.dim))
            size, y_lens = self.sights.parts(length, two), self.sights.parts(self.lens, two)
            y = graph.slice(y, 0, size, 1)
            counts = graph.add("Unsqueeze", graph.before(y_lens, size), two)
            self.following["offset"] = graph.add("Add", self.past["offset"], y_lens)
            return graph.add("Where", counts, y, graph.constant(0, "float32")), y_lens
