"""ONNX graphs written node by node, for models for which a traced graph is not the best one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 18
IR_VERSION = 10
"""The version that onnxruntime 1.20 reads."""

END = 1 << 62
"""Past the end of any dimension, for `Graph.slice`."""

TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


class Graph:
    """A graph under construction. Values are identified by name; nodes are named after modules (`scope`)."""

    def __init__(self, name: str) -> None:
        self._graph = onnx.GraphProto(name=name)
        self._scope = ""
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._outputs: dict[str, str] = {}

    def input(self, name: str, shape: Sequence[int | str], dtype: str = "float32") -> str:
        self._graph.input.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str], dtype: str = "float32") -> None:
        """Make a value an output of the graph under a name."""
        self._outputs[value] = name
        self._graph.output.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))

    @contextmanager
    def scope(self, module: str) -> Iterator[None]:
        """Name nodes after a module within the current one."""
        outer = self._scope
        self._scope = f"{outer}{module}."
        yield
        self._scope = outer

    def constant(self, value: ArrayLike, dtype: str = "int64") -> str:
        """A small constant, or a weight; equal ones are shared."""
        array = np.ascontiguousarray(value, dtype)
        key = dtype, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = name = f"constant_{len(self._constants)}"
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def weight(self, name: str, value: Tensor) -> str:
        """A parameter, named after its module."""
        full = f"{self._scope}{name}"
        self._graph.initializer.append(numpy_helper.from_array(value.detach().contiguous().numpy(), full))
        return full

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        (output,) = self.split(op, *inputs, count=1, **attributes)
        return output

    def split(self, op: str, *inputs: str, count: int, **attributes: Any) -> list[str]:
        """A node with several outputs; a Split without further inputs makes equal parts."""
        name = self._node_name(op)
        outputs = [f"{name}:{i}" if i else name for i in range(count)]
        if op == "Split" and len(inputs) == 1:
            attributes["num_outputs"] = count
        self._graph.node.append(helper.make_node(op, inputs, outputs, name, **attributes))
        return outputs

    def slice(self, x: str, start: int | str, end: int | str, axis: int, step: int = 1) -> str:
        """x[start:end:step] along an axis; start and end (1,)."""
        bounds = [i if isinstance(i, str) else self.constant([i]) for i in (start, end)]
        return self.add("Slice", x, *bounds, self.constant([axis]), self.constant([step]))

    def size(self, x: str, axis: int) -> str:
        """The size of an axis, (1,)."""
        return self.add("Shape", x, start=axis, end=axis + 1)

    def range(self, start: str, end: str) -> str:
        """(end - start,); both (1,)."""
        ends = [self.add("Squeeze", x, self.constant([0])) for x in (start, end)]
        return self.add("Range", *ends, self.constant(1))

    def before(self, lens: str, length: str) -> str:
        """lens (N,), length (1,) -> (N, length): whether a frame is before the end."""
        step = self.range(self.constant([0]), length)
        return self.add("Less", step, self.add("Unsqueeze", lens, self.constant([1])))

    def linear(self, name: str, module: nn.Linear, x: str, scale: float | Tensor = 1.0) -> str:
        """x (..., C) -> the scaled output (..., C'); scale: a number, or (C',)."""
        return self.affine(name, scale * module.weight.t(), scale * module.bias, x)

    def affine(self, name: str, weight: Tensor, bias: Tensor, x: str) -> str:
        """x (..., C) -> (..., C'); weight (C, C'), bias (C')."""
        with self.scope(name):
            return self.add(
                "Add", self.add("MatMul", x, self.weight("weight", weight)), self.weight("bias", bias)
            )

    def convolution(self, name: str, module: nn.Conv2d, x: str, less: float = 0.0) -> str:
        """x (N, C, T, F) -> the output minus `less` (N, C', T', F')."""
        assert module.bias is not None
        (top, left), strides = cast(tuple[int, int], module.padding), list(module.stride)
        with self.scope(name):
            weights = self.weight("weight", module.weight), self.weight("bias", module.bias - less)
            pads = [top, left, top, left]
            return self.add("Conv", x, *weights, strides=strides, pads=pads, group=module.groups)

    def layer_norm(self, name: str, module: nn.LayerNorm, x: str) -> str:
        with self.scope(name):
            weights = self.weight("weight", module.weight), self.weight("bias", module.bias)
            return self.add("LayerNormalization", x, *weights, axis=-1, epsilon=module.eps)

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def model(self) -> onnx.ModelProto:
        """The finished graph, checked."""
        for node in self._graph.node:
            for values in (node.input, node.output):
                values[:] = [self._outputs.get(value, value) for value in values]
        model = helper.make_model(
            self._graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        model.producer_name = ""
        onnx.checker.check_model(model, full_check=True)
        return model

    def _node_name(self, op: str) -> str:
        module = self._scope.rstrip(".")
        return f"{module}/{op}_{len(self._graph.node)}" if module else f"{op}_{len(self._graph.node)}"
