"""The hand-written graph of a streaming encoder, from samples to log-probabilities."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import onnx
from torch import nn

from asr.context import Context
from asr.model.hybrid import HybridModel
from asr.runtime.info import Field
from export.features import write_features
from export.graph import Graph


class EncoderWriter(Protocol):
    """Writes the `forward` of an encoder, once."""

    following: dict[str, str]
    """Field of the state -> its value after the call."""

    def encode(self, x: str, num_frames: str) -> tuple[str, str]:
        """x (N, T, F), frames that count (N,) -> y (N, T', C), y_lens (N,)."""
        ...


Begin = Callable[[Graph, Mapping[str, str], Sequence[str]], EncoderWriter]
"""(graph, state by field name, context values as scalars) -> a writer."""


def write_encoder(
    model: HybridModel, fields: Sequence[Field], num_context: int, begin: Begin
) -> onnx.ModelProto:
    """(window of samples, its frames, context, state) -> (y, CTC log-probabilities, their frames, state).

    num_context: how many of the first fields of `Context` the encoder uses.
    """
    graph, fbank = Graph("encoder"), model.fbank
    size = f"{fbank.shift_samples}*T + {fbank.frame_samples - fbank.shift_samples}"
    window = graph.input("window", ("N", size))
    num_frames = graph.input("num_frames", ("N",), "int64")
    context = [graph.input(name, (), "int64") for name in Context._fields[:num_context]]
    past = {field.name: graph.input(field.name, ("N", *field.shape), field.dtype) for field in fields}
    writer = begin(graph, past, context)
    y, y_lens = writer.encode(write_features(graph, model, window), num_frames)
    graph.output("y", y, ("N", "T'", model.encoder.dim))
    if model.ctc is not None:
        graph.output("log_probs", write_ctc(graph, model.ctc, y), ("N", "T'", model.num_tokens))
    graph.output("y_lens", y_lens, ("N",), "int64")
    for field in fields:
        graph.output(f"next_{field.name}", writer.following[field.name], ("N", *field.shape), field.dtype)
    return graph.model()


def write_ctc(graph: Graph, ctc: nn.Linear, y: str) -> str:
    """y (..., C) -> log-probabilities (..., V)."""
    return graph.add("LogSoftmax", graph.linear("ctc", ctc, y), axis=-1)
