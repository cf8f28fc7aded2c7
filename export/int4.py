"""Weights in 4 bits, one scale for 32 of them, activations in float32: the target `cpu-int4`, for size."""

from collections.abc import Collection

import onnx

from export.quantize import excluded, finished, quiet

BLOCK = 32
"""Weights of one scale."""

ACCURACY = 4
"""Products are computed with activations in 8 bits, one scale for a block of them, too."""


def to_int4(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A float32 graph -> the same with 4-bit matrices, `kept` ones apart. The argument is left as it is.

    What is never quantized is that of `export/quantize.py`; tables of embeddings have 16 bits.
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
