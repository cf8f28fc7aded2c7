"""Matrices as signed integers in 8 bits, one scale per output channel; activations get theirs at run time.

What stays in float32, and why:

    fbank       windowed Fourier transform and mel triangles: 16 nats do not fit into 8 bits
    front       subsampling convolutions: integer ones are slower than float ones on CPUs; and the layer
                behind them: 1 to 4 % of the weights, more harm than any other kind (docs/experiments.md)
    depthwise   convolutions, for the same reason; they are 1 % of the work
    ctc         the output layer: its errors reach the log-probabilities unsmoothed, its cost is small
    attention   products of activations with activations, softmax, norms: nothing of them is a weight

What of this is large is stored in 16 bits, and unfolded when the bundle is loaded.

The decoder's table of embeddings becomes 8-bit too. Weights are signed because unsigned ones are half as
fast on processors with VNNI, and use 7 of the 8 bits because processors without add two products in 16 bits
and saturate: 2 * 255 * 64 fits, 2 * 255 * 127 does not (docs/experiments.md). The graphs need no
preparation: constants are folded, and shapes known, when they come from `export/onnx.py`.
"""

import logging
import tempfile
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

OP_TYPES = ["MatMul", "Gemm", "Gather"]
FLOAT = onnx.TensorProto.FLOAT

LARGE = 1024
"""Numbers in a constant that is worth storing in 16 bits."""


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph of `export/onnx.py` -> the same with 8-bit weights. The argument is left as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it recommends the preparation that is not needed
        try:
            quantize_dynamic(
                copy,
                path,
                op_types_to_quantize=OP_TYPES,
                nodes_to_exclude=_excluded(model),
                per_channel=True,
                weight_type=QuantType.QInt8,
                reduce_range=True,
            )
        finally:
            root.setLevel(level)
        quantized = onnx.load(path)
    _store_in_16_bits(quantized.graph)
    quantized.graph.name = model.graph.name
    quantized.ir_version = model.ir_version
    onnx.checker.check_model(quantized)
    return quantized


def _store_in_16_bits(graph: onnx.GraphProto) -> None:
    """Large float32 constants become float16 ones and a Cast, which onnxruntime folds when it loads them."""
    casts = []
    for constant in graph.initializer:
        value = onnx.numpy_helper.to_array(constant)
        if value.dtype == np.float32 and value.size >= LARGE:
            name = constant.name
            constant.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], f"{name}/Cast", to=FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _excluded(model: onnx.ModelProto) -> list[str]:
    """Nodes of the kept modules, and every Gather that does not look up embeddings."""
    tables = {x.name for x in model.graph.initializer if x.name.endswith("embedding.weight")}
    kept = tuple(f"{name}{end}" for name in KEPT for end in "./")
    return [
        node.name
        for node in model.graph.node
        if node.name.startswith(kept) or (node.op_type == "Gather" and node.input[0] not in tables)
    ]
