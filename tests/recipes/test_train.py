"""asr train, asr average and asr info on an experiment that takes seconds."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment

from asr.tokens import train_tokenizer
from asr.train.signals import StopRequest, listen
from recipes.cli import main

SIZES = """
encoder: {dim: 16, num_layers: 1, num_heads: 2, ff_dim: 32, subsampling_channels: 4}
decoder: {dim: 16, num_layers: 1, num_heads: 2, ff_dim: 32}
"""
RUN = """
optim: {max_steps: 2}
train: {save_every: 1, log_every: 1, cmvn_utterances: 2}
data: {num_workers: 0, train: [train.jsonl.gz], valid: [train.jsonl.gz], tokens: tokens}
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    cuts = []
    for number, text in enumerate(["ab", "ba"]):
        soundfile.write(f"u{number}.wav", np.random.default_rng(number).normal(size=8000) * 0.1, 16000)
        cut = Recording.from_file(f"u{number}.wav").to_cut()
        cut.supervisions = [SupervisionSegment(cut.id, f"u{number}", 0, cut.duration, text=text)]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file("train.jsonl.gz")
    train_tokenizer(iter(["ab"]), "char", 0, tmp_path / "tokens")
    Path("a.yaml").write_text(SIZES)
    Path("b.yaml").write_text(RUN)
    return tmp_path


def test_train_average_info(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--config", "a.yaml", "--config", "b.yaml"]
    assert main(["train", *files, "--exp", "exp/a", "--set", "optim.max_steps=3", "--device", "cpu"]) == 0
    log = capsys.readouterr()
    assert "optim.max_steps reached" in log.err
    assert not log.out
    assert "optim.max_steps reached" in Path("exp/a/train.log").read_text()

    assert main(["average", "exp/a", "--last", "2"]) == 0
    assert "mean of 2, step-000002 to step-000003" in capsys.readouterr().out
    assert main(["average", "exp/a", "--steps", "1,3"]) == 0
    assert "step-000001 to step-000003" in capsys.readouterr().out

    for path, expected in {
        "exp/a": [
            "3, step-000001 to step-000003",
            "last valid",
            "wer",
            "0 of look-ahead",
            "average of",
            "M in",
        ],
        "exp/a/checkpoints/step-000002": ["step          2", "verified", "conformer"],
        "exp/a/average.safetensors": ["step-000001", "parameters"],
    }.items():
        assert main(["info", path]) == 0
        text = capsys.readouterr().out
        assert [word for word in expected if word not in text] == []


@contextlib.contextmanager
def listen_and_be_asked() -> Iterator[StopRequest]:
    with listen() as request:
        os.kill(os.getpid(), signal.SIGINT)
        yield request


def test_a_stopped_training_is_told_from_one_that_is_done(corpus: Path) -> None:
    train = ["train", "--config", "a.yaml", "--config", "b.yaml", "--exp", "exp/a", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asr.train.loop.listen", listen_and_be_asked)
        assert main(train) == 75
    assert "stopped by SIGINT" in Path("exp/a/train.log").read_text()
    assert main(train) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["average", "exp/none"], "no checkpoint to average; train first"),
        (["average", "exp/none", "--steps", "1,x"], "'x' is not a number of steps"),
        (["average", "exp/none", "--last", "0"], "expected at least 1"),
        (["info", "a.yaml"], "neither an experiment"),
        (["train", "--config", "a.yaml", "--exp", "e", "--set", "optim.lrr=3"], "did you mean lr?"),
        (["train", "--config", "a.yaml", "--exp", "e"], "tokens"),
        (["train", "--config", "a.yaml", "--exp", "a.yaml/e"], "a.yaml/e: cannot be written"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    corpus: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("asr: ")
    assert message in error
    assert error.count("\n") == 1


def test_chunks_are_told_as_they_were_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for chunk, expected in {
        "{max_chunk: 9}": "chunks up to 9 frames, 0 of look-ahead",
        "{contexts: [[70, 13], [70, 0]]}": "chunks of 1, 14 frames",
        "{dynamic: false, chunks: [8]}": "whole utterances",
    }.items():
        (tmp_path / "config.yaml").write_text(f"encoder: {{type: fast-conformer, chunk: {chunk}}}\n")
        assert main(["info", str(tmp_path)]) == 0
        assert expected in capsys.readouterr().out


def test_a_bundle_is_told_from_its_model_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = '[{"name": "conv", "shape": [2, 6]}]'
    (tmp_path / "model.json").write_text(
        f'{{"format": 1, "files": {{"encoder.onnx": {{}}}}, "states": {states}, "figures": {{"wer": 3.456}}}}'
    )
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for line in ("format        1", "files         encoder.onnx", "states        conv [2, 6]"):
        assert line in text
    assert "figures       wer 3.456" in text
    (tmp_path / "model.json").write_text("[]")
    assert main(["info", str(tmp_path)]) == 2
