"""Converted graphs are close to the originals, and as small as the target promises."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from asr.errors import BundleError
from asr.runtime.bundle import CPU, CUDA, Bundle
from export.bundle import write_bundle
from export.evaluation import BundleEvaluator, in_memory
from export.quantize import module_of, modules
from export.static import calibrate
from export.targets import TARGETS
from export.verify import Utterance, made_sound

Graphs = dict[str, onnx.ModelProto]

MADE = [Utterance(str(n), made_sound(4.0, 16000)[n * 16000 :], "") for n in range(2)]

LARGEST = {"cpu-int8": 0.1, "cpu-int8-static": 0.2, "cpu-int4": 1.0, "cuda-fp16": 0.02}
"""Allowed difference of log-probabilities, for a model with random weights."""


@pytest.fixture(scope="module")
def float32(tiny_bundles: Path) -> Bundle:
    return Bundle.load(tiny_bundles / "cpu-fp32")


@pytest.fixture(scope="module")
def graphs(tiny_bundles: Path) -> Graphs:
    return {path.stem: onnx.load(path) for path in (tiny_bundles / "cpu-fp32").glob("*.onnx")}


@pytest.fixture(scope="module")
def converted(float32: Bundle, graphs: Graphs) -> dict[str, Graphs]:
    found = {}
    for target in LARGEST:
        convert = TARGETS[target].converter(float32, graphs, MADE)
        assert convert
        found[target] = {name: convert(graph, ()) for name, graph in graphs.items()}
    return found


CONVERT = """
import logging
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from export.targets import TARGETS
weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
ends = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", 64]) for x in "xy"]
node = helper.make_node("MatMul", ["x", "w"], ["y"], name="encoder.layers.0.out/MatMul")
graph = helper.make_graph([node], "encoder", ends[:1], ends[1:], [weight])
model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
for target in TARGETS.values():
    target.convert and target.convert(model, ())
assert (logging.getLogger().handlers, logging.getLogger().level) == ([], logging.WARNING)
assert logging.getLogger().isEnabledFor(logging.WARNING)
"""


def test_a_conversion_is_silent_and_leaves_logging_alone():
    """In a process of its own, since pytest has configured logging."""
    done = subprocess.run([sys.executable, "-c", CONVERT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_target_is_known_here():
    assert set(TARGETS) == {"cpu-fp32", *LARGEST}
    assert all(target.kept for name, target in TARGETS.items() if name != "cpu-fp32")


@pytest.mark.parametrize("target", LARGEST)
def test_a_target_hears_nearly_what_float32_hears(
    converted: dict[str, Graphs], graphs: Graphs, float32: Bundle, target: str
):
    evaluator = BundleEvaluator(float32, MADE)
    before, after = evaluator.log_probs(graphs), evaluator.log_probs(converted[target])
    assert before.keys() == after.keys() == {"ctc", "decoder", "reverse"}
    for kind in before:
        difference = np.abs(before[kind] - after[kind]).max()
        assert 0 < difference < LARGEST[target]


def size(constant: onnx.TensorProto) -> int:
    return len(constant.raw_data) or numpy_helper.to_array(constant).nbytes


@pytest.mark.parametrize(
    ("target", "bytes_a_weight"), [("cpu-int8-static", 1), ("cpu-int4", 0.65), ("cuda-fp16", 2)]
)
def test_weights_are_as_small_as_they_should_be(
    converted: dict[str, Graphs], graphs: Graphs, target: str, bytes_a_weight: float
):
    module = "encoder.layers.0.feed_forward_1"
    graph = converted[target]["encoder"].graph
    constants = {x.name: size(x) for x in graph.initializer}
    made = {x.output[0]: x for x in graph.node}
    found = 0
    for node in graph.node:
        if module_of(node) == module and node.op_type in ("MatMul", "MatMulNBits"):
            dequantized = made.get(node.input[1])  # a DequantizeLinear, whose first input is the weight
            names = [dequantized.input[0]] if dequantized else list(node.input[1:])
            found += sum(constants[name] for name in names)
    assert found == pytest.approx(bytes_a_weight * modules(graphs["encoder"])[module], rel=0.05)


@pytest.mark.parametrize("target", LARGEST)
def test_a_module_can_be_kept(graphs: Graphs, float32: Bundle, target: str):
    convert = TARGETS[target].converter(float32, graphs, MADE)
    assert convert
    kept = convert(graphs["memory"], list(modules(graphs["memory"])))
    before, after = (
        Counter(x.op_type for x in model.graph.node if x.op_type != "Cast")
        for model in (graphs["memory"], kept)
    )
    assert after == before
    assert {x.data_type for x in kept.graph.initializer} <= {
        TensorProto.FLOAT,
        TensorProto.INT64,
        TensorProto.FLOAT16,
    }


def test_weights_of_static_graphs_are_signed_with_a_scale_a_channel(converted: dict[str, Graphs]):
    graph = converted["cpu-int8-static"]["encoder"].graph
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    weights = [
        (constants[x.input[0]], constants[x.input[1]])
        for x in graph.node
        if x.op_type == "DequantizeLinear"
        and x.input[0] in constants
        and constants[x.input[0]].dtype == np.int8
    ]
    assert len(weights) == 2 * 9  # eight matrices and a convolution per layer
    for weight, scale in weights:
        assert np.abs(weight.astype(int)).max() <= 64  # 7 bits: see export/quantize.py
        assert scale.size in weight.shape
    zeros = [constants[x.input[2]].dtype for x in graph.node if x.op_type == "QuantizeLinear"]
    assert set(zeros) == {np.dtype(np.uint8)}


def test_calibration_hears_what_streams_hear(float32: Bundle, graphs: Graphs):
    """Louder audio gives larger scales: they come from the calibration data alone."""
    scales = []
    for gain in (0.01, 1.0):
        heard = [x._replace(samples=gain * x.samples) for x in MADE]
        graph = calibrate(float32, graphs, heard)(graphs["encoder"], ()).graph
        constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
        scales.append([constants[x.input[1]] for x in graph.node if x.op_type == "QuantizeLinear"])
    assert np.mean(np.array(scales[0]) != np.array(scales[1])) > 0.9


def test_a_static_stream_does_not_depend_on_its_company(converted: dict[str, Graphs], float32: Bundle):
    """With dynamic scales it does: they are those of the whole call."""
    rng = np.random.default_rng(0)
    y = (
        rng.normal(size=(2, 5, float32.info.dim)).astype(np.float32)
        * np.array([1, 50], np.float32)[:, None, None]
    )
    same = {}
    for target in ("cpu-int8", "cpu-int8-static"):
        memory = in_memory(float32, converted[target]).memory
        together, alone = (memory.run(None, {"y": x})[0][:1] for x in (y, y[:1]))
        same[target] = bool((together == alone).all())
    assert same == {"cpu-int8": False, "cpu-int8-static": True}


def test_a_bundle_for_a_gpu_needs_one(
    converted: dict[str, Graphs],
    float32: Bundle,
    tiny_bundles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    write_bundle(
        converted["cuda-fp16"], replace(float32.info, target="cuda-fp16"), tiny_bundles, tmp_path / "b"
    )
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CPU])
    with pytest.raises(
        BundleError, match="made for cuda-fp16, and this onnxruntime has no CUDAExecutionProvider"
    ):
        Bundle.load(tmp_path / "b")
    assert Bundle.load(tmp_path / "b", device="cpu").encoder.get_providers() == [CPU]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, CPU])
    assert Bundle.load(tmp_path / "b").providers == (CUDA, CPU)
    assert Bundle.load(tiny_bundles / "cpu-fp32").providers == (CPU,)
