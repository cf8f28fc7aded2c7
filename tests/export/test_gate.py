"""Matrices that 8 bits cannot hold stay in float32, or nothing is written."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from asr.errors import BundleError, ConfigError
from asr.runtime.bundle import Bundle
from export.evaluation import BundleEvaluator, in_memory
from export.gate import Limit, gate, rank
from export.quantize import module_of, modules, quantize
from export.verify import Utterance, made_sound

Graphs = dict[str, onnx.ModelProto]

HARMFUL = "encoder.layers.1.feed_forward_1"


@pytest.fixture
def graphs(tiny_bundles: Path) -> Graphs:
    return {path.stem: onnx.load(path) for path in (tiny_bundles / "cpu-fp32").glob("*.onnx")}


@pytest.fixture(scope="module")
def utterances(tiny_bundles: Path) -> list[Utterance]:
    """Synthetic audio with the float32 bundle's own text, one word per letter, so float32 has no errors."""
    bundle = Bundle.load(tiny_bundles / "cpu-fp32")
    sound = made_sound(12.0, 16000)
    parts = [Utterance(str(n), sound[n * 32000 : (n + 2) * 32000], "") for n in range(5)]
    graphs = {path.stem: onnx.load(path) for path in bundle.folder.glob("*.onnx")}
    evaluator = BundleEvaluator(bundle, parts, ["ctc-greedy"])
    return [x._replace(text=evaluator.texts(graphs, n)["ctc-greedy"]) for n, x in enumerate(parts)]


@pytest.fixture
def evaluator(tiny_bundles: Path, utterances: list[Utterance]) -> BundleEvaluator:
    return BundleEvaluator(Bundle.load(tiny_bundles / "cpu-fp32"), utterances, ["ctc-greedy"])


def with_outliers(graphs: Graphs, names: Collection[str]) -> Graphs:
    """The same function in float32: matrices that follow an activation get one input that is always 0, with
    weights so large that the others become 0 in 8 bits."""
    changed = {}
    for key, graph in graphs.items():
        changed[key] = onnx.ModelProto()
        changed[key].CopyFrom(graph)
        constants = {x.name: x for x in changed[key].graph.initializer}
        for node in list(changed[key].graph.node):
            if node.op_type != "MatMul" or module_of(node) not in names or node.input[1] not in constants:
                continue
            weight = numpy_helper.to_array(constants[node.input[1]])
            wider = np.concatenate([weight, np.full_like(weight[:1], 1e4)])
            constants[node.input[1]].CopyFrom(numpy_helper.from_array(wider, node.input[1]))
            node.input[0] = _with_a_zero(changed[key], node)
    return changed


