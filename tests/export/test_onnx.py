from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

GRAPHS = ("encoder", "memory", "decoder", "reverse")


@pytest.fixture(scope="module")
def graphs(tiny_bundles: Path) -> dict[str, onnx.ModelProto]:
    return {name: onnx.load(tiny_bundles / "cpu-fp32" / f"{name}.onnx") for name in GRAPHS}


def test_inputs_and_outputs_are_named(graphs: dict[str, onnx.ModelProto]):
    layer = ("keys", "values", "conv", "pending", "queries")
    state = ["frames", *(f"{name}.{i}" for i in range(2) for name in layer), "offset"]
    following = [f"next_{name}" for name in state]
    expected = {
        "encoder": (
            ["window", "num_frames", "chunk", "left", "right", *state],
            ["y", "log_probs", "y_lens", *following],
        ),
        "memory": (["y"], ["cross_keys_0", "cross_values_0"]),
        "decoder": (
            ["tokens", "ends", "y_lens", "cross_keys_0", "cross_values_0", "keys_0", "values_0", "k"],
            ["log_probs", "attention", "next_keys_0", "next_values_0", "log_probs_of_ids", "ids"],
        ),
        "reverse": (["tokens", "ends", "y", "y_lens"], ["log_probs"]),
    }
    for name, graph in graphs.items():
        found = [x.name for x in graph.graph.input], [x.name for x in graph.graph.output]
        assert found == expected[name]


def test_older_runtimes_can_read_them(graphs: dict[str, onnx.ModelProto]):
    for graph in graphs.values():
        assert graph.ir_version <= 10
        assert [(x.domain, x.version) for x in graph.opset_import if x.domain == ""] == [("", 18)]
        assert not graph.functions
        assert {node.domain for node in graph.graph.node} <= {""}


def test_no_control_flow_and_no_weights_elsewhere(graphs: dict[str, onnx.ModelProto]):
    for graph in graphs.values():
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in graph.graph.node}
        assert all(x.data_location == onnx.TensorProto.DEFAULT for x in graph.graph.initializer)


def test_nothing_of_the_machine_that_exported_is_in_them(tiny_bundles: Path):
    home = str(Path(__file__).parents[2]).encode()
    for path in (tiny_bundles / "cpu-fp32").glob("*.onnx"):
        data = path.read_bytes()
        assert b".py" not in data
        assert home not in data


def test_nodes_are_named_after_modules(graphs: dict[str, onnx.ModelProto]):
    names = Counter(node.name.rpartition("/")[0] for node in graphs["encoder"].graph.node)
    for module in ("fbank", "cmvn", "encoder.front.out", "encoder.layers.1.attention.project", "ctc"):
        assert names[module] > 0
    assert len({node.name for node in graphs["encoder"].graph.node}) == len(graphs["encoder"].graph.node)


@pytest.mark.parametrize(
    ("n", "width", "delay", "frames"),
    [(1, 0, 0, 1), (1, 1, 0, 4), (5, 7, 1, 33), (3, 9, 4, 32)],
)
def test_every_dynamic_size_is(
    graphs: dict[str, onnx.ModelProto], n: int, width: int, delay: int, frames: int
):
    session = onnxruntime.InferenceSession(graphs["encoder"].SerializeToString())
    sizes = {"N": n, "W": width, "R": delay, "160*T + 240": 160 * frames + 240}
    inputs = {}
    for x in session.get_inputs():
        kind = np.float32 if x.type == "tensor(float)" else np.int64
        inputs[x.name] = np.zeros([sizes.get(size, size) for size in x.shape], kind)
    inputs["num_frames"] += frames
    inputs["chunk"] += 4
    y, log_probs, y_lens, *_, offset = session.run(None, inputs)
    assert y.shape == (n, -(-frames // 4), 32)
    assert log_probs.shape == (n, -(-frames // 4), 22)
    assert offset.tolist() == [-(-frames // 4)] * n
    assert y_lens.tolist() == [-(-frames // 4) - 2 * delay] * n
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-5)
