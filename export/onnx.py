"""A model as ONNX graphs, traced from the very modules that were trained.

    encoder   features, normalisation, encoder, CTC head; the state goes in as it came out of the call before
    memory    keys and values of the decoder's cross-attention
    decoder   a whole token sequence at once, or one token with the state of those before it
    reverse   a whole token sequence from right to left, for models with a second decoder
    length    where segments end, and how long they were in training, for models with a segmental decoder
    fire      weights of frames that add up to the number of words, for models with a head that counts them

Batch, samples, cached frames, tokens: all dynamic. Opset 18 and IR version 10, which onnxruntime 1.20 reads.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from asr.context import Context
from asr.errors import ConfigError
from asr.model.conformer import ConformerState
from asr.model.decoder import DecoderState, TransformerDecoder
from asr.model.fire import Fire
from asr.model.hybrid import HybridModel
from asr.model.segmental import LengthModel, SegmentalDecoder

OPSET = 18
IR_VERSION = 10


class EncoderGraph(nn.Module):
    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, window: Tensor, num_frames: Tensor, chunk: Tensor, left: Tensor, right: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        x = self.model.cmvn(self.model.fbank.frames(window))
        y, y_lens, present = self.model.encoder(x, num_frames, ConformerState(*state), chunk, left, right)
        return y, self.model.ctc_log_probs(y), y_lens, *present.tensors()


class MemoryGraph(nn.Module):
    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.memory(y)


class DecoderGraph(nn.Module):
    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, tokens: Tensor, cross_keys: Tensor, cross_values: Tensor, y_lens: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        guide, past = self.decoder.guide, DecoderState(*state)
        logits, attention, present = self.decoder(tokens, cross_keys, cross_values, y_lens, past, guide=guide)
        return self.decoder.log_probs(logits), attention, *present.tensors()


class ReverseGraph(nn.Module):
    """Hypotheses of one utterance, whose memory is computed once for all."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, y: Tensor) -> Tensor:
        keys, values = (x.expand(tokens.shape[0], -1, -1, -1, -1) for x in self.decoder.memory(y))
        y_lens = torch.full_like(tokens[:, 0], y.shape[1])
        return self.decoder(tokens, keys, values, y_lens).logits.log_softmax(-1)


class LengthGraph(nn.Module):
    def __init__(self, length: LengthModel) -> None:
        super().__init__()
        self.length = length

    def forward(self, y: Tensor, labels: Tensor, durations: Tensor) -> tuple[Tensor, Tensor]:
        return self.length(y, labels, durations), self.length.log_lengths()


@dataclass(frozen=True)
class Trace:
    """A module, and how to call it: example inputs by name, the state last."""

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, Any]]
    """Input -> {dimension: its name}."""

    outputs: list[str]
    num_states: int


def export_graphs(model: HybridModel) -> dict[str, onnx.ModelProto]:
    """The graphs of a model in float32, by name.

    Raises ConfigError for an encoder whose calls overlap, since no runtime gives frames again.
    """
    if model.encoder.overlap_frames:
        raise ConfigError(f"encoder.type: {model.encoder.config.type} cannot be exported, its calls overlap")
    model = model.eval().cpu()
    traces = {
        "encoder": encoder_trace(model),
        "memory": memory_trace(model),
        "decoder": decoder_trace(model),
    }
    if model.reverse_decoder is not None:
        traces["reverse"] = reverse_trace(model, model.reverse_decoder)
    if isinstance(model.decoder, SegmentalDecoder):
        traces["length"] = length_trace(model, model.decoder.length)
    if model.fire is not None:
        traces["fire"] = fire_trace(model.fire)
    return {name: export(trace, name) for name, trace in traces.items()}


def encoder_trace(model: HybridModel) -> Trace:
    shift, length = model.fbank.shift_samples, model.fbank.frame_samples
    n, t, w, r = Dim("N"), Dim("T", min=1), Dim("W"), Dim("R")
    context = Context(4, 2, 1)
    state = model.encoder.init_state(2, context.width, context.delay)
    names = state_names(state)
    num_frames = 6 * model.encoder.subsampling
    inputs = {
        "window": torch.randn(2, (num_frames - 1) * shift + length),
        "num_frames": torch.tensor([num_frames, num_frames - 1]),
        **{name: torch.tensor(value) for name, value in context._asdict().items()},
        **dict(zip(names, state.tensors(), strict=True)),
    }
    dynamic: dict[str, dict[int, Any]] = {name: {0: n} for name in names}
    dynamic |= {"window": {0: n, 1: shift * t + (length - shift)}, "num_frames": {0: n}}
    dynamic |= {name: {} for name in Context._fields}
    dynamic |= {
        "keys": {0: n, 3: w},
        "values": {0: n, 3: w},
        "pending": {0: n, 2: r},
        "queries": {0: n, 3: r},
    }
    outputs = ["y", "log_probs", "y_lens", *(f"next_{name}" for name in names)]
    return Trace(EncoderGraph(model).eval(), inputs, dynamic, outputs, len(names))


