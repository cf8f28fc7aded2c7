"""8 bits with scales measured beforehand: the target `cpu-int8-static`.

The float32 bundle streams utterances in its own chunks, and a second search runs the decoder, while the
minimum and maximum of every tensor that meets a weight are recorded: calibration on the very windows, states
and tokens of use. Weights are signed, 7 bits, one scale per output channel as in `export/quantize.py`;
activations are unsigned, 8 bits, one scale per tensor; the convolutions of layers are quantized, too.
Products with weights output float32, so that only their inputs are rounded; convolutions also round their
outputs, as there is no other integer convolution. Since no scale depends on the call, a stream does not
depend on those that it is encoded with.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

from asr.runtime.bundle import Bundle
from export.evaluation import BundleEvaluator
from export.gate import Convert
from export.quantize import finished, is_fixed, module_of, quiet, weight_of
from export.verify import Utterance

OP_TYPES = ["MatMul", "Gemm", "Conv"]

Range = tuple[float, float]


class _Recorder:
    """A session that records the range of some tensors over all calls."""

    def __init__(self, session: ort.InferenceSession, graph: onnx.ModelProto, tensors: Sequence[str]) -> None:
        shown = onnx.ModelProto()
        shown.CopyFrom(graph)
        outputs = {x.name for x in graph.graph.output}
        self._added = [x for x in tensors if x not in outputs]
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._added)
        self._session, self._tensors = session, list(tensors)
        self._shown = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
        self.ranges: dict[str, Range] = {}

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        for name, found in zip(self._tensors, self._shown.run(self._tensors, inputs), strict=True):
            if found.size:
                low, high = self.ranges.get(name, (0.0, 0.0))
                self.ranges[name] = min(low, float(found.min())), max(high, float(found.max()))
        return self._session.run(outputs, inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def calibrate(
    float32: Bundle, graphs: Mapping[str, onnx.ModelProto], utterances: Sequence[Utterance]
) -> Convert:
    """A converter of a bundle's graphs to static ones, calibrated by running the bundle on utterances."""
    recorders = {}
    for name, graph in graphs.items():
        recorders[name] = _Recorder(getattr(float32, name), graph, _measured(graph))
    evaluator = BundleEvaluator(float32, utterances)
    for number in range(len(utterances)):
        evaluator.texts(graphs, number, recorders)
    ranges = {graphs[name].graph.name: recorder.ranges for name, recorder in recorders.items()}
    return lambda graph, kept: _quantized(graph, kept, ranges[graph.graph.name])


def _measured(graph: onnx.ModelProto) -> list[str]:
    """The inputs of products with weights, and the outputs of convolutions."""
    found: dict[str, None] = {}
    for node in _nodes(graph, ()):
        found[node.input[0]] = None
        if node.op_type == "Conv":
            found[node.output[0]] = None
    return list(found)


def _nodes(graph: onnx.ModelProto, kept: Collection[str]) -> list[onnx.NodeProto]:
    constants = {x.name for x in graph.graph.initializer}
    return [
        node
        for node in graph.graph.node
        if node.op_type in OP_TYPES
        and weight_of(node) in constants
        and not is_fixed(node)
        and module_of(node) not in kept
    ]


def _quantized(graph: onnx.ModelProto, kept: Collection[str], ranges: Mapping[str, Range]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    names = [node.name for node in _nodes(graph, kept) if node.input[0] in ranges]
    if not names:
        return finished(copy, graph)
    tensors = {name: tuple(np.float32(x) for x in found) for name, found in ranges.items()}
    with quiet():
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, tensors),
            nodes_to_quantize=names,
            nodes_to_exclude=[],
            op_types_to_quantize=OP_TYPES,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    return finished(quantizer.model.model, graph)
