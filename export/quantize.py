"""Matrices in signed 8-bit integers, one scale per output channel; activations are scaled at run time.

What stays in float32, and why:

    fbank       windowed Fourier transform and mel triangles: 16 nats do not fit into 8 bits
    front       subsampling convolutions: integer ones are slower than float ones on CPUs; and the layer
                after them: 1 to 4 % of the weights, more harm than any other kind (docs/experiments.md)
    depthwise   convolutions, for the same reason; they are 1 % of the work
    ctc         the output layer: its errors reach the log-probabilities unsmoothed, its cost is small
    attention   products of activations with activations, softmax, norms: they have no weights; nor do the
                position tables, a matrix per head, that a fixed chunk turns into constants

Large constants among these are stored in 16 bits, and converted back when the bundle is loaded.

The decoder's embedding table becomes 8-bit too. Weights are signed because unsigned ones are half as fast on
processors with VNNI, and use 7 of the 8 bits because processors without it add two products in 16 bits and
saturate: 2 * 255 * 64 fits, 2 * 255 * 127 does not (docs/experiments.md). The graphs need no preparation:
those from `export/onnx.py` have constants folded and shapes known.

`export/gate.py` finds out what else a particular model cannot tolerate, by modules: all matrices of an
attention, for example. It only requires that nodes are named after the modules they come from.
"""

import contextlib
import logging
import math
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

KEPT = {
    "fbank": "fbank matrices",
    "encoder.front": "subsampling",
    "ctc": "CTC output layer",
}
"""Modules of the encoder that are never quantized."""

MODULE = re.compile(r".*\blayers\.\d+\.[^./]+|[^./]+(\.[^./]+)?")
"""A module of a layer, such as "encoder.layers.0.attention", or outside the layers, such as "decoder.out"."""

OP_TYPES = ["MatMul", "Gemm", "Gather"]
FLOAT = onnx.TensorProto.FLOAT

LARGE = 1024
"""Minimum elements of a constant that is worth storing in 16 bits."""


def quantize(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A float32 graph of `export/onnx.py` -> a copy with 8-bit weights.

    kept: modules, as from `modules`, that stay in float32.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            copy,
            path,
            op_types_to_quantize=OP_TYPES,
            nodes_to_exclude=excluded(model, kept),
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        return finished(onnx.load(path), model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence onnxruntime's quantizers, which give needless advice; one even sets up the root logger."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers


def finished(quantized: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """The output of a quantizer for a model, checked, with large float32 constants in 16 bits."""
    _store_in_16_bits(quantized.graph)
    quantized.graph.name = model.graph.name
    quantized.ir_version = model.ir_version
    onnx.checker.check_model(quantized)
    return quantized


def _store_in_16_bits(graph: onnx.GraphProto) -> None:
    """Large float32 constants become float16 ones and a Cast, which onnxruntime folds when it loads them.

    Scales stay float32: some are too small for 16 bits.
    """
    casts = []
    for constant in graph.initializer:
        value = onnx.numpy_helper.to_array(constant)
        is_large = value.dtype == np.float32 and value.size >= LARGE
        if is_large and not constant.name.endswith(("_scale", "_scales")):
            name = constant.name
            constant.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], f"{name}/Cast", to=FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def modules(model: onnx.ModelProto) -> dict[str, int]:
    """The modules of a graph that can be kept in float32 -> the number of elements of their matrices."""
    sizes = {x.name: math.prod(x.dims) for x in model.graph.initializer if len(x.dims) == 2}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in OP_TYPES and not is_fixed(node):
            size = sizes.get(weight_of(node), 0)
            if size:
                found[module_of(node)] = found.get(module_of(node), 0) + size
    return found


def module_of(node: onnx.NodeProto) -> str:
    """ "encoder.layers.0.attention.out/MatMul_242" -> "encoder.layers.0.attention"."""
    found = MODULE.match(node.name.partition("/")[0])
    return found[0] if found else ""


def weight_of(node: onnx.NodeProto) -> str:
    """The input of a node that may be a weight matrix."""
    return str(node.input[0] if node.op_type == "Gather" else node.input[1])


def excluded(model: onnx.ModelProto, kept: Collection[str]) -> list[str]:
    """Nodes that are not quantized: those of modules in `kept`, and those that never are."""
    tables = {x.name for x in model.graph.initializer if len(x.dims) > 2}
    return [
        node.name
        for node in model.graph.node
        if module_of(node) in kept or is_fixed(node) or (len(node.input) > 1 and weight_of(node) in tables)
    ]


def is_fixed(node: onnx.NodeProto) -> bool:
    """Whether a node belongs to a module that is never quantized, or is a Gather other than of embeddings."""
    fixed = tuple(f"{name}{end}" for name in KEPT for end in "./")
    is_other_gather = node.op_type == "Gather" and not node.input[0].endswith("embedding.weight")
    return node.name.startswith(fixed) or is_other_gather
