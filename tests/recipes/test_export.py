import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from asr.audio import write
from asr.config import ExperimentConfig, save_config
from asr.convert.origin import Origin
from asr.decode.modes import modes_for
from asr.decode.scorer import Hypothesis
from asr.errors import BundleError
from asr.model.hybrid import HybridModel
from asr.runtime.bundle import Bundle
from asr.tokens import load_tokenizer
from asr.train import checkpoint
from export import build, verify
from export.verify import made_sound
from recipes.cli import main

Result = tuple[int, str, str]


@pytest.fixture
def asr(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*args: object) -> Result:
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def experiment(
    tiny_model: HybridModel, tiny_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The tiny model as an experiment that is already exported."""
    path = tmp_path / "exp" / "tiny"
    (path / "tokens").mkdir(parents=True)
    (path / "tokens" / "tokens.txt").write_bytes((tiny_bundles / "tokens.txt").read_bytes())
    save_config(ExperimentConfig(), path / "config.yaml")

    def load_model(folder: Path, which: str) -> tuple[HybridModel, object, ExperimentConfig]:
        assert (folder, which) == (path, "average")
        return tiny_model, load_tokenizer(path / "tokens"), ExperimentConfig()

    def export_graphs(model: HybridModel) -> dict[str, onnx.ModelProto]:
        assert model is tiny_model
        return {x.stem: onnx.load(x) for x in (tiny_bundles / "cpu-fp32").glob("*.onnx")}

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    monkeypatch.setattr(build, "export_graphs", export_graphs)
    monkeypatch.setattr("export.onnx.export_graphs", export_graphs)
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    from lhotse import MonoCut, Recording, SupervisionSegment

    from asr.data.cuts import save_cuts

    cuts = []
    for n in range(3):
        write(tmp_path / f"{n}.wav", made_sound(3.0 + n, 16000))
        recording = Recording.from_file(tmp_path / f"{n}.wav")
        spoken = [SupervisionSegment(f"s{n}", recording.id, 0, recording.duration, text="some words")]
        cuts.append(MonoCut(f"c{n}", 0, recording.duration, 0, spoken, recording=recording))
    save_cuts(cuts, tmp_path / "test.jsonl.gz")
    return tmp_path / "test.jsonl.gz"


@pytest.mark.parametrize("target", ["cpu-int8", "cpu-fp32"])
def test_export_writes_a_bundle_and_says_what_it_proved(asr, experiment: Path, target: str):
    status, out, err = asr("export", experiment, "--target", target, "--licence", "CC0")
    assert (status, err) == (0, "")
    assert "max |Δ log p|" in out
    assert ("kept in float32" in out) == (target == "cpu-int8")
    info = Bundle.load(experiment / "bundle").info
    assert (info.target, info.licence, info.source) == (target, "CC0", "tiny, average checkpoint")
    assert float(info.figures["max_difference_to_checkpoint"]) < 1e-4
    assert ("same_units_as_float32" in info.figures) == (target == "cpu-int8")


def test_what_a_limit_of_errors_came_to_is_in_the_bundle(asr, experiment: Path, manifest: Path):
    given = ("--max-wer-increase", 900, "--manifest", manifest, "--utterances", 2, "--mode", "ctc-greedy")
    status, out, err = asr("export", experiment, *given)
    assert status == 0
    assert "all converted: WER" in err
    assert re.search(r"^WER, cpu-int8 +\d+\.\d\d % \(ctc-greedy\)$", out, re.MULTILINE)
    found = Bundle.load(experiment / "bundle").info.figures["gate"]
    assert (found["set"], found["utterances"], found["words"]) == ("test.jsonl.gz", 2, 4)
    assert found["kept_in_float32"] == {}
    assert found["size"] < 0.7 * found["size_float32"]
    command = "--max-wer-increase 900 --manifest test.jsonl.gz --utterances 2 --mode ctc-greedy"
    assert found["command"] == f"asr export tiny --target cpu-int8 --checkpoint average {command}"
    assert "max_difference_to_checkpoint" in asr("info", experiment / "bundle")[1]


def test_beyond_a_limit_nothing_is_written(
    asr, experiment: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise BundleError("WER 9.00 % instead of 8.00 %")

    monkeypatch.setattr(build, "gate", refuse)
    status, _, err = asr("export", experiment, "--max-wer-increase", 0.1, "--manifest", manifest)
    assert (status, err) == (2, "asr: WER 9.00 % instead of 8.00 %\n")
    assert not (experiment / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-wer-increase", -1), "--max-wer-increase -1: expected 0 or more"),
        (("--max-wer-increase", "nan"), "--max-wer-increase nan: expected 0 or more"),
        (("--max-wer-increase", 1, "--target", "cpu-fp32"), "cpu-fp32 loses nothing"),
        (("--utterances", -1), "--utterances -1: expected at least 1"),
        (("--max-wer-increase", 1), "has no utterances to measure on; give them with --manifest"),
        (("--target", "cpu-int8-static"), "has no utterances to measure on; give them with --manifest"),
    ],
)
def test_limits_that_say_nothing_are_refused(
    asr, experiment: Path, options: tuple[object, ...], message: str
):
    status, _, err = asr("export", experiment, *options)
    assert status == 2
    assert message in err


def test_export_elsewhere(asr, experiment: Path, tmp_path: Path):
    assert asr("export", experiment, "-o", tmp_path / "b")[0] == 0
    assert Bundle.load(tmp_path / "b").info.target == "cpu-int8"
    assert not (experiment / "bundle").exists()


def test_a_converted_model_keeps_its_licence(asr, experiment: Path, tmp_path: Path):
    origin = Origin("wenet", "hub:owner/name@v1", "apache-2.0")
    (experiment / "origin.json").write_text(origin.text())
    assert asr("export", experiment, "--target", "cpu-fp32", "-o", tmp_path / "b")[0] == 0
    info = Bundle.load(tmp_path / "b").info
    assert info.licence == "apache-2.0"
    assert info.source == "tiny, average checkpoint, from wenet hub:owner/name@v1"
    assert (
        asr("export", experiment, "--target", "cpu-fp32", "-o", tmp_path / "b", "--licence", "mine")[0] == 0
    )
    assert Bundle.load(tmp_path / "b").info.licence == "mine"


def test_mistakes_are_told_before_the_export(asr, experiment: Path, tmp_path: Path):
    assert "cpu-fp32, cpu-int8" in asr("export", experiment, "--target", "tpu")[2]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    status, _, err = asr("export", experiment, "-o", tmp_path / "mine")
    assert status == 2
    assert "not a bundle" in err


def test_a_graph_that_is_not_the_model_is_not_written(asr, experiment: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "MAX_DIFFERENCE", 1e-9)
    status, _, err = asr("export", experiment)
    assert status == 2
    assert "log-probabilities differ" in err
    assert not (experiment / "bundle").exists()


def test_verify_compares_three_ways(asr, experiment: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "MAX_UNITS", 100.0)  # random weights are never certain
    assert asr("export", experiment)[0] == 0
    status, out, err = asr("verify", experiment, manifest, "--utterances", 2, "--searches")
    assert (status, err) == (0, "")
    for mode in modes_for("transformer"):
        assert re.search(rf"^  {mode} +same units 2/2$", out, re.MULTILINE)
        assert re.search(rf"^  {mode} +same text 2/2$", out, re.MULTILINE)
    ahead = "chunks of 4 frames, 4 of left context, 1 of look-ahead"
    for part in ("at once, 2 utterances", "chunks of 16 frames", "chunks of 4 frames, 4 of left", ahead):
        assert part in out
    for name in ("torch", "onnx float32", "bundle cpu-int8"):
        assert out.count(f"  {name} ") == 4
    assert "of 4 words" in out
    assert "encoder.onnx" in out


def test_verify_fails_beyond_a_limit(asr, experiment: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch):
    assert asr("export", experiment)[0] == 0
    monkeypatch.setattr(verify, "MAX_UNITS", -1.0)
    status, _, err = asr("verify", experiment, manifest)
    assert status == 2
    assert "% of units change" in err


def test_verify_fails_where_a_search_differs(
    asr, experiment: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verify, "MAX_UNITS", 100.0)
    assert asr("export", experiment)[0] == 0
    answers = iter([(3,), (3,), (3,), (4,)])
    monkeypatch.setattr(verify, "decode", lambda *_: [[Hypothesis(next(answers), 0.0)]])
    status, out, err = asr("verify", experiment, manifest, "--utterances", 2, "--searches")
    assert status == 2
    assert "same units 1/2" in out
    assert "ctc-greedy: units differ in 1 of 2 utterances" in err


def test_a_bundle_alone_is_compared_with_itself(asr, tiny_bundles: Path, manifest: Path):
    status, out, _ = asr("verify", tiny_bundles / "cpu-fp32", manifest)
    assert status == 0
    assert out.count("bundle cpu-fp32") == 4
    status, _, err = asr("verify", tiny_bundles / "cpu-fp32", manifest, "--searches")
    assert status == 2
    assert "no checkpoint to compare searches with" in err


def test_bench_prints_figures(asr, tiny_bundles: Path, tmp_path: Path, manifest: Path):
    write(tmp_path / "a.wav", made_sound(3.0, 16000))
    for sound in (tmp_path / "a.wav", manifest):
        status, out, _ = asr("bench", tiny_bundles / "cpu-int8", sound)
        assert status == 0
        for name in ("real-time factor", "first partial", "final", "chunk", "memory"):
            assert name in out
    ahead = ("--chunk-ms", 160, "--look-ahead", 2)
    assert "chunks of 160 ms, 640 ms of delay" in asr("bench", tiny_bundles / "cpu-int8", sound, *ahead)[1]
    assert '"rtf":' in asr("bench", tiny_bundles / "cpu-int8", tmp_path / "a.wav", "--json")[1]


def test_two_bundles_are_timed_by_turns(asr, tiny_bundles: Path, manifest: Path):
    pair = (tiny_bundles / "cpu-int8", manifest, "--against", tiny_bundles / "cpu-fp32")
    status, out, _ = asr("bench", *pair)
    assert status == 0
    assert "times as fast as" in out
    assert out.count("real-time factor") == 2
    found = json.loads(asr("bench", *pair, "--json")[1])
    assert found["times"]["median"] > 0
    assert found["bundle"]["audio_s"] == found["against"]["audio_s"]


def test_bundles_of_two_sample_rates_are_not_compared(asr, tiny_bundles: Path, tmp_path: Path):
    other = shutil.copytree(tiny_bundles / "cpu-int8", tmp_path / "other")
    text = (other / "model.json").read_text(encoding="utf-8")
    assert '"sample_rate": 16000' in text
    (other / "model.json").write_text(text.replace('"sample_rate": 16000', '"sample_rate": 8000'))
    status, _, err = asr("bench", tiny_bundles / "cpu-int8", "--against", other)
    assert status == 2
    assert "for 8000 Hz" in err


def test_the_error_of_a_bundle_reaches_the_user(asr, tmp_path: Path):
    status, _, err = asr("bench", tmp_path)
    assert status == 2
    assert err == f"asr: {tmp_path}: no model.json in it; make a bundle with asr export\n"
