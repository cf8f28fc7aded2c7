"""A model as ONNX graphs, traced from the very modules that were trained, except for Conformer encoders and
causal Zipformers, which are hand-written (`export/conformer.py`, `export/zipformer.py`).

    encoder   features, normalisation, encoder, CTC head; each call takes the state that the last one returned
    memory    keys and values of the decoder's cross-attention
    decoder   a tree of tokens at once, or one token with the state of those before it
    reverse   a tree of tokens from right to left, for models with a second decoder
    length    where segments end, and how long they were in training, for models with a segmental decoder
    fire      weights of frames that sum to the number of words, for models with a head that counts them

Batch, samples, cached frames, tokens: all dynamic. Opset 18 and IR version 10, which onnxruntime 1.20 reads.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from asr.context import Context
from asr.errors import AsrError
from asr.features import Fbank
from asr.model.conformer import Conformer
from asr.model.decoder import TransformerDecoder
from asr.model.encoder import look_ahead_layers
from asr.model.fire import Fire
from asr.model.hybrid import HybridModel
from asr.model.segmental import LengthModel, SegmentalDecoder
from asr.model.zipformer import Zipformer
from asr.runtime.info import Field
from export.conformer import conformer_fields, conformer_graph
from export.graph import IR_VERSION, OPSET
from export.states import dynamic_shapes, encoder_fields
from export.traced import (
    DecoderGraph,
    EncoderGraph,
    LengthGraph,
    MemoryGraph,
    ReverseGraph,
    SamplesGraph,
    WholeGraph,
)
from export.zipformer import zipformer_fields, zipformer_graph


@dataclass(frozen=True)
class Trace:
    """A module, and how to call it: example inputs by name."""

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, Any]]
    """Input -> {dimension: its name}."""

    outputs: list[str]
    num_rest: int
    """How many of the last inputs are passed as one sequence."""


def export_graphs(model: HybridModel) -> dict[str, onnx.ModelProto]:
    """The graphs of a model in float32, by name."""
    model = model.eval().cpu()
    traces = {
        "memory": memory_trace(model),
        "decoder": decoder_trace(model),
    }
    if model.reverse_decoder is not None:
        traces["reverse"] = reverse_trace(model, model.reverse_decoder)
    if isinstance(model.decoder, SegmentalDecoder):
        traces["length"] = length_trace(model, model.decoder.length)
    if model.fire is not None:
        traces["fire"] = fire_trace(model.fire)
    graphs = {name: export(trace, name) for name, trace in traces.items()}
    return {"encoder": encoder_graph(model), **graphs, "decoder": with_best(graphs["decoder"])}


def encoder_graph(model: HybridModel) -> onnx.ModelProto:
    """The hand-written graph if there is one, else the traced one."""
    if written := _written(model):
        return written.graph(model)
    streams = model.encoder.can_stream and model.fbank.framed
    return export(encoder_trace(model) if streams else whole_trace(model), "encoder")


def state_fields(model: HybridModel) -> tuple[Field, ...]:
    """The state of one stream in the encoder's graph."""
    if not model.fbank.framed:
        return ()
    written = _written(model)
    return written.fields(model.encoder) if written else encoder_fields(model.encoder)


class Written(NamedTuple):
    """How the hand-written graph of an encoder is made."""

    graph: Callable[[HybridModel], onnx.ModelProto]
    fields: Callable[[Any], tuple[Field, ...]]


def _written(model: HybridModel) -> Written | None:
    encoder = model.encoder
    if not isinstance(model.fbank, Fbank):
        return None
    if isinstance(encoder, Conformer):
        return Written(conformer_graph, conformer_fields)
    is_causal = isinstance(encoder, Zipformer) and encoder.can_stream
    return Written(zipformer_graph, zipformer_fields) if is_causal else None


def encoder_trace(model: HybridModel) -> Trace:
    encoder, n = model.encoder, Dim("N")
    ahead = int(look_ahead_layers(encoder) > 0)
    context = Context(4 * encoder.chunk_unit, 2, ahead)
    parts = list(Context._fields)[: 2 + ahead]
    state = encoder.init_state(2, context.width, context.delay)
    inputs, dynamic = _windows(model, 6 * encoder.chunk_unit * encoder.subsampling, n)
    inputs |= {name: torch.tensor(getattr(context, name)) for name in parts} | state.named()
    dynamic |= {name: {} for name in parts} | dynamic_shapes(encoder_fields(encoder), n)
    outputs = [*_outputs(model), "y_lens", *(f"next_{name}" for name in state.named())]
    module = EncoderGraph(model, state, len(parts)).eval()
    return Trace(module, inputs, dynamic, outputs, len(inputs) - 2)


def whole_trace(model: HybridModel) -> Trace:
    """A trace from all samples if the first frame needs all of them, else from windows."""
    if not model.fbank.framed:
        size = Dim("S", min=1, max=model.fbank.max_samples or None)
        samples = torch.randn(1, min(16000, model.fbank.max_samples or 16000))
        return Trace(
            SamplesGraph(model).eval(), {"samples": samples}, {"samples": {1: size}}, _outputs(model), 0
        )
    inputs, dynamic = _windows(model, 40 * model.encoder.subsampling, Dim("N"))
    return Trace(WholeGraph(model).eval(), inputs, dynamic, [*_outputs(model), "y_lens"], 0)


