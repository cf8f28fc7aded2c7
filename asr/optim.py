"""Optimizers: AdamW or ScaledAdam, with the learning rate as a pure function of step and epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from asr.errors import ConfigError
from asr.scaled_adam import ScaledAdam


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv:1711.05101) with a warm-up. The defaults are for a few hundred hours of speech."""

    type: Literal["adamw", "scaled-adam"] = "adamw"

    lr: float = 1e-3
    """The peak learning rate, at the end of the warm-up."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay of the running means of the gradient and of its square."""

    weight_decay: float = 0.01
    """Weight decay of matrices and kernels; norms and biases are not decayed."""

    schedule: Literal["noam", "cosine", "eden"] = "noam"
    """After the warm-up: `noam` falls as 1 / sqrt(step), `cosine` to zero at max_steps, `eden` with steps and
    epochs, eventually as 1 / sqrt(step * epoch)."""

    warmup_steps: int = 2000
    """Steps of linear warm-up."""

    warmup_start: float = 0.5
    """Eden: the share of the rate at which the warm-up starts; other schedules start at 0."""

    lr_batches: float = 7500
    """Eden: the number of steps at which the rate starts to fall."""

    lr_epochs: float = 3.5
    """Eden: the number of epochs at which the rate starts to fall. Only whole epochs count, from 0 on."""

    max_steps: int = 100_000
    """Training ends here."""

    clip_norm: float = 5.0
    """Gradients with a larger norm are scaled down to this norm."""

    accumulate: int = 1
    """Batches per device whose gradients are summed for one step: a larger batch in the same memory."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; expected two numbers of at least 0 and below 1")
        for name in ("warmup_steps", "max_steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.lr >= 0:
            raise ConfigError(f"lr is {self.lr}; expected 0 or more")
        for name in ("clip_norm", "lr_batches", "lr_epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")
        if not 0 <= self.warmup_start <= 1:
            raise ConfigError(f"warmup_start is {self.warmup_start}; expected a share between 0 and 1")


@dataclass(kw_only=True, slots=True)
class ScaledAdamConfig(OptimConfig):
    """ScaledAdam (asr/scaled_adam.py) with Eden (arXiv:2310.11230). The defaults are for 960 hours.

    Fields shared with AdamW have the same meaning, except as documented here. The rate is relative to the
    size of each tensor, and thus some forty times that of AdamW.
    """

    type: Literal["adamw", "scaled-adam"] = "scaled-adam"

    lr: float = 0.045

    weight_decay: float = 0.0
    """Must be 0: the size of each tensor is learnt."""

    schedule: Literal["noam", "cosine", "eden"] = "eden"

    warmup_steps: int = 500

    clip_norm: float = 2.0
    """Gradients with a norm above this multiple of the recent median are scaled down to it. The norm is that
    of all gradients, each times the size of its tensor."""

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        if not self.betas[0]:
            raise ConfigError(f"betas is {self.betas}; scaled-adam needs a momentum, the first above 0")
        if self.weight_decay:
            raise ConfigError(
                f"weight_decay is {self.weight_decay}; scaled-adam has none, as it learns the size of each "
                "tensor; leave it out or set it to 0"
            )


OPTIMIZERS = {"adamw": OptimConfig, "scaled-adam": ScaledAdamConfig}
"""The first is the default."""


def noam(step: int, epoch: int, config: OptimConfig) -> float:
    """The share of the peak rate at a step, from 1 on (arXiv:1706.03762, with an explicit peak)."""
    return min(step / config.warmup_steps, math.sqrt(config.warmup_steps / step))


def cosine(step: int, epoch: int, config: OptimConfig) -> float:
    """The share of the peak rate at a step, from 1 on: half a cosine after the warm-up (arXiv:1608.03983)."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def eden(step: int, epoch: int, config: OptimConfig) -> float:
    """The share of the base rate at a step, from 1 on, in an epoch, from 0 on (arXiv:2310.11230, 3.5)."""
    start = config.warmup_start
    warm = start + (1 - start) * min(1.0, step / config.warmup_steps)
    fallen = (1 + (step / config.lr_batches) ** 2) * (1 + (epoch / config.lr_epochs) ** 2)
    return warm * fallen**-0.25


SCHEDULES: dict[str, Callable[[int, int, OptimConfig], float]] = {
    "noam": noam,
    "cosine": cosine,
    "eden": eden,
}


def learning_rate(step: int, config: OptimConfig, epoch: int = 0) -> float:
    """The learning rate of step 1, 2, ..., whose data is from epoch 0, 1, ..."""
    return config.lr * SCHEDULES[config.schedule](step, epoch, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(optimizer: torch.optim.Optimizer, config: OptimConfig) -> Tensor:
    """Clip gradients by config.clip_norm. Returns their norm before clipping."""
    if isinstance(optimizer, ScaledAdam):
        return optimizer.clip(config.clip_norm)
    return clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], config.clip_norm)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer for a model that is already on its device; few kernels per step.

    AdamW does not decay vectors, that is, norms and biases.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    first, second = config.betas
    if isinstance(config, ScaledAdamConfig):
        return ScaledAdam(parameters, lr=config.lr, betas=(first, second))
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), fused=True)
