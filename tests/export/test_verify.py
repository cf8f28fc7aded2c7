from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from asr.context import WHOLE, Context
from asr.errors import BundleError
from asr.runtime import Bundle
from asr.runtime.onnx_scorer import OnnxScorer
from export.evaluation import in_memory
from export.targets import TARGETS
from export.verify import (
    Answers,
    Comparison,
    Utterance,
    answer,
    at_once,
    check_float32,
    check_int8,
    compare,
    contexts,
    in_chunks,
    looking_ahead,
    made_sound,
)


def comparison(**values: object) -> Comparison:
    good = {"max_difference": 0.0, "same": 1, "total": 1, "units": 0.0, "wer": (5.0, 5.0), "num_words": 2000}
    return Comparison(**(good | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_streams_what_it_says_at_once(tiny_bundles: Path, target: str):
    bundle = Bundle.load(tiny_bundles / "cpu-fp32")
    heard = [Utterance("a", made_sound(3.0, 16000), "the words")]
    graphs = {path.stem: onnx.load(path) for path in bundle.folder.glob("*.onnx")}
    if convert := TARGETS[target].converter(bundle, graphs, heard):
        bundle = in_memory(bundle, {name: convert(graph, ()) for name, graph in graphs.items()})
    for context in [*contexts(bundle.info)[1:], looking_ahead(bundle.info)]:
        once = answer(at_once(OnnxScorer(bundle), context), heard, bundle.tokenizer)
        found = compare(once, answer(in_chunks(bundle, context), heard, bundle.tokenizer))
        assert found.max_difference < (1e-4 if target == "cpu-fp32" else 10.0)
        assert found.wer[0] is not None
        assert found.num_words == 2


def test_differences_are_counted():
    log_probs = np.log(np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]], np.float32))
    other = log_probs.copy()
    other[0, 0] -= 0.5
    a = Answers([log_probs, log_probs], [(1, 2), (2,)], 10.0, 100)
    b = Answers([log_probs, other], [(1, 2), (2, 1)], 12.0, 100)
    found = compare(a, b)
    assert found.max_difference == pytest.approx(0.5)
    assert (found.same, found.total, found.units) == (1, 2, pytest.approx(100 / 3))
    assert found.wer == (10.0, 12.0)


def test_what_is_impossible_to_both_is_no_difference():
    a = Answers([np.array([[0.0, -50.0]])], [()], None, 0)
    b = Answers([np.array([[0.0, -90.0]])], [()], None, 0)
    assert compare(a, b).max_difference == 0
    assert compare(a, Answers([np.array([[0.0, -9.0]])], [()], None, 0)).max_difference == 41


def test_limits_hold():
    check_float32(comparison(max_difference=1e-4), "it")
    check_int8(comparison(max_difference=3.0, units=4.0, wer=(5.0, 5.4)), "it")
    check_int8(comparison(wer=(5.0, 9.0), num_words=100), "it")
    for bad in (0.01, float("nan")):
        with pytest.raises(BundleError, match="it: log-probabilities differ"):
            check_float32(comparison(max_difference=bad), "it")
    with pytest.raises(BundleError, match=r"word error rate 5.60 % instead of 5.00 %"):
        check_int8(comparison(wer=(5.0, 5.6)), "it")
    with pytest.raises(BundleError, match=r"6.0 % of units change"):
        check_int8(comparison(units=6.0), "it")


def test_contexts_are_at_once_the_default_and_the_shortest(tiny_bundles: Path):
    info = Bundle.load(tiny_bundles / "cpu-fp32").info
    untrained = replace(info, streaming=replace(info.streaming, max_look_ahead=0))
    assert contexts(untrained) == [WHOLE, Context(16, 4), Context(4, 4)]
    assert looking_ahead(info) == Context(4, 4, 1)


def test_what_was_trained_with_look_ahead_is_compared_with_it(tiny_bundles: Path):
    info = Bundle.load(tiny_bundles / "cpu-fp32").info
    trained = replace(info, streaming=replace(info.streaming, max_look_ahead=3))
    assert contexts(trained) == [WHOLE, Context(16, 4), Context(4, 4), Context(4, 4, 3)]


def test_made_sound_is_the_same_every_time_and_changes_in_loudness():
    a = made_sound(2.0, 16000)
    np.testing.assert_array_equal(a, made_sound(2.0, 16000))
    loudness = np.abs(a).reshape(-1, 2000).mean(1)
    assert loudness.max() > 5 * loudness.min()
    assert (a.dtype, a.shape) == (np.float32, (32000,))
