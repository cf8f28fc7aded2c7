"""The verbs work together and report what they did."""

import json
from collections.abc import Callable
from typing import Any

import pytest


def test_every_verb_of_a_project_in_turn(project: Any, run: Callable[..., Any]) -> None:
    decoded = run("decode", project.experiment, project.manifest, "--mode", "rescore")
    assert decoded.status == 0, decoded.err
    assert "WER" in decoded.out + decoded.err
    hyps = project.experiment / "decode" / "train_rescore" / "hyp.jsonl"
    assert len(hyps.read_text(encoding="utf-8").splitlines()) == 24
    scored = run("score", project.experiment)
    assert scored.status == 0, scored.err
    assert "24" in scored.out or "WER" in scored.out
    assert hyps.with_name("wer.txt").exists()
    for args in (["verify", project.experiment, project.manifest], ["bench", project.bundle]):
        answer = run(*args)
        assert answer.status == 0, answer.err
    for path in (project.experiment, project.bundle, project.experiment / "average.safetensors"):
        assert run("info", path).status == 0


@pytest.mark.parametrize("mode", ["ctc-greedy", "ctc-prefix", "attention", "joint", "rescore"])
def test_a_checkpoint_and_its_float32_bundle_decode_alike(
    project: Any, run: Callable[..., Any], mode: str
) -> None:
    texts = []
    for model in (project.experiment, project.float32):
        answer = run("decode", model, project.manifest, "--mode", mode)
        assert answer.status == 0, answer.err
        file = model / "decode" / f"train_{mode}" / "hyp.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        texts.append({row["id"]: row["hyp"] for row in rows})
    assert texts[0] == texts[1]


def test_training_called_again_goes_on_where_it_was(project: Any, run: Callable[..., Any]) -> None:
    answer = run("train", *project.settings, "--exp", project.experiment)
    assert answer.status == 0, answer.err
    assert "step 8" in answer.err or "step-000008" in answer.err