def _outputs(model: HybridModel) -> list[str]:
    return ["y"] if model.ctc is None else ["y", "log_probs"]


def _windows(model: HybridModel, num_frames: int, n: Dim) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Samples of num_frames frames and the overlap after them, and the sizes that vary."""
    shift, length = model.fbank.shift_samples, model.fbank.frame_samples
    overlap = model.encoder.overlap_frames
    num_frames += overlap
    t = Dim("T", min=model.encoder.subsampling + overlap if overlap else 1)
    inputs = {
        "window": torch.randn(2, (num_frames - 1) * shift + length),
        "num_frames": torch.tensor([num_frames, num_frames - 1]),
    }
    return inputs, {"window": {0: n, 1: shift * t + (length - shift)}, "num_frames": {0: n}}


def memory_trace(model: HybridModel) -> Trace:
    dynamic = {"y": {0: Dim("N"), 1: Dim("T")}}
    inputs = {"y": torch.randn(2, 7, model.encoder.dim)}
    return Trace(MemoryGraph(model).eval(), inputs, dynamic, _layers(model, "cross_"), 0)


def _layers(model: HybridModel, prefix: str = "") -> list[str]:
    """The names of keys and values, layer by layer."""
    depth = len(model.decoder.layers)
    return [f"{prefix}{name}_{i}" for name in ("keys", "values") for i in range(depth)]


def decoder_trace(model: HybridModel) -> Trace:
    n, g, t, more = Dim("N"), Dim("G"), Dim("T"), Dim("M")  # U are the tokens before them
    with torch.no_grad():
        memory = [x.unbind(1) for x in model.decoder.memory(torch.randn(2, 7, model.encoder.dim))]
    shape = 2, 3, model.decoder.config.num_heads, 4, model.decoder.head_dim
    tokens = torch.ones(2, 3, 5, dtype=torch.int64)
    inputs = {"tokens": tokens, "ends": 5 * tokens, "y_lens": torch.tensor([7, 5])}
    inputs |= zip(_layers(model, "cross_"), (x.contiguous() for pair in memory for x in pair), strict=True)
    inputs |= {name: torch.randn(shape) for name in _layers(model)}
    dynamic: dict[str, dict[int, Any]] = {name: {0: n, 1: g, 2: more} for name in ("tokens", "ends")}
    dynamic["y_lens"] = {0: n}
    dynamic |= {name: {0: n, 2: t} for name in _layers(model, "cross_")}
    dynamic |= {name: {0: n, 1: g, 3: Dim("U")} for name in _layers(model)}
    outputs = ["log_probs", "attention", *(f"next_{name}" for name in _layers(model))]
    return Trace(DecoderGraph(model).eval(), inputs, dynamic, outputs, len(inputs) - 3)


def with_best(decoder: onnx.ModelProto) -> onnx.ModelProto:
    """The graph of a decoder with an added input k (1,), and the k most likely units after each token as
    outputs, best first: ids and log_probs_of_ids (B, U, k)."""
    graph, shape = decoder.graph, ["B", "M", "k"]
    graph.node.append(
        onnx.helper.make_node(
            "TopK", ["log_probs", "k"], ["log_probs_of_ids", "ids"], "TopK", axis=-1, largest=1, sorted=1
        )
    )
    kinds = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    graph.input.append(onnx.helper.make_tensor_value_info("k", kinds[1], [1]))
    for name, kind in zip(("log_probs_of_ids", "ids"), kinds, strict=True):
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    onnx.checker.check_model(decoder, full_check=True)
    return decoder


def reverse_trace(model: HybridModel, decoder: TransformerDecoder) -> Trace:
    inputs = {
        "tokens": torch.ones(1, 3, dtype=torch.int64),
        "ends": torch.full((1, 3), 3),
        "y": torch.randn(1, 7, model.encoder.dim),
        "y_lens": torch.tensor([6]),
    }
    u = Dim("U")
    dynamic: dict[str, dict[int, Any]] = {"tokens": {1: u}, "ends": {1: u}, "y": {1: Dim("T")}, "y_lens": {}}
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


def export(trace: Trace, name: str) -> onnx.ModelProto:
    """Trace a module and tidy the graph; all weights are in the returned message."""
    shapes = [trace.dynamic[name] for name in trace.inputs]
    first = len(shapes) - trace.num_rest
    positional = (*shapes[:first], tuple(shapes[first:])) if trace.num_rest else tuple(shapes)
    # with gradients, torch may trace another kernel than the one it exports
    with _quiet(), torch.no_grad():
        try:
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
        except torch.onnx.OnnxExporterError as error:
            raise error.__cause__ if isinstance(error.__cause__, AsrError) else error from None
    assert program is not None
    return tidy(program.model_proto, name)


def tidy(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Name nodes after the modules they come from, and drop information about the exporting machine."""
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
    """The module of a node, as "encoder.layers.0.attention.out/"; features are named by their weights."""
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
    """Silence the exporter's own log and warnings, which say nothing that a user could act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
