"""Training as a whole: it learns, stops when asked, and resumes as if it had never stopped."""

import gzip
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from asr.errors import CheckpointError, TrainingError
from asr.model.hybrid import HybridModel, Loss
from asr.optim import learning_rate
from asr.train.checkpoint import checkpoints, load_state, path_of, read_weights
from asr.train.report import read_metrics

ALL_OF_IT = ("optim.accumulate=2", "train.ema=0.9", "encoder.chunk.max_chunk=3")


def weights(exp_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return read_weights(path_of(exp_dir, step) / "model.safetensors")


def assert_same_checkpoint(left: Path, right: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = read_weights(left / name), read_weights(right / name)
        assert a.keys() == b.keys()
        assert not [key for key in a if not torch.equal(a[key], b[key])]
    ours, theirs = load_state(left), load_state(right)
    moments = (state["optimizer"]["state"] for state in (ours, theirs))
    for a, b in zip(*(m.values() for m in moments), strict=True):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    assert ours["progress"]["position"] == theirs["progress"]["position"]


def test_a_tiny_batch_is_learnt_by_heart(lab: Any) -> None:
    exp_dir, progress = lab.train(
        "a",
        "optim.max_steps=60",
        "optim.lr=0.02",
        "augment.speed=[]",
        "augment.spec_augment.num_time_masks=0",
        "augment.spec_augment.num_freq_masks=0",
        "encoder.dropout=0.0",
        "decoder.dropout=0.0",
        "loss.label_smoothing=0.0",
        "train.save_every=60",
    )
    losses = [row["loss"] for row in read_metrics(exp_dir / "metrics.jsonl")]
    assert losses[-1] < 0.2 * losses[0]
    assert progress.step == 60


def test_with_consistency_it_learns_too(lab: Any) -> None:
    options = ("optim.max_steps=40", "optim.lr=0.02", "augment.speed=[]", "loss.consistency=0.06")
    exp_dir, _ = lab.train("a", *options, "train.save_every=40")
    losses = [row["loss"] for row in read_metrics(exp_dir / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_it_runs_on_as_many_threads_as_it_is_told(lab: Any) -> None:
    lab.train("a", "optim.max_steps=1", "train.threads=2")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("optim", ["adamw", "scaled-adam"])
def test_stopped_and_resumed_equals_uninterrupted(lab: Any, optim: str) -> None:
    options = (*ALL_OF_IT, f"optim.type={optim}")
    whole, _ = lab.train("whole", *options, "optim.max_steps=7")
    parts, _ = lab.train("parts", *options, "optim.max_steps=3")
    lab.train("parts", *options, "optim.max_steps=7")
    assert_same_checkpoint(path_of(whole, 7), path_of(parts, 7))


def test_eden_is_told_the_epoch(lab: Any) -> None:
    options = ("optim.schedule=eden", "optim.lr_epochs=0.5", "train.log_every=1")
    exp_dir, _ = lab.train("a", *options, "optim.max_steps=12")
    config = lab.config(*options).optim
    rows = read_metrics(exp_dir / "metrics.jsonl")
    assert {row["epoch"] for row in rows} > {0, 1}
    for row in rows:
        assert row["lr"] == pytest.approx(learning_rate(row["step"], config, row["epoch"]))


def test_another_optimizer_does_not_go_on(lab: Any) -> None:
    lab.train("a", "optim.max_steps=2")
    with pytest.raises(CheckpointError, match=r"optim.type is adamw in the checkpoint, scaled-adam in the"):
        lab.train("a", "optim.max_steps=4", "optim.type=scaled-adam")


def die(line: str) -> None:
    if line.startswith("step       4"):
        os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(lab: Any, *options: str) -> None:
    lab.train("killed", *options, echo=die)


def test_killed_and_resumed_equals_uninterrupted(lab: Any, children: Any) -> None:
    """SIGKILL after the checkpoint of step 3, with data workers."""
    options = (*ALL_OF_IT, "data.num_workers=2")
    whole, _ = lab.train("whole", *options, "optim.max_steps=7")
    child = children.start(train_until_killed, lab, *options, "optim.max_steps=7")
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    killed, _ = lab.train("killed", *options, "optim.max_steps=7")
    assert any("resuming from" in line and "step-000003" in line for line in lab.log)
    assert_same_checkpoint(path_of(whole, 7), path_of(killed, 7))
    steps = [row["step"] for row in read_metrics(killed / "metrics.jsonl")]
    assert steps == [2, 4, 6]  # what was logged after the checkpoint is not there twice


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_training_with_a_checkpoint(lab: Any, number: int) -> None:
    def ask(line: str) -> None:
        lab.log.append(line)
        if line.startswith("step       2"):
            os.kill(os.getpid(), number)

    exp_dir, progress = lab.train("a", "optim.max_steps=100", echo=ask)
    assert progress.step == 3
    assert checkpoints(exp_dir) == [path_of(exp_dir, 3)]
    assert signal.Signals(number).name in lab.log[-1]
    assert signal.getsignal(number) is not None
    _, progress = lab.train("a", "optim.max_steps=4")
    assert progress.step == 4


def ask_all(line: str) -> None:
    if line.startswith("step       2"):
        os.killpg(0, signal.SIGTERM)
        time.sleep(1)  # for the data workers to end, if they do


def train_until_all_are_asked(lab: Any) -> None:
    os.setsid()
    lab.train("a", "optim.max_steps=100", "data.num_workers=2", echo=ask_all)


def test_a_signal_to_the_whole_group_ends_training_with_a_checkpoint(lab: Any, children: Any) -> None:
    child = children.start(train_until_all_are_asked, lab)
    child.join(120)
    assert child.exitcode == 0
    assert checkpoints(lab.folder / "a") == [path_of(lab.folder / "a", 3)]


def ask_twice(line: str) -> None:
    if line.startswith("step       2"):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


def train_until_asked_twice(lab: Any) -> None:
    lab.train("a", "optim.max_steps=100", echo=ask_twice)


def test_a_second_signal_ends_it_at_once(lab: Any, children: Any) -> None:
    child = children.start(train_until_asked_twice, lab)
    child.join(120)
    assert child.exitcode == 128 + signal.SIGTERM


def test_a_gradient_that_is_not_finite_is_skipped_and_listed(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = HybridModel.forward, []

    def sometimes_nan(self: HybridModel, *args: Any) -> Loss:
        calls.append(1)
        loss = forward(self, *args)
        return loss._replace(total=loss.total * float("nan")) if len(calls) == 2 else loss

    monkeypatch.setattr(HybridModel, "forward", sometimes_nan)
    exp_dir, _ = lab.train("a", "optim.max_steps=3", "train.save_every=1", "train.keep=5")
    one, two, three = (weights(exp_dir, step) for step in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(two[name], three[name]) for name in two)
    assert all(tensor.isfinite().all() for tensor in three.values())
    (row,) = map(json.loads, (exp_dir / "nonfinite.jsonl").read_text().splitlines())
    assert row["step"] == 2
    assert row["ids"][0]


def test_too_many_gradients_that_are_not_finite_end_training(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = HybridModel.forward

    def nan(self: HybridModel, *args: Any) -> Loss:
        loss = forward(self, *args)
        return loss._replace(total=loss.total * float("inf"))

    lab.train("a", "optim.max_steps=2")
    monkeypatch.setattr(HybridModel, "forward", nan)
    with pytest.raises(TrainingError, match=r"step 5: 3 steps in a row .* resume from .*step-000003"):
        lab.train("a", "optim.max_steps=50", "train.max_bad_steps=3")


def test_running_out_of_memory_says_what_to_lower(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: HybridModel, *args: Any) -> Loss:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HybridModel, "forward", too_large)
    with pytest.raises(TrainingError, match=r"out of memory: \d+ utterances .* lower data.max_batch_s"):
        lab.train("a", "optim.max_steps=2")


def test_a_limit_of_processor_time_ends_training(lab: Any) -> None:
    exp_dir, progress = lab.train("a", "optim.max_steps=100000", "train.max_cpu_minutes=0.01")
    assert 0.6 <= progress.cpu_s < 5
    assert "max_cpu_minutes" in lab.log[-1]
    minutes = [row["cpu_minutes"] for row in read_metrics(exp_dir / "metrics.jsonl")]
    assert minutes == sorted(minutes)
    _, again = lab.train("a", "optim.max_steps=100000", "train.max_cpu_minutes=0.01")
    assert again.step == progress.step  # what was used before counts


def test_validation_notes_the_best_checkpoint(lab: Any) -> None:
    manifest = lab.folder / "train.jsonl.gz"
    exp_dir, progress = lab.train("a", "optim.max_steps=4", f"data.valid=[{manifest}]", "train.valid_every=2")
    rows = [row for row in read_metrics(exp_dir / "metrics.jsonl") if row["kind"] == "valid"]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["words"] == 8
    best = min(rows, key=lambda row: (row["wer"], row["loss"]))["step"]
    assert (exp_dir / "checkpoints" / "best").read_text() == f"step-{best:06d}\n"
    assert progress.best["step"] == best
    assert (exp_dir / "curves.png").stat().st_size > 1000


def test_a_text_too_long_for_its_audio_does_no_harm(lab: Any, tmp_path: Path) -> None:
    manifest = tmp_path / "train.jsonl.gz"
    with gzip.open(manifest, "rt") as lines:
        text = lines.read().replace('"text": "ab"', f'"text": "{"ab" * 100}"')
    with gzip.open(manifest, "wt") as lines:
        lines.write(text)
    exp_dir, _ = lab.train("a", "optim.max_steps=4")
    assert all(tensor.isfinite().all() for tensor in weights(exp_dir, 4).values())
    assert not (exp_dir / "nonfinite.jsonl").exists()


def test_another_model_is_refused_and_other_changes_are_told(lab: Any) -> None:
    lab.train("a", "optim.max_steps=2")
    with pytest.raises(CheckpointError, match=r"encoder.dim is 16 in the checkpoint, 32 in"):
        lab.train("a", "optim.max_steps=4", "encoder.dim=32")
    lab.train("a", "optim.max_steps=4", "optim.lr=0.5")
    assert any("optim.lr was 0.001, is 0.5" in line for line in lab.log)


def hold_the_folder(lab: Any) -> None:
    def hold(line: str) -> None:
        (lab.folder / "ready").touch()
        time.sleep(60)

    lab.train("a", "optim.max_steps=2", echo=hold)


def test_two_trainings_in_one_folder_refuse(lab: Any, children: Any) -> None:
    child = children.start(hold_the_folder, lab)
    while not (lab.folder / "ready").exists():
        assert child.is_alive()
        time.sleep(0.01)
    with pytest.raises(TrainingError, match=f"process {child.pid} on .* is training here"):
        lab.train("a", "optim.max_steps=2")
    child.kill()
    child.join()
    lab.train("a", "optim.max_steps=2")  # the lock of a dead process blocks nobody
