"""Schedules have the values of their formulas, and only matrices are decayed."""

import math

import pytest
import torch
from torch import nn

from asr.errors import ConfigError
from asr.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate

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
