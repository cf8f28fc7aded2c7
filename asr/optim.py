"""How parameters move: AdamW, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from asr.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) with a warm-up. The defaults are for some hundred hours of speech."""

    type: Literal["adamw"] = "adamw"

    lr: float = 1e-3
    """The highest learning rate, reached at the end of the warm-up."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay of the running mean of the gradient and of its square."""

    weight_decay: float = 0.01
    """Of matrices and kernels; norms and biases are not decayed."""

    schedule: Literal["noam", "cosine"] = "noam"
    """After the warm-up: `noam` falls as 1 / sqrt(step), `cosine` to zero at max_steps."""

    warmup_steps: int = 2000
    """Steps of linear rise."""

    max_steps: int = 100_000
    """Training ends here."""

    clip_norm: float = 5.0
    """Longer gradients are shortened to this length."""

    accumulate: int = 1
    """Batches of each device whose gradients are added up for one step: a larger batch in the same memory."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; expected two numbers of at least 0 and below 1")
        for name in ("warmup_steps", "max_steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")


def noam(step: int, config: OptimConfig) -> float:
    """The share of the highest rate at a step, from 1 on (arXiv:1706.03762, with the peak set by hand)."""
    return min(step / config.warmup_steps, math.sqrt(config.warmup_steps / step))


def cosine(step: int, config: OptimConfig) -> float:
    """The share of the highest rate at a step, from 1 on: half a cosine after the rise (arXiv:1608.03983)."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


SCHEDULES: dict[str, Callable[[int, OptimConfig], float]] = {"noam": noam, "cosine": cosine}


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of step 1, 2, ..."""
    return config.lr * SCHEDULES[config.schedule](step, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of a model that is already on its device, one fused kernel per step.

    Vectors, which is what norms and biases are, are not decayed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), fused=True)
