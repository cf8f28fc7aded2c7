"""Checkpoints: which one is loaded, what is refused and why, and what an average is."""

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asr.config import save_config
from asr.errors import CheckpointError
from asr.train import checkpoint
from asr.train.checkpoint import average_checkpoints, load_model, path_of, read_weights
from asr.train.learner import Learner


@pytest.fixture
def experiment(lab: Any) -> tuple[Path, Learner]:
    """An experiment with checkpoints 1, 2 and 3 of different weights."""
    config = lab.config()
    learner = Learner.fresh(config, 6, torch.device("cpu"))
    exp_dir = lab.folder / "exp"
    exp_dir.mkdir()
    shutil.copytree(lab.folder / "tokens", exp_dir / "tokens")
    save_config(config, exp_dir / "config.yaml")
    for step in (1, 2, 3):
        save(lab, learner, step)
    return exp_dir, learner


def save(lab: Any, learner: Learner, step: int) -> Path:
    with torch.no_grad():
        learner.model.ctc.bias.fill_(step)
    learner.progress.step = step
    meta = checkpoint.describe(lab.config(), lab.folder / "tokens", {})
    return checkpoint.save_checkpoint(lab.folder / "exp", step, learner.weights(), learner.state([]), meta)


def rewrite_meta(path: Path, **changes: Any) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_the_newest_is_damaged_so_the_one_before_it_is_used_and_said_so(experiment: Any) -> None:
    exp_dir, _ = experiment
    os.truncate(path_of(exp_dir, 3) / "model.safetensors", 100)
    said: list[str] = []
    assert checkpoint.newest_valid(exp_dir, said.append) == path_of(exp_dir, 2)
    assert "step-000003" in said[0]
    assert "100 bytes" in said[0]


