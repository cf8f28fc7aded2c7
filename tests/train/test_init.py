"""A training initialised from another model takes what fits, reports it, and refuses what does not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from asr.errors import CheckpointError
from asr.tokens import train_tokenizer
from asr.train.checkpoint import average_checkpoints, checkpoints, path_of, read_weights

NO_STEP = ("optim.max_steps=1", "optim.lr=0.0")
"""One step that changes no parameter, so the checkpoint has the initial values."""


@pytest.fixture
def other(lab: Any) -> Path:
    """An experiment with an average of its checkpoints."""
    exp_dir, _ = lab.train("other", "optim.max_steps=3", "train.seed=5")
    average_checkpoints(exp_dir, checkpoints(exp_dir))
    return exp_dir


def begun(lab: Any, *overrides: str) -> dict[str, Tensor]:
    """The initial parameters of a training."""
    exp_dir, _ = lab.train("new", *NO_STEP, *overrides)
    return read_weights(path_of(exp_dir, 1) / "model.safetensors")


def line(lab: Any) -> str:
    return next((line for line in lab.log if "tensors from" in line), "")


@pytest.mark.parametrize("name", ["", "average.safetensors"])
def test_a_model_of_the_same_form_is_taken_whole(lab: Any, other: Path, name: str) -> None:
    there = read_weights(other / "average.safetensors")
    fresh = begun(lab)
    shutil.rmtree(lab.folder / "new")
    taken = begun(lab, f"train.init={other / name}")
    assert any(not torch.equal(fresh[key], there[key]) for key in there)
    assert all(torch.equal(taken[key], there[key]) for key in there)
    first = ", ".join(list(there)[:2])
    assert f"tensors from {other}/average.safetensors: {len(there)} taken ({first}, ...), 0 fresh" in line(
        lab
    )
    assert line(lab).endswith("0 fresh, 0 unused")


def test_what_the_other_has_not_is_fresh_and_what_only_it_has_is_unused(lab: Any, other: Path) -> None:
    there = read_weights(other / "average.safetensors")
    more = begun(lab, f"train.init={other}", "encoder.num_layers=2")
    new = [name for name in more if name not in there]
    assert all(name.startswith("encoder.layers.1.") for name in new)
    assert all(torch.equal(more[name], there[name]) for name in there)
    assert f" {len(new)} fresh (encoder.layers.1." in line(lab)
    shutil.rmtree(lab.folder / "new")
    safetensors.torch.save_file(more | {"extra": torch.zeros(1)}, lab.folder / "more.safetensors")
    begun(lab, f"train.init={lab.folder / 'more.safetensors'}")
    assert f"{len(there)} taken" in line(lab)
    assert f"0 fresh, {len(new) + 1} unused (" in line(lab)


@pytest.mark.parametrize("has_cmvn", [True, False])
def test_normalisation_is_taken_or_estimated(lab: Any, other: Path, has_cmvn: bool) -> None:
    weights = read_weights(other / "average.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if has_cmvn or "cmvn" not in name}
    if has_cmvn:
        weights["cmvn.mean"] += 1.0
    safetensors.torch.save_file(weights, lab.folder / "changed.safetensors")
    found = begun(lab, f"train.init={lab.folder / 'changed.safetensors'}")
    expected = weights if has_cmvn else read_weights(other / "average.safetensors")
    torch.testing.assert_close(found["cmvn.mean"], expected["cmvn.mean"])


def test_a_training_that_goes_on_does_not_begin_anew(lab: Any, other: Path) -> None:
    exp_dir, _ = lab.train("new", "optim.max_steps=2", f"train.init={other}")
    before = read_weights(path_of(exp_dir, 2) / "model.safetensors")
    (other / "average.safetensors").unlink()
    lab.train("new", "optim.max_steps=3", "optim.lr=0.0", f"train.init={other}")
    after = read_weights(path_of(exp_dir, 3) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not line(lab)


def test_another_shape_is_refused_with_both(lab: Any, other: Path) -> None:
    message = (
        r"average.safetensors: 1 tensor of another shape, first .*depthwise.weight: .*3\) in the file, "
        r".*5\) in the model; encoder.kernel_size is 3 in the checkpoint, 5 in the configuration"
    )
    with pytest.raises(CheckpointError, match=message):
        begun(lab, f"train.init={other}", "encoder.kernel_size=5")


def test_parts_are_taken_alone(lab: Any, other: Path) -> None:
    """So that a decoder with other sizes can use the encoder."""
    there = read_weights(other / "average.safetensors")
    parts = "train.init_parts=[cmvn, encoder, ctc]"
    new = begun(lab, f"train.init={other}", parts, "decoder.num_layers=2")
    taken = [name for name in there if name.startswith(("cmvn.", "encoder.", "ctc."))]
    assert all(torch.equal(new[name], there[name]) for name in taken)
    assert f"{len(taken)} taken" in line(lab)
    with pytest.raises(CheckpointError, match="nothing to begin with"):
        lab.train("none", *NO_STEP, f"train.init={other}", "train.init_parts=[encodr]")


@pytest.mark.parametrize("name", ["", "average.safetensors", "unnamed"])
def test_other_units_are_refused(lab: Any, other: Path, name: str) -> None:
    if name == "unnamed":  # the folder has what the file lacks
        weights = read_weights(other / "average.safetensors")
        safetensors.torch.save_file(weights, other / "average.safetensors")
        name = ""
    train_tokenizer(iter(["abd"]), "char", 0, lab.folder / "tokens")
    with pytest.raises(
        CheckpointError, match=r"average.safetensors: trained with other units than .*new/tokens"
    ):
        begun(lab, f"train.init={other / name}")


def test_nothing_in_common_and_nothing_there_are_errors(lab: Any, other: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, lab.folder / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a.safetensors: nothing to begin with: none of 1 tensor is in"
    ):
        begun(lab, f"train.init={lab.folder / 'a.safetensors'}")
    with pytest.raises(CheckpointError, match=r"none.safetensors: no such file"):
        begun(lab, f"train.init={lab.folder / 'none.safetensors'}")
    (other / "average.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"average.safetensors: no such file; make it with `asr average"
    ):
        begun(lab, f"train.init={other}")
    (other / "average.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"average.safetensors: not a safetensors file"):
        begun(lab, f"train.init={other}")
