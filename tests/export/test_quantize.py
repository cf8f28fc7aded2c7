import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.runtime.bundle import session_options
from export.onnx import export_graphs
from export.quantize import KEPT, modules, quantize
from export.verify import made_sound

EIGHT_BITS = {"MatMulInteger", "DynamicQuantizeLinear"}


def load(tiny_bundles: Path, target: str, name: str) -> onnx.ModelProto:
    return onnx.load(tiny_bundles / target / f"{name}.onnx")


def ops(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node]


@pytest.mark.parametrize("name", ["encoder", "memory", "decoder"])
def test_weights_become_signed_bytes(tiny_bundles: Path, name: str):
    before, after = (load(tiny_bundles, target, name) for target in ("cpu-fp32", "cpu-int8"))
    assert not EIGHT_BITS & set(ops(before))
    assert set(ops(after)) >= EIGHT_BITS
    assert "ConvInteger" not in ops(after)
    kinds = {x.name: x.data_type for x in after.graph.initializer}
    weights = [node.input[1] for node in after.graph.node if node.op_type == "MatMulInteger"]
    assert {kinds[name] for name in weights} == {TensorProto.INT8}
    largest = max(
        np.abs(numpy_helper.to_array(x).astype(int)).max()
        for x in after.graph.initializer
        if x.name in weights
    )
    assert 60 <= largest <= 64  # two products with 8-bit activations fit into 16 bits
    assert after.ir_version == before.ir_version


def test_every_matrix_of_a_layer_is_quantized(tiny_bundles: Path):
    before, after = (load(tiny_bundles, target, "encoder") for target in ("cpu-fp32", "cpu-int8"))
    constants = {x.name for x in before.graph.initializer}
    kept = tuple(f"{name}{end}" for name in KEPT for end in "./")
    matrices = [n for n in before.graph.node if n.op_type == "MatMul" and n.input[1] in constants]
    weights = [node for node in matrices if not node.name.startswith(kept)]
    assert len(weights) == 2 * 8  # eight per layer
    assert ops(after).count("MatMulInteger") == len(weights)


@pytest.mark.parametrize("module", ["fbank", "ctc", "encoder.front.convolutions.0", "encoder.front.out"])
def test_what_is_kept_is_computed_in_float32(tiny_bundles: Path, module: str):
    graph = load(tiny_bundles, "cpu-int8", "encoder")
    nodes = [
        n for n in graph.graph.node if n.name.startswith(f"{module}/") and n.op_type in ("MatMul", "Conv")
    ]
    assert nodes
    kinds = {x.name: x.data_type for x in graph.graph.initializer}
    cast = {n.output[0]: n.attribute[0].i for n in graph.graph.node if n.op_type == "Cast"}
    for node in nodes:
        weight = node.input[1]
        assert kinds.get(weight, cast.get(weight)) == TensorProto.FLOAT


def test_large_constants_are_stored_in_16_bits(tiny_bundles: Path):
    graph = load(tiny_bundles, "cpu-int8", "encoder").graph
    large = [x for x in graph.initializer if np.prod(x.dims) >= 1024]
    assert {x.data_type for x in large} == {TensorProto.INT8, TensorProto.FLOAT16}


def test_the_largest_products_do_not_saturate():
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(np.where(rng.random((256, 64)) < 0.8, 1, -1).astype(np.float32), "w")
    model = product(weight)
    x = np.where(rng.random((4, 256)) < 0.9, 1, 0.0).astype(np.float32)
    expected, found = (
        onnxruntime.InferenceSession(built.SerializeToString(), session_options(1)).run(None, {"x": x})[0]
        for built in (model, quantize(model))
    )
    np.testing.assert_allclose(found, expected, rtol=0.02)


def product(weight: onnx.TensorProto) -> onnx.ModelProto:
    sizes = zip("xy", weight.dims, strict=True)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in sizes]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="encoder.layers.0/MatMul_0")
    graph = helper.make_graph([node], "encoder", value[:1], value[1:], [weight])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def test_size_is_a_quarter():
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32), "w")
    model = product(weight)
    before = model.SerializeToString()
    assert quantize(model).ByteSize() < 0.27 * model.ByteSize()
    assert model.SerializeToString() == before


@pytest.mark.slow
def test_a_model_of_real_width_is_smaller_and_faster():
    config = ConformerConfig(num_layers=4), DecoderConfig(num_layers=2)
    graphs = export_graphs(build_model(FbankConfig(), *config, LossConfig(), 500))
    quantized = {name: quantize(graph) for name, graph in graphs.items()}
    before, after = (sum(g.ByteSize() for g in built.values()) for built in (graphs, quantized))
    assert after < 0.35 * before
    inputs = {
        "window": made_sound(1.0, 16000)[None, : 63 * 160 + 400],
        "num_frames": np.array([64]),
        "chunk": np.array(16),
        "left": np.array(4),
        "frames": np.zeros((1, 3, 80), np.float32),
        "keys": np.zeros((1, 4, 4, 64, 64), np.float32),
        "values": np.zeros((1, 4, 4, 64, 64), np.float32),
        "conv": np.zeros((1, 4, 256, 14), np.float32),
        "offset": np.array([1000]),
    }
    sessions = [
        onnxruntime.InferenceSession(built["encoder"].SerializeToString(), session_options(1))
        for built in (graphs, quantized)
    ]
    times: list[list[float]] = [[], []]
    for _ in range(30):  # interleaved, so that both see the same load on the machine
        for session, taken in zip(sessions, times, strict=True):
            started = time.process_time()
            session.run(None, inputs)
            taken.append(time.process_time() - started)
    assert np.median(times[1]) < 0.85 * np.median(times[0])


def test_tables_with_a_matrix_for_each_head_stay_in_float32():
    """Such as position tables, for which no runtime has an integer product."""
    shapes = {"table": (1, 2, 4, 8), "weight": (8, 4)}
    value_info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2, 3, size))
        for name, size in (("x", 4), ("y", 4))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "table"], ["hidden"], "encoder.layers.0.weights/MatMul_0"),
        helper.make_node("MatMul", ["hidden", "weight"], ["y"], "encoder.layers.0.attention/MatMul_1"),
    ]
    draw = np.random.default_rng(0).normal
    constants = [numpy_helper.from_array(draw(size=x).astype(np.float32), name) for name, x in shapes.items()]
    graph = helper.make_graph(nodes, "tables", value_info[:1], value_info[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = quantize(model)
    assert sorted(modules(model)) == ["encoder.layers.0.attention"]
    assert [op for op in ops(found) if "MatMul" in op] == ["MatMul", "MatMulInteger"]
    onnxruntime.InferenceSession(found.SerializeToString()).run(
        None, {"x": np.ones((1, 2, 3, 4), np.float32)}
    )
