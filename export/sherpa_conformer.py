"""The CTC contracts of sherpa-onnx for a Conformer, hand-written like `export/conformer.py`. On export they
are checked against the modules of `export/sherpa_graphs.py`.

N utterances · T feature frames · T' encoder frames · F mel bins · C channels · L layers · H heads
D channels per head · W cached frames · K kernel · V units
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx

from asr.features import FLOOR
from asr.model.conformer import Conformer
from asr.model.hybrid import HybridModel
from export.conformer import ConformerWriter, conformer_fields
from export.encoder import write_ctc
from export.features import write_cmvn
from export.graph import END, Graph
from export.sherpa_graphs import LOUD, OfflineCtc, OnlineCtc, scale_change


def offline_graph(module: OfflineCtc) -> onnx.ModelProto:
    """x (N, T, F), x_lens (N,) -> log-probabilities (N, T / 4, V) and their lengths."""
    graph, model = Graph("model"), module.model
    x = graph.input("x", ("N", "T", model.fbank.config.num_bins))
    x_lens = graph.input("x_lens", ("N",), "int64")
    encoder = cast(Conformer, model.encoder)
    past = _nothing(graph, encoder, graph.size(x, 0))
    writer = ConformerWriter(encoder, graph, past, [graph.constant(0), graph.constant(-1)])
    y, y_lens = writer.encode(_features(graph, model, x, theirs=1.0), x_lens)
    log_probs, y_lens = _log_probs(graph, model, y, module.repeats), _times(graph, y_lens, module.repeats)
    graph.output("log_probs", log_probs, ("N", "T'", model.num_tokens))
    graph.output("log_probs_len", y_lens, ("N",), "int64")
    return graph.model()


def online_graph(module: OnlineCtc) -> onnx.ModelProto:
    """A chunk of frames and two caches -> log-probabilities and the caches, as in `OnlineCtc`."""
    graph, model, encoder = Graph("model"), module.model, module.encoder
    config, repeats = encoder.config, module.repeats
    x = graph.input("x", (1, "T", encoder.num_bins))
    offset = graph.input("offset", (1,), "int64")
    required = graph.input("required_cache_size", (1,), "int64")
    attn_shape = (config.num_layers, config.num_heads, "W", 2 * encoder.head_dim)
    attn_cache = graph.input("attn_cache", attn_shape)
    conv_shape = (config.num_layers, 1, config.dim, module.columns + module.spare)
    conv_cache = graph.input("conv_cache", conv_shape)
    graph.input("attn_mask", (1, 1, "K"), "bool")  # unused: the other inputs imply it

    num_frames = graph.size(x, 1)
    chunk = graph.add("Div", num_frames, graph.constant(encoder.subsampling))
    left = graph.add("Div", required, _times(graph, chunk, repeats))
    cached, unused = _newest(graph, attn_cache, repeats)
    past = _past(graph, module, cached, conv_cache)
    before = graph.add("Sub", offset, required)
    past["offset"] = graph.add("Div", before, graph.constant(repeats))
    writer = ConformerWriter(encoder, graph, past, [chunk, left])
    y, _ = writer.encode(_features(graph, model, x, theirs=LOUD), num_frames)
    graph.output("log_probs", _log_probs(graph, model, y, repeats), (1, "T'", model.num_tokens))
    attn, conv = _caches(graph, module, writer.following)
    if repeats > 1:
        attn = graph.add("Concat", unused, attn, axis=2)
    graph.output("next_att_cache", attn, attn_shape)
    graph.output("next_conv_cache", conv, conv_shape)
    return graph.model()


def _features(graph: Graph, model: HybridModel, x: str, theirs: float) -> str:
    """Log-mel energies of samples times `theirs` -> the encoder's input."""
    if change := scale_change(theirs, model.fbank.config.scale):
        x = graph.add("Add", x, graph.constant(change, "float32"))
        x = graph.add("Max", x, graph.constant(math.log(FLOOR), "float32"))
    return write_cmvn(graph, model, x)


def _log_probs(graph: Graph, model: HybridModel, y: str, repeats: int) -> str:
    """y (N, T', C) -> (N, T' * repeats, V), each frame repeated."""
    assert model.ctc is not None
    x = write_ctc(graph, model.ctc, y)
    if repeats == 1:
        return x
    x = graph.add("Unsqueeze", x, graph.constant([2]))
    x = graph.add("Tile", x, graph.constant([1, 1, repeats, 1]))
    return graph.add("Reshape", x, graph.constant([0, -1, model.num_tokens]))


def _times(graph: Graph, x: str, factor: int) -> str:
    return x if factor == 1 else graph.add("Mul", x, graph.constant(factor))


def _nothing(graph: Graph, encoder: Conformer, n: str) -> dict[str, str]:
    """The state at the start of N utterances."""
    past = {}
    for field in conformer_fields(encoder):
        shape = graph.constant(np.array(field.sizes({"W": 0, "R": 0}), np.int64))
        zero = graph.constant(0, field.dtype)
        past[field.name] = graph.add("Expand", zero, graph.add("Concat", n, shape, axis=0))
    return past


def _newest(graph: Graph, cache: str, repeats: int) -> tuple[str, str]:
    """The used end of a cache (L, H, W, 2 D), W / repeats frames, and the part before it."""
    if repeats == 1:
        return cache, ""
    width = graph.size(cache, 2)
    start = graph.add("Sub", width, graph.add("Div", width, graph.constant(repeats)))
    return graph.slice(cache, start, END, 2), graph.slice(cache, 0, start, 2)


def _past(graph: Graph, module: OnlineCtc, attn: str, conv: str) -> dict[str, str]:
    num_layers = module.encoder.config.num_layers
    kept = graph.add("Transpose", graph.slice(conv, 0, module.columns, 3), perm=[0, 1, 3, 2])
    spare = graph.add("Reshape", graph.slice(conv, module.columns, END, 3), graph.constant([-1]))
    frames = graph.slice(spare, 0, module.num_frames, 0)
    past = {"frames": graph.add("Reshape", frames, graph.constant(module.frames_shape))}
    for name, whole in (("both", attn), ("conv", kept)):
        layers = graph.split("Split", whole, axis=0, count=num_layers)
        past |= {f"{name}.{i}": x for i, x in enumerate(layers)}
    for i in range(num_layers):
        parts = graph.split("Split", past.pop(f"both.{i}"), axis=3, count=2)
        past |= {f"{name}.{i}": x for name, x in zip(("keys", "values"), parts, strict=True)}
    return past


def _caches(graph: Graph, module: OnlineCtc, following: Mapping[str, str]) -> tuple[str, str]:
    config = module.encoder.config
    layers = range(config.num_layers)
    both = [graph.add("Concat", following[f"keys.{i}"], following[f"values.{i}"], axis=3) for i in layers]
    conv = graph.add("Concat", *(following[f"conv.{i}"] for i in layers), axis=0)
    conv = graph.add("Transpose", conv, perm=[0, 1, 3, 2])
    spare = graph.add("Reshape", following["frames"], graph.constant([-1]))
    room = config.num_layers * config.dim * module.spare - module.num_frames
    spare = graph.add("Pad", spare, graph.constant([0, room]))
    spare = graph.add("Reshape", spare, graph.constant([config.num_layers, 1, config.dim, module.spare]))
    return graph.add("Concat", *both, axis=0), graph.add("Concat", conv, spare, axis=3)