def test_training_goes_on_from_the_one_before_a_damaged_one(lab: Any) -> None:
    exp_dir, _ = lab.train("a", "optim.max_steps=4", "train.save_every=2")
    before = read_weights(path_of(exp_dir, 4) / "model.safetensors")
    os.truncate(path_of(exp_dir, 4) / "train_state.pt", 100)
    lab.train("a", "optim.max_steps=4", "train.save_every=2")
    assert any("WARNING" in line and "step-000004" in line for line in lab.log)
    after = read_weights(path_of(exp_dir, 4) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_never_from_scratch_where_all_are_damaged(lab: Any) -> None:
    exp_dir, _ = lab.train("a", "optim.max_steps=2")
    (path_of(exp_dir, 2) / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints can be used, .* remove the folder"):
        lab.train("a", "optim.max_steps=4")


def test_what_is_unfinished_is_removed_at_the_start(lab: Any) -> None:
    exp_dir, _ = lab.train("a", "optim.max_steps=2")
    for name in ("checkpoints/step-000009.tmp", "checkpoints/step-000001.old"):
        shutil.copytree(path_of(exp_dir, 2), exp_dir / name)
    (exp_dir / "checkpoints" / "latest.tmp").touch()
    lab.train("a", "optim.max_steps=3")
    assert sorted(p.name for p in (exp_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-000002",
        "step-000003",
    ]


def test_a_newer_format_is_refused(experiment: Any) -> None:
    exp_dir, _ = experiment
    rewrite_meta(path_of(exp_dir, 3), format=2, asr="9.0")
    with pytest.raises(CheckpointError, match=r"format 2, written by asr 9.0; .* reads 1; update"):
        checkpoint.newest_valid(exp_dir, pytest.fail)


def test_other_units_are_refused(experiment: Any) -> None:
    exp_dir, _ = experiment
    tokens = exp_dir / "tokens" / "tokens.txt"
    tokens.write_text(tokens.read_text().replace("c ", "d "))
    with pytest.raises(CheckpointError, match=r"step-000003/model.safetensors: trained with other units"):
        load_model(exp_dir, "latest")


def test_other_shapes_name_tensor_and_field(experiment: Any, lab: Any) -> None:
    exp_dir, _ = experiment
    config = lab.config()
    save_config(replace(config, encoder=replace(config.encoder, kernel_size=5)), exp_dir / "config.yaml")
    message = (
        r"1 tensor of another shape, first encoder.layers.0.convolution.depthwise.weight: .*3\) in the file, "
        r".*5\) in the model; encoder.kernel_size is 3 in the checkpoint, 5 in the configuration"
    )
    with pytest.raises(CheckpointError, match=message):
        load_model(exp_dir, "latest")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil-ran",)


def test_a_pickle_that_runs_code_does_not_run(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp_dir, _ = experiment
    monkeypatch.chdir(tmp_path)
    state = path_of(exp_dir, 3) / "train_state.pt"
    torch.save({"optimizer": Evil()}, state)
    pickle.loads(pickle.dumps(Evil()))  # it does run when unpickled
    (tmp_path / "evil-ran").rmdir()
    files = json.loads((path_of(exp_dir, 3) / "meta.json").read_text())["files"]
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    files["train_state.pt"] = {"bytes": state.stat().st_size, "sha256": digest}
    rewrite_meta(path_of(exp_dir, 3), files=files)
    checkpoint.verify(path_of(exp_dir, 3))
    with pytest.raises(CheckpointError, match="not a training state"):
        checkpoint.load_state(path_of(exp_dir, 3))
    assert not (tmp_path / "evil-ran").exists()


def test_the_last_and_the_best_are_kept(experiment: Any, lab: Any) -> None:
    exp_dir, learner = experiment
    checkpoint.point(exp_dir, "best", path_of(exp_dir, 1))
    for step in (4, 5):
        save(lab, learner, step)
        checkpoint.prune(exp_dir, keep=2)
    assert checkpoint.checkpoints(exp_dir) == [path_of(exp_dir, step) for step in (1, 4, 5)]
    assert (exp_dir / "checkpoints" / "latest").read_text() == "step-000005\n"


def test_an_average_of_equal_checkpoints_changes_nothing(experiment: Any, lab: Any) -> None:
    exp_dir, learner = experiment
    torch.nn.init.normal_(learner.model.encoder.front.out.weight)
    for step in (5, 6, 7):
        save(lab, learner, step)
    average = read_weights(average_checkpoints(exp_dir, [path_of(exp_dir, step) for step in (5, 6, 7)]))
    weights = read_weights(path_of(exp_dir, 7) / "model.safetensors")
    assert average.pop("ctc.bias").tolist() == [6.0] * 6
    assert all(torch.equal(average[name], weights[name]) for name in average)


def test_an_average_needs_none_of_its_checkpoints(experiment: Any) -> None:
    exp_dir, _ = experiment
    average_checkpoints(exp_dir, checkpoint.checkpoints(exp_dir))
    for path in checkpoint.checkpoints(exp_dir):
        os.truncate(path / "model.safetensors", 100)
    load_model(exp_dir)


def test_an_average_says_what_it_is_made_of_and_loads(experiment: Any) -> None:
    exp_dir, _ = experiment
    with pytest.raises(
        CheckpointError, match=r"average.safetensors: no such file; make it with `asr average"
    ):
        load_model(exp_dir)
    file = average_checkpoints(exp_dir, [path_of(exp_dir, 1), path_of(exp_dir, 3)])
    assert checkpoint.about_weights(file)["sources"] == ["step-000001", "step-000003"]
    model, tokenizer, config = load_model(exp_dir)
    assert model.ctc.bias.tolist() == [2.0] * 6
    assert not model.training
    assert len(tokenizer.symbols) == 6
    assert config.encoder.dim == 16


def test_averaging_other_models_is_refused(experiment: Any) -> None:
    exp_dir, _ = experiment
    meta = json.loads((path_of(exp_dir, 1) / "meta.json").read_text())
    meta["config"]["encoder"]["dim"] = 99
    rewrite_meta(path_of(exp_dir, 1), config=meta["config"])
    with pytest.raises(CheckpointError, match=r"step-000001: another model .* encoder.dim"):
        average_checkpoints(exp_dir, [path_of(exp_dir, 3), path_of(exp_dir, 1)])


@pytest.mark.parametrize(
    ("which", "bias"),
    [("latest", 3.0), ("best", 2.0), ("step-000001", 1.0), ("{}/checkpoints/step-000002", 2.0)],
)
def test_which_model_is_loaded(experiment: Any, which: str, bias: float) -> None:
    exp_dir, _ = experiment
    checkpoint.point(exp_dir, "best", path_of(exp_dir, 2))
    model, _, _ = load_model(exp_dir, which.format(exp_dir))
    assert model.ctc.bias[0] == bias


def test_the_running_average_is_loaded(lab: Any) -> None:
    exp_dir, _ = lab.train("a", "optim.max_steps=3", "train.ema=0.9")
    latest, average = (load_model(exp_dir, which)[0].ctc.weight for which in ("latest", "ema"))
    assert not torch.equal(latest, average)


@pytest.mark.parametrize("which", ["step-000009", "nothing.safetensors", "best"])
def test_what_is_not_there_is_an_error(experiment: Any, which: str) -> None:
    exp_dir, _ = experiment
    with pytest.raises(CheckpointError, match=r"no such file|no best checkpoint"):
        load_model(exp_dir, which)
