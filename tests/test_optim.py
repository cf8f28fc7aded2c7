"""Schedules have the values of their formulas, and only matrices are decayed."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from asr.errors import ConfigError
from asr.optim import (
    OptimConfig,
    ScaledAdamConfig,
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from asr.scaled_adam import ScaledAdam

NOAM = OptimConfig(lr=2.0, warmup_steps=100, max_steps=1000)
COSINE = OptimConfig(lr=2.0, warmup_steps=100, max_steps=1100, schedule="cosine")


@pytest.mark.parametrize(
    ("config", "step", "lr"),
    [
        (NOAM, 1, 0.02),
        (NOAM, 50, 1.0),
        (NOAM, 100, 2.0),
        (NOAM, 400, 1.0),
        (NOAM, 10_000, 0.2),
        (COSINE, 1, 0.02),
        (COSINE, 100, 2.0),
        (COSINE, 350, 1 + math.sqrt(0.5)),
        (COSINE, 600, 1.0),
        (COSINE, 1100, 0.0),
        (COSINE, 2000, 0.0),
    ],
)
def test_schedules(config: OptimConfig, step: int, lr: float) -> None:
    assert learning_rate(step, config) == pytest.approx(lr)


def test_norms_and_biases_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Conv2d(1, 1, 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        share = 0.95 if name in ("0.weight", "2.weight") else 1.0
        torch.testing.assert_close(p.detach(), share * before[name])


def test_the_first_step_is_as_long_as_the_learning_rate() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.0))
    set_learning_rate(optimizer, 0.125)
    before = model.weight.item()
    model.weight.grad = torch.full((1, 1), 7.0)
    optimizer.step()
    assert before - model.weight.item() == pytest.approx(0.125, rel=1e-4)


@pytest.mark.parametrize(
    "field", [{"warmup_steps": 0}, {"max_steps": 0}, {"accumulate": 0}, {"betas": [0.9]}]
)
def test_values_that_cannot_be_are_refused(field: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(field))):
        OptimConfig(**field)


EDEN = OptimConfig(lr=2.0, warmup_steps=100, schedule="eden", lr_batches=200, lr_epochs=3)


@pytest.mark.parametrize(
    ("step", "epoch", "share"),
    [
        (0, 0, 0.5),
        (50, 0, 0.75 * 1.0625**-0.25),
        (200, 0, 2**-0.25),
        (200, 3, 2**-0.5),
        (0, 3, 0.5 * 2**-0.25),
    ],
)
def test_eden_falls_with_steps_and_with_epochs(step: int, epoch: int, share: float) -> None:
    assert learning_rate(step, EDEN, epoch) == pytest.approx(2 * share, rel=1e-12)


def test_only_eden_knows_epochs() -> None:
    assert all(learning_rate(7, config, 5) == learning_rate(7, config) for config in (NOAM, COSINE))


@pytest.fixture(scope="module")
def reference(golden_folder: Callable[[str], Path]) -> tuple[dict, dict[str, np.ndarray]]:
    folder = golden_folder("icefall_zipformer2_training")
    with np.load(folder / "io.npz") as arrays:
        return json.loads((folder / "config.json").read_text()), dict(arrays)


def test_eden_is_that_of_the_reference(reference: tuple[dict, dict[str, np.ndarray]]) -> None:
    options = dict(reference[0]["eden"])
    lr, warmup = options.pop("base_lr"), int(options.pop("warmup_batches"))
    config = ScaledAdamConfig(lr=lr, warmup_steps=warmup, **options)
    for step, epoch, expected in reference[1]["eden.table"].tolist():
        assert learning_rate(int(step), config, int(epoch)) == pytest.approx(expected, rel=1e-12)


def test_which_optimizer_is_built() -> None:
    model = nn.Linear(2, 3)
    assert isinstance(build_optimizer(model, OptimConfig()), torch.optim.AdamW)
    assert isinstance(build_optimizer(model, ScaledAdamConfig()), ScaledAdam)


def test_clipping_is_that_of_the_optimizer() -> None:
    """AdamW clips at a fixed norm, ScaledAdam relative to the median norm, which is missing at first."""
    for config, length in ((OptimConfig(clip_norm=0.5), 0.5), (ScaledAdamConfig(clip_norm=0.5), 6.0)):
        model = nn.Linear(3, 3, bias=False)
        optimizer = build_optimizer(model, config)
        model.weight.grad = torch.full((3, 3), 2.0)
        rms = model.weight.square().mean().sqrt().item() if config.type == "scaled-adam" else 1.0
        assert clip_gradients(optimizer, config).item() == pytest.approx(6 * rms)
        assert model.weight.grad.norm().item() == pytest.approx(length)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"weight_decay": 0.1}, "weight_decay is 0.1; scaled-adam has none"),
        ({"betas": [0.0, 0.98]}, "needs a momentum, the first above 0"),
        ({"lr_batches": 0}, "lr_batches is 0; expected more than 0"),
        ({"lr_epochs": -1.0}, "lr_epochs is -1.0; expected more than 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; expected more than 0"),
        ({"warmup_start": 1.5}, "warmup_start is 1.5; expected a share"),
        ({"warmup_steps": 0}, "warmup_steps is 0; expected at least 1"),
    ],
)
def test_values_that_cannot_be_are_refused_of_scaled_adam_too(field: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScaledAdamConfig(**field)
