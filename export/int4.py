"""Weights in 4 bits with a scale per 32 of them, activations in float32: the target `cpu-int4`, for size."""

from collections.abc import Collection

import onnx

from export.quantize import excluded, finished, quiet

BLOCK = 32
"""Weights per scale."""

ACCURACY = 4
"""Products are computed with activations in 8 bits, also with one scale per block."""


def to_int4(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A float32 graph -> a copy with 4-bit matrices, except modules in `kept`.

    The same modules as in `export/quantize.py` are never quantized; embedding tables have 16 bits.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            copy,
            bits=4,
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=ACCURACY,
            nodes_to_exclude=excluded(model, kept),
            op_types_to_quantize=("MatMul",),
        )
        quantizer.process()
    return finished(quantizer.model.model, model)
