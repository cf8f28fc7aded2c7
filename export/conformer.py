"""The graph of a streaming Conformer and its features, hand-written because a traced graph is slower.

Compared with the trace: activations are (N T', C), so that a matrix and its bias are one operation; only the
mask depends on sizes, which are computed once; each layer has its own state tensors, so that nothing is split
or concatenated; factors are folded into the weights. A call takes four fifths of the time
(docs/experiments.md). The graph is tested against the modules (tests/export/test_encoder.py).

While streams go on, all frames of a call count: the state that they keep is a slice.

N streams · T feature frames · T' encoder frames · S samples · F mel bins · C channels · L layers · H heads
· D channels per head · W cached frames · R frames held back · P feature frames kept · K kernel
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import onnx
import torch
from torch import nn

from asr.model.attention import BASE
from asr.model.conformer import Conformer, ConformerLayer
from asr.model.hybrid import HybridModel
from asr.model.layers import ConvModule
from asr.model.masks import ENDLESS
from asr.runtime.info import Field
from export.encoder import write_encoder
from export.graph import END, Graph


def conformer_fields(encoder: Conformer) -> tuple[Field, ...]:
    """The state of one stream. Fields for look-ahead only exist if the model was trained with it."""
    config, head_dim = encoder.config, encoder.head_dim
    fields = [Field("frames", (encoder.front.past_frames, encoder.num_bins), "float32")]
    for i in range(config.num_layers):
        fields += [
            Field(f"{x}.{i}", (config.num_heads, "W", head_dim), "float32") for x in ("keys", "values")
        ]
        fields.append(Field(f"conv.{i}", (1, config.kernel_size - 1, config.dim), "float32"))
        if config.chunk.max_right:
            fields.append(Field(f"pending.{i}", ("R", config.dim), "float32"))
            fields.append(Field(f"queries.{i}", (config.num_heads, "R", head_dim), "float32"))
    return *fields, Field("offset", (), "int64")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, (1,) int64 each, and shapes made of them."""

    n: str
    length: str
    """T'."""
    width: str
    """W."""
    delay: str
    """R; 0 if the model cannot look ahead."""
    heads: str
    """(N, T', 3 H, D)."""
    image: str
    """(N, 1, T', C)."""
    frames: str
    """(N, T', C)."""


@dataclass(frozen=True)
class Sight:
    """What layers attend to, float32: `asr.model.conformer.Sight`."""

    masks: list[str]
    """For each layer (N, 1, T', W + T'): 0, or minus infinity."""
    exists: list[str]
    """For each layer (N T', 1): 0 before the utterance; empty if the model cannot look ahead."""
    cosine: str
    """(N, 1, T', D)."""
    sine: str
    """(N, 1, T', D), its first half negated."""


def conformer_graph(model: HybridModel) -> onnx.ModelProto:
    """The graph that `write_encoder` returns."""
    encoder = cast(Conformer, model.encoder)
    num_context = 3 if encoder.config.chunk.max_right else 2
    return write_encoder(model, conformer_fields(encoder), num_context, partial(ConformerWriter, encoder))