def memory_trace(model: HybridModel) -> Trace:
    dynamic = {"y": {0: Dim("N"), 1: Dim("T")}}
    inputs = {"y": torch.randn(2, 7, model.encoder.dim)}
    return Trace(MemoryGraph(model).eval(), inputs, dynamic, ["cross_keys", "cross_values"], 0)


def decoder_trace(model: HybridModel) -> Trace:
    b, t, u, past = Dim("B"), Dim("T"), Dim("U"), Dim("P")
    tokens = torch.ones(2, 3, dtype=torch.int64)
    with torch.no_grad():
        keys, values = model.decoder.memory(torch.randn(2, 7, model.encoder.dim))
        state = model.decoder(tokens, keys, values, torch.tensor([7, 5])).state
    names = state_names(state)
    inputs = {"tokens": tokens, "cross_keys": keys, "cross_values": values, "y_lens": torch.tensor([7, 5])}
    inputs |= dict(zip(names, state.tensors(), strict=True))
    dynamic: dict[str, dict[int, Any]] = {"tokens": {0: b, 1: u}, "y_lens": {0: b}}
    dynamic |= {"cross_keys": {0: b, 3: t}, "cross_values": {0: b, 3: t}}
    dynamic |= {name: {0: b, 3: past} for name in names}
    outputs = ["log_probs", "attention", *(f"next_{name}" for name in names)]
    return Trace(DecoderGraph(model).eval(), inputs, dynamic, outputs, len(names))


def reverse_trace(model: HybridModel, decoder: TransformerDecoder) -> Trace:
    inputs = {"tokens": torch.ones(2, 3, dtype=torch.int64), "y": torch.randn(1, 7, model.encoder.dim)}
    dynamic: dict[str, dict[int, Any]] = {"tokens": {0: Dim("B"), 1: Dim("U")}, "y": {1: Dim("T")}}
    return Trace(ReverseGraph(decoder).eval(), inputs, dynamic, ["log_probs"], 0)


def length_trace(model: HybridModel, length: LengthModel) -> Trace:
    rows = Dim("R")
    inputs = {
        "y": torch.randn(3, model.encoder.dim),
        "labels": torch.tensor([1, 2, 2]),
        "durations": torch.tensor([1, 2, 3]),
    }
    return Trace(
        LengthGraph(length).eval(),
        inputs,
        {name: {0: rows} for name in inputs},
        ["log_odds", "log_lengths"],
        0,
    )


def fire_trace(fire: Fire) -> Trace:
    inputs = {"y": torch.randn(1, 7, fire.weight.shape[1])}
    return Trace(fire.eval(), inputs, {"y": {1: Dim("T")}}, ["alpha"], 0)


def state_names(state: ConformerState | DecoderState) -> list[str]:
    return list(state.__dataclass_fields__)


def export(trace: Trace, name: str) -> onnx.ModelProto:
    """Trace a module and tidy the graph; no weights outside the returned message."""
    shapes = [trace.dynamic[name] for name in trace.inputs]
    first = len(shapes) - trace.num_states
    positional = (*shapes[:first], tuple(shapes[first:])) if trace.num_states else tuple(shapes)
    with _quiet():
        program = torch.onnx.export(
            trace.module,
            tuple(trace.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=positional,
            input_names=list(trace.inputs),
            output_names=trace.outputs,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    return tidy(program.model_proto, name)


def tidy(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Name nodes after the modules they come from, and drop traces of the machine that exported them."""
    model.graph.name = name
    model.ir_version = IR_VERSION
    for i, node in enumerate(model.graph.node):
        node.name = f"{_scope(node)}{node.op_type}_{i}"
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:], model.graph.value_info[:], model.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def _scope(node: onnx.NodeProto) -> str:
    """The module of a node as "encoder.layers.0.attention.out/"; the weights of feature maps name theirs."""
    scopes: Sequence[str] = ()
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = [part.strip("[]' ") for part in entry.value.split(",")]
    module = scopes[-2] if len(scopes) > 1 else ""
    if not module:
        weights = [x for x in node.input if x.startswith(("model.fbank.", "model.cmvn."))]
        module = weights[0] if weights else ""
    module = "" if module.startswith("_empty_nn") else module.removeprefix("model.")
    return f"{module}/" if module else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own log and warnings say nothing that a user could act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
