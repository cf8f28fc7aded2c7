"""The head that counts words, in experiments: added, saved, averaged, loaded; and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from asr.errors import ConfigError
from asr.tokens import train_tokenizer
from asr.train.checkpoint import average_checkpoints, checkpoints, load_model, path_of, read_weights

FIRE = "loss.quantity=0.01"


@pytest.fixture
def spaced(lab: Any) -> Any:
    """Units with a space, which separates words."""
    train_tokenizer(iter(["ab c", "ba"]), "char", 0, lab.folder / "spaced")
    lab.spaced = f"data.tokens={lab.folder / 'spaced'}"
    return lab


def weights_of(exp_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return read_weights(path_of(exp_dir, step) / "model.safetensors")


def test_units_that_do_not_part_words_are_refused(lab: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss\.quantity: .*data\.tokens do not say where they begin; set"):
        lab.train("refused", FIRE, "optim.max_steps=1")
    lab.train("plain", "optim.max_steps=1")


def test_it_is_trained_saved_averaged_and_read_again(spaced: Any) -> None:
    lab = spaced
    exp_dir, _ = lab.train("fired", FIRE, lab.spaced, "optim.max_steps=3", "train.ema=0.9")
    exp_dir, _ = lab.train("fired", FIRE, lab.spaced, "optim.max_steps=6", "train.ema=0.9")
    assert any("resuming" in line for line in lab.log)
    found = [weights_of(exp_dir, step) for step in (3, 6)]
    assert not torch.equal(found[0]["fire.weight"], found[1]["fire.weight"])
    assert {name for name in found[0] if name.startswith("fire.")} == {"fire.weight", "fire.bias"}
    average_checkpoints(exp_dir, checkpoints(exp_dir))
    model, _, _ = load_model(exp_dir)
    assert model.fire is not None
    expected = (found[0]["fire.weight"] + found[1]["fire.weight"]) / 2
    torch.testing.assert_close(model.fire.weight.detach(), expected)


def test_it_can_be_added_to_a_model_that_is_there(spaced: Any) -> None:
    lab = spaced
    other, _ = lab.train("other", lab.spaced, "optim.max_steps=2")
    average_checkpoints(other, checkpoints(other))
    new, _ = lab.train("new", FIRE, lab.spaced, f"train.init={other}", "optim.max_steps=1", "optim.lr=0.0")
    assert any("2 fresh (fire.weight, fire.bias)" in line for line in lab.log)
    there, here = read_weights(other / "average.safetensors"), weights_of(new, 1)
    assert set(here) - set(there) == {"fire.weight", "fire.bias"}
    assert all(torch.equal(here[name], there[name]) for name in there)


def test_a_first_step_of_everything_else_is_the_same(spaced: Any) -> None:
    """Without gradient clipping, and if no random number is drawn after the head's."""
    lab = spaced
    quiet = (lab.spaced, "optim.max_steps=2", "optim.clip_norm=1e9")
    plain, _ = lab.train("plain", *quiet)
    fired, _ = lab.train("fired", FIRE, *quiet)
    a, b = weights_of(plain, 2), weights_of(fired, 2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert b["fire.weight"].any()