class ConformerWriter:
    """Writes `asr.model.conformer.Conformer.forward`, once."""

    def __init__(
        self, encoder: Conformer, graph: Graph, past: Mapping[str, str], context: Sequence[str]
    ) -> None:
        """past: the state, by field name.  context: values of chunk and left, and of right if there is
        look-ahead; int64 scalars."""
        self.graph, self.encoder, self.config = graph, encoder, encoder.config
        self.past, self.context = past, context
        self.can_look_ahead = len(context) == 3
        self.following: dict[str, str] = {}
        """Field -> its value after the call."""

    def encode(self, x: str, num_frames: str) -> tuple[str, str]:
        """x (N, T, F), frames that count (N,) -> y (N, T', C), y_lens (N,)."""
        x, lens, sizes = self._front(x, num_frames)
        sight = self._sight(lens, sizes)
        for i, layer in enumerate(self.encoder.layers):
            with self.graph.scope(f"encoder.layers.{i}"):
                x = self._layer(i, cast(ConformerLayer, layer), x, sizes, sight)
        self.following["offset"] = self.graph.add("Add", self.past["offset"], lens)
        return self._valid(x, lens, sizes)

    def _front(self, x: str, num_frames: str) -> tuple[str, str, Sizes]:
        """(N, T, F), frames that count (N,) -> (N T', C), encoder frames that count, and all sizes."""
        graph, front, rate = self.graph, self.encoder.front, self.encoder.subsampling
        with graph.scope("encoder.front"):
            counts = self._before(num_frames, graph.size(x, 1))
            x = graph.add("Where", counts, x, graph.constant(0, "float32"))
            x = graph.add("Concat", self.past["frames"], x, axis=1)
            self.following["frames"] = graph.slice(x, -front.past_frames, END, 1)
            x = graph.add("Pad", x, graph.constant([0, 0, 0, 0, rate - 1, 0]))
            x = graph.add("Unsqueeze", x, graph.constant([1]))
            for i, module in enumerate(front.convolutions):
                if isinstance(module, nn.Conv2d):
                    x = graph.convolution(f"convolutions.{i}", module, x)
                else:
                    x = graph.silu(x)
            x = graph.add("Transpose", x, perm=[0, 2, 3, 1])
            n, length = graph.size(x, 0), graph.size(x, 1)
            x = graph.add("Reshape", x, graph.constant([-1, front.out.in_features]))
            x = graph.linear("out", front.out, x)
            more = graph.add("Add", num_frames, graph.constant(rate - 1))
            lens = graph.add("Div", more, graph.constant(rate))
            return x, lens, self._sizes(n, length)

    def _sizes(self, n: str, length: str) -> Sizes:
        graph, config = self.graph, self.config

        def shape(*rest: int) -> str:
            return graph.add("Concat", n, length, graph.constant(rest), axis=0)

        return Sizes(
            n=n,
            length=length,
            width=graph.size(self.past["keys.0"], 2),
            delay=graph.size(self.past["pending.0"], 1) if self.can_look_ahead else graph.constant([0]),
            heads=shape(3 * config.num_heads, self.encoder.head_dim),
            image=graph.add("Concat", n, graph.constant([1]), length, graph.constant([config.dim]), axis=0),
            frames=shape(config.dim),
        )

    def _before(self, lens: str, length: str) -> str:
        """lens (N,), length (1,) -> (N, length, 1): whether a frame is before the end."""
        return self.graph.add("Unsqueeze", self.graph.before(lens, length), self.graph.constant([2]))

    def _sight(self, lens: str, sizes: Sizes) -> Sight:
        """Layers that look ahead see different frames each: M = L masks, else M = 1."""
        graph = self.graph
        with graph.scope("encoder.context"):
            offset = graph.add("Unsqueeze", self.past["offset"], graph.constant([1]))  # (N, 1)
            late, ends = graph.constant([0]), graph.add("Unsqueeze", lens, graph.constant([1]))
            if self.can_look_ahead:
                late = graph.add("Mul", graph.constant(range(self.config.num_layers)), sizes.delay)
                ends = graph.add("Min", graph.add("Add", ends, late), sizes.length)  # (N, M)
            zero = graph.constant([0])
            step = graph.range(zero, sizes.length)
            offsets = graph.add("Unsqueeze", graph.add("Sub", offset, late), graph.constant([2]))
            queries = graph.add("Sub", graph.add("Add", offsets, step), sizes.delay)  # (N, M, T')
            steps = graph.range(graph.add("Neg", sizes.width), sizes.length)
            keys = graph.add("Add", offsets, steps)  # (N, M, W + T')
            known = graph.add("Less", steps, graph.add("Unsqueeze", ends, graph.constant([2])))
            known = graph.add("And", known, graph.add("GreaterOrEqual", keys, graph.constant(0)))
            mask = self._near(queries, keys, known, sizes)
            masks = [mask]
            if self.can_look_ahead:
                masks = graph.split("Split", mask, axis=1, count=self.config.num_layers)
            exists = self._exist(queries) if self.can_look_ahead else []
            return Sight(masks, exists, *self._rotation(graph.add("Add", offset, step)))

    def _near(self, queries: str, keys: str, known: str, sizes: Sizes) -> str:
        """Frames (N, M, T'), (N, M, W + T') and whether keys are there -> (N, M, T', W + T'), by the rule of
        `asr.model.masks.context_mask`."""
        graph = self.graph
        chunk, left, *right = self.context
        is_whole = graph.add("LessOrEqual", chunk, graph.constant(0))
        chunk = graph.add("Where", is_whole, graph.constant(ENDLESS), chunk)
        # integer division rounds towards 0, so all frames are shifted by enough chunks to be at least 0
        late = graph.add("Mul", sizes.delay, graph.constant(self.config.num_layers))
        shift = graph.add("Mul", graph.add("Add", sizes.width, late), chunk)
        numbers = [graph.add("Div", graph.add("Add", x, shift), chunk) for x in (queries, keys)]
        rows, columns = graph.constant([3]), graph.constant([2])
        distance = graph.add(
            "Sub", graph.add("Unsqueeze", numbers[0], rows), graph.add("Unsqueeze", numbers[1], columns)
        )
        is_all = graph.add("Less", left, graph.constant(0))
        left = graph.add("Where", is_all, graph.constant(ENDLESS), left)
        last = graph.add("Neg", *right) if right else graph.constant(0)
        near = graph.add("LessOrEqual", distance, left)
        near = graph.add("And", near, graph.add("GreaterOrEqual", distance, last))
        near = graph.add("And", near, graph.add("Unsqueeze", known, columns))
        same = graph.add(
            "Equal", graph.add("Unsqueeze", queries, rows), graph.add("Unsqueeze", keys, columns)
        )
        values = graph.constant(0, "float32"), graph.constant(-np.inf, "float32")
        return graph.add("Where", graph.add("Or", near, same), *values)

    def _exist(self, queries: str) -> list[str]:
        """(N, M, T') -> for each layer (N T', 1), 0 for frames before the utterance."""
        graph = self.graph
        exist = graph.add("GreaterOrEqual", queries, graph.constant(0))
        exist = graph.add("Cast", exist, to=onnx.TensorProto.FLOAT)
        parts = graph.split("Split", exist, axis=1, count=self.config.num_layers)
        return [graph.add("Reshape", part, graph.constant([-1, 1])) for part in parts]

    def _rotation(self, positions: str) -> tuple[str, str]:
        """(N, T') -> (N, 1, T', D) each; the angle in double precision, modulo a full turn."""
        graph, head_dim = self.graph, self.encoder.head_dim
        pairs = torch.arange(head_dim // 2, dtype=torch.float64)
        rates = graph.constant((BASE ** (-pairs * 2 / head_dim)).numpy(), "float64")
        wide = graph.add("Cast", positions, to=onnx.TensorProto.DOUBLE)
        wide = graph.add("Unsqueeze", wide, graph.constant([1, 3]))
        angle = graph.add(
            "Mod", graph.add("Mul", wide, rates), graph.constant(2 * math.pi, "float64"), fmod=1
        )
        angle = graph.add("Cast", angle, to=onnx.TensorProto.FLOAT)
        cosine, sine = graph.add("Cos", angle), graph.add("Sin", angle)
        both = graph.add("Concat", graph.add("Neg", sine), sine, axis=3)
        return graph.add("Concat", cosine, cosine, axis=3), both

    def _layer(self, i: int, layer: ConformerLayer, x: str, sizes: Sizes, sight: Sight) -> str:
        graph = self.graph
        x = self._feed_forward("feed_forward_1", layer.feed_forward_1, x)
        y = graph.layer_norm("attention_norm", layer.attention_norm, x)
        queries, keys, values = self._extend(i, layer, y, sizes, sight)
        if self.can_look_ahead:
            x, queries = self._delay(i, x, queries, sizes)
        with graph.scope("attention"):
            scores = graph.add("MatMul", queries, graph.add("Transpose", keys, perm=[0, 1, 3, 2]))
            scores = graph.add("Add", scores, sight.masks[i if self.can_look_ahead else 0])
            y = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), values)
            y = graph.add("Transpose", y, perm=[0, 2, 1, 3])
            y = graph.add("Reshape", y, graph.constant([-1, self.config.dim]))
            y = graph.linear("out", layer.attention.out, y)
        x = graph.add("Add", x, y)
        with graph.scope("convolution"):
            x = graph.add("Add", x, self._convolve(i, layer.convolution, x, sizes, sight))
        x = self._feed_forward("feed_forward_2", layer.feed_forward_2, x)
        return graph.layer_norm("norm", layer.norm, x)

    def _feed_forward(self, name: str, module: nn.Sequential, x: str) -> str:
        """x plus half of the module's output for it."""
        graph = self.graph
        with graph.scope(name):
            y = graph.layer_norm("0", cast(nn.LayerNorm, module[0]), x)
            y = graph.silu(graph.linear("1", cast(nn.Linear, module[1]), y))
            return graph.add("Add", x, graph.linear("4", cast(nn.Linear, module[4]), y, scale=0.5))

    def _extend(
        self, i: int, layer: ConformerLayer, x: str, sizes: Sizes, sight: Sight
    ) -> tuple[str, str, str]:
        """x (N T', C) -> queries (N, H, T', D), keys and values (N, H, W + T', D), rotated and scaled."""
        graph, num_heads = self.graph, self.config.num_heads
        with graph.scope("attention"):
            scale = torch.ones(3 * self.config.dim)
            scale[: self.config.dim] = self.encoder.head_dim**-0.5
            y = graph.linear("project", layer.attention.project, x, scale)
            y = graph.add("Transpose", graph.add("Reshape", y, sizes.heads), perm=[0, 2, 1, 3])
            parts = graph.constant([2 * num_heads, num_heads])
            turned, values = graph.split("Split", y, parts, count=2, axis=1)
            a, b = graph.split("Split", turned, count=2, axis=3)
            across = graph.add("Mul", graph.add("Concat", b, a, axis=3), sight.sine)
            turned = graph.add("Add", graph.add("Mul", turned, sight.cosine), across)
            queries, keys = graph.split("Split", turned, count=2, axis=1)
            found = []
            for name, new in (("keys", keys), ("values", values)):
                found.append(graph.add("Concat", self.past[f"{name}.{i}"], new, axis=2))
                self.following[f"{name}.{i}"] = graph.slice(found[-1], sizes.length, END, 2)
            return queries, found[0], found[1]

    def _delay(self, i: int, x: str, queries: str, sizes: Sizes) -> tuple[str, str]:
        """x (N T', C), queries (N, H, T', D) -> the same, delayed by R frames."""
        graph = self.graph
        found = []
        for name, new, axis in (
            ("pending", graph.add("Reshape", x, sizes.frames), 1),
            ("queries", queries, 2),
        ):
            seen = graph.add("Concat", self.past[f"{name}.{i}"], new, axis=axis)
            self.following[f"{name}.{i}"] = graph.slice(seen, sizes.length, END, axis)
            found.append(graph.slice(seen, 0, sizes.length, axis))
        return graph.add("Reshape", found[0], graph.constant([-1, self.config.dim])), found[1]

    def _convolve(self, i: int, module: ConvModule, x: str, sizes: Sizes, sight: Sight) -> str:
        graph, dim = self.graph, self.config.dim
        y = graph.linear("gated", module.gated, graph.layer_norm("norm", module.norm, x))
        y, gate = graph.split("Split", y, count=2, axis=1)
        y = graph.add("Mul", y, graph.add("Sigmoid", gate))
        if self.can_look_ahead:
            y = graph.add("Mul", y, sight.exists[i])
        seen = graph.add("Concat", self.past[f"conv.{i}"], graph.add("Reshape", y, sizes.image), axis=2)
        self.following[f"conv.{i}"] = graph.slice(seen, sizes.length, END, 2)
        # between these two, onnxruntime uses a blocked channel layout
        y = graph.add("Transpose", seen, perm=[0, 3, 1, 2])
        y = graph.convolution("depthwise", module.depthwise, y)
        y = graph.add("Transpose", y, perm=[0, 2, 3, 1])
        y = graph.add("Reshape", y, graph.constant([-1, dim]))
        y = graph.layer_norm("depthwise_norm", cast(nn.LayerNorm, module.depthwise_norm), y)
        return graph.linear("out", module.out, graph.silu(y))

    def _valid(self, x: str, lens: str, sizes: Sizes) -> tuple[str, str]:
        """x (N T', C) of the last layer -> y (N, T', C), which begins with the utterance and is 0 after its
        end, and y_lens (N,)."""
        graph, y_lens = self.graph, lens
        if self.can_look_ahead:
            late = graph.add("Mul", sizes.delay, graph.constant([self.config.num_layers]))
            first = graph.add("Max", graph.add("Sub", late, self.past["offset"]), graph.constant([0]))
            first = graph.add("Min", first, sizes.length)
            end = graph.add("Min", graph.add("Add", lens, late), sizes.length)
            y_lens = graph.add("Max", graph.add("Sub", end, first), graph.constant([0]))
            x = self._shift(x, first, sizes)
        y = graph.add("Reshape", x, sizes.frames)
        return graph.add("Where", self._before(y_lens, sizes.length), y, graph.constant(0, "float32")), y_lens

    def _shift(self, x: str, first: str, sizes: Sizes) -> str:
        """Rows of x (N T', C), for each stream from frame `first` (N,) on; the last is repeated."""
        graph, one = self.graph, self.graph.constant([1])
        step = graph.range(graph.constant([0]), sizes.length)
        column = graph.add("Unsqueeze", first, one)
        index = graph.add("Min", graph.add("Add", column, step), graph.add("Sub", sizes.length, one))
        rows = graph.range(graph.constant([0]), sizes.n)
        starts = graph.add("Unsqueeze", graph.add("Mul", rows, sizes.length), one)
        index = graph.add("Reshape", graph.add("Add", index, starts), graph.constant([-1]))
        return graph.add("Gather", x, index, axis=0)
