"""Regularisers of activations: identities whose backward pass adds the gradient of a penalty.

Zipformer trains with them (arXiv:2310.11230, section 3.4). Penalties scale with the incoming gradient, so
their effect does not depend on the scale of the loss. They act in random steps only, with a probability that
may follow a schedule. In evaluation, without gradients, and thus in an exported graph, they vanish.

N utterances · T frames · C channels
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from asr.model.schedule import Schedule, at

TINY = 1e-20


def happens(probability: float) -> bool:
    """True with this probability. Draws from torch's CPU generator, so nothing waits for a device, and
    activation checkpointing repeats the draw when it recomputes."""
    return torch.rand(()).item() < probability


class Balancer(nn.Module):
    """Limits the share of positive values and the mean absolute value of each channel.

    The limits apply to proxies with useful gradients: mean / standard deviation for the share, and root mean
    square for the mean absolute value, converted as for normally distributed values.
    """

    def __init__(
        self,
        channel_dim: int = -1,
        *,
        min_positive: float | Schedule = 0.05,
        max_positive: float | Schedule = 0.95,
        min_abs: float | Schedule = 0.2,
        max_abs: float | Schedule = 100.0,
        grad_scale: float | Schedule = 0.04,
        prob: float | Schedule = Schedule((0, 0.5), (8000, 0.125)),  # noqa: B008  # it never changes
    ) -> None:
        super().__init__()
        self.batch_count = 0.0
        self.channel_dim = channel_dim
        self.limits = (min_positive, max_positive, min_abs, max_abs)
        self.grad_scale = grad_scale
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        """x, any shape -> x."""
        now = self.batch_count
        if not (self.training and x.requires_grad and happens(at(self.prob, now))):
            return x
        low, high, least, most = (at(limit, now) for limit in self.limits)
        limits = (mean_over_std(low), mean_over_std(high), rms_of_abs(least), rms_of_abs(most))
        return _Balance.apply(x, limits, at(self.grad_scale, now), self.channel_dim)


def mean_over_std(positive: float) -> float:
    """The mean / standard deviation that stands for a share of positive values: -inf for 0, inf for 1.

    An approximation of the normal quantile, which is 1.2 to 1.5 times as large.
    """
    if not 0 < positive < 1:
        return math.copysign(math.inf, positive - 0.5)
    return 0.8139535143 * math.atanh(2 * positive - 1)


def rms_of_abs(mean_abs: float) -> float:
    """The root mean square of normally distributed values of this mean absolute value: sqrt(pi / 2) of it."""
    return math.sqrt(math.pi / 2) * mean_abs


def imbalance(x: Tensor, limits: tuple[float, float, float, float], channel_dim: int) -> Tensor:
    """How far each channel (C,) is outside the limits: m = mean / standard deviation as a difference, plus
    the root mean square as the logarithm of a ratio. limits: least and most m, least and most rms."""
    low, high, least, most = limits
    others = [dim for dim in range(x.dim()) if dim != channel_dim % x.dim()]
    mean, square = x.mean(others), x.square().mean(others)
    m = mean / (square - mean.square()).clamp(min=TINY).sqrt()
    rms = square.clamp(min=TINY).sqrt()
    return (m - m.clamp(low, high)).abs() + (rms.clamp(least, most) / rms).log().abs()


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, limits: tuple[float, ...], grad_scale: float, channel_dim: int
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = limits, grad_scale, channel_dim
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        limits, grad_scale, channel_dim = ctx.options
        _, penalty = _gradient(lambda x: imbalance(x, limits, channel_dim).sum(), ctx.saved_tensors[0])
        others = [dim for dim in range(grad.dim()) if dim != channel_dim % grad.dim()]
        rms = penalty.square().mean(others, keepdim=True).sqrt().clamp(min=TINY)
        shaped = grad.float() + grad.float().abs() * penalty * (grad_scale / rms)
        return shaped.to(grad.dtype), None, None, None


class Whitener(nn.Module):
    """Limits how far the variance of activations concentrates in a few directions.

    limit: of `whiteness`, which is 1 if the covariance is a multiple of the identity.  probs: how often it
    checks while the limit holds, and how often once the limit is exceeded, until it holds again.
    """

    def __init__(
        self,
        num_groups: int,
        limit: float | Schedule,
        probs: tuple[float, float] = (0.025, 0.25),
        grad_scale: float | Schedule = 0.01,
    ) -> None:
        super().__init__()
        self.batch_count = 0.0
        self.num_groups = num_groups
        self.limit = limit
        self.probs = probs
        self.grad_scale = grad_scale
        self.alarm = True
        """Whether the last check exceeded the limit; training saves it, see `alarms`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> x."""
        if not (self.training and x.requires_grad and happens(self.probs[self.alarm])):
            return x
        return _Whiten.apply(x, self)


def whiteness(x: Tensor, num_groups: int) -> Tensor:
    """Mean of the squared eigenvalues / squared mean of the eigenvalues of the covariance of x (..., C).

    Each group of channels has its own covariance; the means are over all groups. At least 1.
    """
    frames = x.reshape(-1, num_groups, x.shape[-1] // num_groups).transpose(0, 1)
    centred = frames - frames.mean(1, keepdim=True)
    scatter = centred.transpose(1, 2) @ centred
    mean_square = scatter.square().sum() / x.shape[-1]
    return mean_square / (scatter.diagonal(dim1=1, dim2=2).mean().square() + TINY)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, whitener: Whitener) -> Tensor:
        ctx.save_for_backward(x)
        ctx.whitener = whitener
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own, now = ctx.whitener, ctx.whitener.batch_count
        value, penalty = _gradient(lambda x: whiteness(x, own.num_groups), ctx.saved_tensors[0])
        own.alarm = value >= at(own.limit, now)
        if not own.alarm:
            return grad, None
        share = at(own.grad_scale, now) * grad.float().norm() / (penalty.norm() + TINY)
        return grad + (share * penalty).to(grad.dtype), None


def _gradient(penalty: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    """A penalty on x and its gradient, in float32 whatever the dtype of x."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().float().requires_grad_()
        value = penalty(x)
        (gradient,) = torch.autograd.grad(value, x)
    return value.item(), gradient


def alarms(model: nn.Module) -> list[bool]:
    """The states of all whiteners of a model, for a checkpoint."""
    return [module.alarm for module in model.modules() if isinstance(module, Whitener)]


def restore_alarms(model: nn.Module, states: list[bool]) -> None:
    whiteners = [module for module in model.modules() if isinstance(module, Whitener)]
    for whitener, alarm in zip(whiteners, states, strict=True):
        whitener.alarm = alarm


def penalize_abs_values_gt(x: Tensor, limit: float, penalty: float) -> Tensor:
    """x itself; in the backward pass, each |value| above `limit` adds `penalty` times its excess to the loss.

    The penalty is not normalised: if the loss is divided by a number of tokens, divide the penalty, too.
    """
    return _Penalise.apply(x, limit, penalty)


class _Penalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: float) -> Tensor:
        ctx.save_for_backward((x.sign() * (x.abs() > limit)).to(torch.int8))
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad + ctx.penalty * ctx.saved_tensors[0], None, None


def limit_param_value(x: Tensor, low: float, high: float) -> Tensor:
    """x itself, a parameter to pull back into [low, high]: a gradient that would move a value further out is
    negated. If that is not urgent, call it in some steps only."""
    return _Limit.apply(x, low, high)


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.limits
        outwards = ((grad > 0) & (x < low)) | ((grad < 0) & (x > high))
        return torch.where(outwards, -grad, grad), None, None
