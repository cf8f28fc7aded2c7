"""ScaledAdam: updates are proportional to the size of a tensor, which is learnt (arXiv:2310.11230, 3.5).

    v <- b2 v + (1 - b2) g^2          r: root mean square of the tensor's values
    d = -lr r g / (sqrt(v) + eps)     and in every fourth step, for its scale, d += p s
    m <- b1 m + (1 - b1) d            p <- p + m

s is an Adam step along the direction in which p grows: from the sums of p g of four steps, at a tenth of the
rate. r is also updated in every fourth step only, so that m / r, which the state holds, moves like parameters
of AdamW with weight decay: that kernel does most of the work, for all tensors at once. A tensor of one
element has no scale: it moves as in Adam, at a tenth of the rate.

P tensors
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PERIOD = 4
"""Steps from one scale step to the next."""
SCALAR_RATE = 0.1
"""The share of the learning rate for scales and for tensors of one element."""
MAX_SCALE_STEP = 0.1
MAX_SCALAR = 10.0
MIN_RMS, MAX_RMS = 1e-5, 3.0
UNBIASED = 0.99
"""From here on, 1 - b2^step is treated as 1."""
EPS = 1e-8
NORMS = 100
"""Gradient norms to remember, and steps between updates of their median."""
EARLY = (10, 20, 40)
"""Earlier steps at which the median is updated."""


class ScaledAdam(torch.optim.Optimizer):
    """The optimizer, with one parameter group; missing gradients count as 0. Call `clip` before `step`."""

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        first: dict[str, Any] = {"step": 0, "norms": [], "threshold": math.inf}
        super().__init__(params, {"lr": lr, "betas": betas, **first})
        self._sizes: Tensor | None = None

    @torch.no_grad()
    def clip(self, multiple: float) -> Tensor:
        """Scale gradients down to `multiple` times the median of the last 100 norms. Returns the norm.

        The norm is that of all gradients, each times the size of its tensor, as the update is relative to it.
        Nothing is clipped before step 10, and steps 10 to 100 allow twice as much. A norm that is not finite
        is returned, but neither clipped nor remembered.
        """
        group, grads = self.param_groups[0], self._gradients()
        self._prepare()
        norm = (torch.stack(torch._foreach_norm(grads)) * self._units).norm()
        length, step, norms = norm.item(), group["step"], group["norms"]
        if step == 0 or not math.isfinite(length):
            return norm
        group["norms"] = norms = [*norms, length][-NORMS:]
        if step in EARLY or step % NORMS == 0:
            recent = sorted(norms[-step:])
            median = recent[2 * (len(recent) // 4)]
            group["threshold"] = (2 if step in EARLY else 1) * median
        if length > multiple * group["threshold"]:
            torch._foreach_mul_(grads, multiple * group["threshold"] / length)
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        group, grads = self.param_groups[0], self._gradients()
        params, (b1, b2) = group["params"], group["betas"]
        self._prepare()
        place = group["step"] % PERIOD
        self._slopes[:, place] = _dots(params, grads)
        if place == PERIOD - 1:
            self._step_scales()
        lr = max(group["lr"] * (1 - b1), 1e-30)
        torch._fused_adamw_(
            self._momenta,
            grads,
            grads,  # with beta1 = 0, the mean of the gradients is the gradient
            self._seconds,
            [],
            self._steps_to_unbias(b2),
            lr=lr,
            beta1=0.0,
            beta2=b2,
            weight_decay=(1 - b1) / lr,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )
        for scalar in self._scalars:
            scalar.clamp_(-MAX_SCALAR, MAX_SCALAR)
        _add(params, self._momenta, self._scales)
        group["step"] += 1

    def _steps_to_unbias(self, b2: float) -> list[Tensor]:
        """The step for the kernel, one per tensor; infinite for no bias correction of v."""
        step, device = self.param_groups[0]["step"] + 1, self._rms.device
        unbiased = math.inf if 1 - b2**step >= UNBIASED else step
        scalar, other = (torch.full((), float(value), device=device) for value in (step, unbiased))
        return [scalar if is_scalar else other for is_scalar in self._scalar_flags]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._sizes = None

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.param_groups[0]["params"]]

    def _prepare(self) -> None:
        """Create the state of every tensor. Its `size` is a row of one table (P, 2 + PERIOD): the root mean
        square, the running mean of squared slopes, and the slopes p . g of the last steps."""
        if self._sizes is not None:
            return
        params = self.param_groups[0]["params"]
        if not self.state:
            table = torch.zeros(len(params), 2 + PERIOD, device=params[0].device)
            table[:, 0] = _rms(params)
            for p, size in zip(params, table, strict=True):
                moments = {name: torch.zeros_like(p) for name in ("exp_avg_sq", "momentum")}
                self.state[p] = {**moments, "size": size}
        self._sizes = torch.stack([self.state[p]["size"] for p in params])
        for p, size in zip(params, self._sizes, strict=True):
            self.state[p]["size"] = size
        self._rms, self._squares = self._sizes[:, 0], self._sizes[:, 1]
        self._slopes = self._sizes[:, 2:]
        self._momenta = [self.state[p]["momentum"] for p in params]
        self._seconds = [self.state[p]["exp_avg_sq"] for p in params]
        self._scalar_flags = [p.numel() == 1 for p in params]
        self._is_scalar = torch.tensor(self._scalar_flags, device=self._sizes.device)
        self._scalars = [p for p in params if p.numel() == 1]
        self._set_units()

    def _set_units(self) -> None:
        """Set the factor (P,) by which each tensor's momentum is added to it."""
        self._units = torch.where(self._is_scalar, SCALAR_RATE, self._rms.clamp(min=MIN_RMS))
        self._scales = self._units.tolist()

    def _step_scales(self) -> None:
        """Update the sizes of all tensors, express momenta in units of them, and add the scale steps."""
        group, before = self.param_groups[0], self._units
        params, (b1, b2) = group["params"], group["betas"]
        self._rms.copy_(_rms(params))
        self._set_units()
        decay = b2**PERIOD
        self._squares.mul_(decay).add_(self._slopes.square().mean(1), alpha=1 - decay)
        unbias = math.sqrt(1 - decay ** ((group["step"] + 1) // PERIOD))
        growth = -group["lr"] * SCALAR_RATE * unbias * self._slopes.sum(1) / (self._squares.sqrt() + EPS)
        growth = growth.clamp(-MAX_SCALE_STEP, MAX_SCALE_STEP)
        growth = torch.minimum(growth, (MAX_RMS - self._rms) / self._rms)
        growth = torch.where(self._is_scalar | (self._rms < MIN_RMS), 0.0, growth)
        # the kernel will multiply by b1 what is added here
        added = growth * (1 - b1) / (b1 * self._units)
        _scale_and_add(self._momenta, (before / self._units).tolist(), params, added.tolist())


def _rms(tensors: list[Tensor]) -> Tensor:
    """Root mean square of the values of each tensor (P,)."""
    sizes = torch.tensor([tensor.numel() for tensor in tensors], device=tensors[0].device)
    return torch.stack(torch._foreach_norm(tensors)) / sizes.sqrt()


def _dots(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """x . y of each pair (P,): with few passes over memory on a CPU, few kernels on a GPU."""
    if _is_cpu(xs):
        return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(xs, ys, strict=True)])
    products = torch._foreach_mul(xs, ys)
    absolute = torch.stack(torch._foreach_norm(products, 1))
    torch._foreach_clamp_min_(products, 0.0)
    return 2 * torch.stack(torch._foreach_norm(products, 1)) - absolute


def _add(xs: list[Tensor], ys: list[Tensor], scales: list[float]) -> None:
    """x += scale * y for each pair."""
    if _is_cpu(xs):
        for x, y, scale in zip(xs, ys, scales, strict=True):
            x.add_(y, alpha=scale)
    else:
        torch._foreach_add_(xs, torch._foreach_mul(ys, scales))


def _scale_and_add(xs: list[Tensor], factors: list[float], ys: list[Tensor], scales: list[float]) -> None:
    """x = factor * x + scale * y for each pair."""
    if _is_cpu(xs):
        for x, factor, y, scale in zip(xs, factors, ys, scales, strict=True):
            x.mul_(factor).add_(y, alpha=scale)
    else:
        torch._foreach_mul_(xs, factors)
        torch._foreach_add_(xs, torch._foreach_mul(ys, scales))


def _is_cpu(tensors: list[Tensor]) -> bool:
    return tensors[0].device.type == "cpu"
