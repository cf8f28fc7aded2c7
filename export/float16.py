"""Layers in 16 bits, for a GPU: the target `cuda-fp16`.

Inputs and outputs stay in float32, and so do the features (16 nats of a power spectrum), positions and masks,
and the log-probabilities: everything outside the layers and the subsampling. Casts join the two.
"""

import re
from collections.abc import Collection

import numpy as np
import onnx

from export.quantize import module_of

CONVERTED = re.compile(r"(.*\blayers\.\d+\.|encoder\.front\b|cross\.|decoder\.out\b)")
"""Names of the nodes that compute in 16 bits."""

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def to_float16(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """A float32 graph -> a copy with layers in 16 bits, except those in `kept`."""
    converted = onnx.shape_inference.infer_shapes(model)
    graph = converted.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    floats = {x.name for x in values if x.type.tensor_type.elem_type == FLOAT}
    constants = {x.name: x for x in graph.initializer if x.data_type == FLOAT}
    there: set[str] = set()  # tensors that exist in 16 bits
    nodes: list[onnx.NodeProto] = []

    def in_half(name: str) -> str:
        """The name of a float tensor in 16 bits, created if there is none yet."""
        half = f"{name}/half"
        if half not in there:
            there.add(half)
            if name in constants:
                graph.initializer.append(_half(constants[name], half))
            else:
                nodes.append(_cast(name, half, HALF))
        return half

    for node in graph.node:
        is_converted = CONVERTED.match(node.name) and module_of(node) not in kept
        if is_converted:
            node.input[:] = [in_half(x) if x in floats or x in constants else x for x in node.input]
            for attribute in node.attribute:
                _halve(attribute)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if is_converted and name in floats:
                node.output[i] = f"{name}/half"
                there.add(node.output[i])
                nodes.append(_cast(node.output[i], name, FLOAT))
    _replace(graph, nodes)
    onnx.checker.check_model(converted)
    return converted


def _cast(name: str, to: str, kind: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [name], [to], f"{to}/Cast", to=kind)


def _halve(attribute: onnx.AttributeProto) -> None:
    """Change a float32 attribute of a node, a value or a type, to float16."""
    if attribute.name in ("to", "dtype") and attribute.i == FLOAT:
        attribute.i = HALF
    elif attribute.HasField("t") and attribute.t.data_type == FLOAT:
        attribute.t.CopyFrom(_half(attribute.t, attribute.t.name))


def _half(constant: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """A constant in 16 bits; values too large for them, such as masks, become the largest float16."""
    largest = np.finfo(np.float16).max
    value = onnx.numpy_helper.to_array(constant).clip(-largest, largest)
    return onnx.numpy_helper.from_array(value.astype(np.float16), name)


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Set the nodes of a graph, without unused casts and constants."""
    outputs = {x.name for x in graph.output}
    read = {name for node in nodes for name in node.input} | outputs
    used = [x for x in nodes if not (x.op_type == "Cast" and x.output[0] not in read)]
    copies = [onnx.NodeProto.FromString(x.SerializeToString()) for x in used]
    constants = [x for x in graph.initializer if x.name in read]
    kept = [onnx.TensorProto.FromString(x.SerializeToString()) for x in constants]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.initializer.extend(kept)