def _with_a_zero(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """The name of the node's first input with a channel of zeros appended."""
    pads, last, name = f"{node.name}/pads", f"{node.name}/last", f"{node.name}/padded"
    for constant, value in ((pads, [0, 1]), (last, [-1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), constant))
    pad = onnx.helper.make_node("Pad", [node.input[0], pads, "", last], [name], name=name)
    model.graph.node.insert(list(model.graph.node).index(node), pad)
    return name


def wer(report: dict[str, float]) -> float:
    return report["ctc-greedy"]


def test_the_harmful_module_stays_in_float32(
    graphs: Graphs, evaluator: BundleEvaluator, utterances: list[Utterance]
):
    lines: list[str] = []
    graphs = with_outliers(graphs, [HARMFUL])
    usual = gate(
        graphs, lambda graph, kept: quantize(graph, [*kept, HARMFUL]), evaluator, Limit(100, utterances)
    )
    limit = Limit(wer(usual[1].wer), utterances, about={"set": "made"}, say=lines.append)
    found, report = gate(graphs, quantize, evaluator, limit)
    assert wer(report.wer_float32) == 0
    assert wer(report.wer_all) > limit.max_increase >= wer(report.wer)
    assert list(report.kept) == [HARMFUL]
    assert report.size < 0.7 * report.size_float32
    kinds = {node.op_type for node in found["encoder"].graph.node if module_of(node) == HARMFUL}
    assert "MatMul" in kinds
    assert "MatMulInteger" not in kinds
    assert evaluator.texts(found, 0) == evaluator.texts(usual[0], 0)
    said = report.as_dict()
    assert (said["set"], list(said["kept_in_float32"])) == ("made", [HARMFUL])
    assert [line.partition(":")[0] for line in lines] == ["float32", "all converted", "1 in float32"]


def test_where_half_of_the_matrices_are_not_enough_it_is_refused(
    graphs: Graphs, evaluator: BundleEvaluator, utterances: list[Utterance]
):
    graphs = with_outliers(graphs, list(modules(graphs["encoder"])))
    with pytest.raises(BundleError, match=r"\d+ most harmful modules in float32, expected at most 1 more"):
        gate(graphs, quantize, evaluator, Limit(1.0, utterances))


def test_within_the_limit_nothing_is_ranked(
    graphs: Graphs, evaluator: BundleEvaluator, utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("export.gate.rank", None)
    found, report = gate(graphs, quantize, evaluator, Limit(100.0, utterances))
    assert report.kept == {}
    assert report.wer == report.wer_all
    assert found.keys() == graphs.keys()


def test_only_what_a_mode_hears_is_harmful(graphs: Graphs, evaluator: BundleEvaluator):
    watched: list[tuple[str, int]] = []

    def watch(what: str, steps: int) -> Callable[[int], None]:
        watched.append((what, steps))
        return lambda done: None

    order = rank(graphs, quantize, evaluator, ["ctc-greedy"], watch)
    assert set(order) == set(modules(graphs["encoder"]))
    assert list(order.values()) == sorted(order.values(), reverse=True)
    assert watched[0][0] == "harm of modules"
    both = rank(graphs, quantize, evaluator, ["rescore"], lambda *_: lambda n: None)
    assert set(both) == {name for graph in graphs.values() for name in modules(graph)}


def test_a_set_without_words_is_refused(graphs: Graphs, tiny_bundles: Path):
    silent = [Utterance("made", made_sound(1.0, 16000), "")]
    evaluator = BundleEvaluator(Bundle.load(tiny_bundles / "cpu-fp32"), silent)
    with pytest.raises(BundleError, match="no words"):
        gate(graphs, quantize, evaluator, Limit(0.1, silent))


def test_modes_are_those_of_the_model(tiny_bundles: Path):
    bundle = Bundle.load(tiny_bundles / "cpu-fp32")
    assert BundleEvaluator(bundle, []).modes == ("ctc-greedy", "rescore")
    with pytest.raises(ConfigError, match="mode chunked"):
        BundleEvaluator(bundle, [], ["chunked"])


def test_a_decoder_without_ctc_is_measured_by_what_it_writes(whole_bundle: Path):
    bundle = Bundle.load(whole_bundle)
    graphs = {path.stem: onnx.load(path) for path in whole_bundle.glob("*.onnx")}
    evaluator = BundleEvaluator(bundle, [Utterance("made", made_sound(2.0, 16000), "")])
    assert evaluator.modes == ("attention",)
    assert evaluator.texts(graphs, 0)["attention"]
    assert set(evaluator.log_probs(graphs)) == {"decoder"}
    order = rank(graphs, quantize, evaluator, ["attention"], lambda *_: lambda n: None)
    assert set(order) == {name for graph in graphs.values() for name in modules(graph)}


def test_graphs_in_memory_are_the_bundle(tiny_bundles: Path, graphs: Graphs):
    bundle = Bundle.load(tiny_bundles / "cpu-fp32")
    window = {"y": np.ones((1, 3, bundle.info.dim), np.float32)}
    ours, theirs = (x.memory.run(None, window) for x in (in_memory(bundle, graphs), bundle))
    np.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("encoder.layers.0.attention.out/MatMul_242", "encoder.layers.0.attention"),
        ("encoder.layers.0.feed_forward_1/inner/MatMul", "encoder.layers.0.feed_forward_1"),
        ("encoder.stacks.0.layers.1.feed_forward.in/MatMul", "encoder.stacks.0.layers.1.feed_forward"),
        ("decoder.out/MatMul_184", "decoder.out"),
        ("MatMul_3", "MatMul_3"),
    ],
)
def test_modules_are_named_by_their_nodes(node: str, module: str):
    assert module_of(onnx.NodeProto(name=node)) == module
