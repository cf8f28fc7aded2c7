"""ScaledAdam equals the reference, its formulas for one tensor at a time, and itself after a resume."""

import io
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asr.scaled_adam import ScaledAdam, _add, _dots, _scale_and_add

SHAPES = [(6, 5), (6, 5), (7,), (4, 2, 3), (), (1,), (5, 3), (3, 4), (2, 2)]
SIZES = [0.2, 0.7, 0.05, 0.3, 0.5, 9.99, 1e-6, 3.3, 0.0]


def parameters() -> list[nn.Parameter]:
    numbers = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(size * torch.randn(shape, generator=numbers))
        for shape, size in zip(SHAPES, SIZES, strict=True)
    ]


def gradients(steps: range) -> Iterator[list[Tensor]]:
    """The gradients of each step; every 13th are twenty times as large."""
    for step in steps:
        numbers = torch.Generator().manual_seed(100 + step)
        scale = 20.0 if step % 13 == 12 else 1.0
        yield [scale * (torch.randn(shape, generator=numbers) + 0.3) for shape in SHAPES]


def walk(optimizer: ScaledAdam, steps: range, clip: float = 2.0) -> None:
    params = optimizer.param_groups[0]["params"]
    for grads in gradients(steps):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.clip(clip)
        optimizer.step()


class Plain:
    """The formulas in double precision, without clipping."""

    def __init__(self, p: Tensor) -> None:
        self.p = p.detach().double()
        self.m = self.v = torch.zeros_like(self.p)
        self.size, self.slopes, self.square, self.count = self.rms(), [], 0.0, 0

    def rms(self) -> float:
        return self.p.square().mean().sqrt().item()

    def step(self, g: Tensor, lr: float, b1: float = 0.9, b2: float = 0.98) -> None:
        g, self.count = g.double(), self.count + 1
        self.v = b2 * self.v + (1 - b2) * g**2
        unbias = 1 - b2**self.count
        if self.p.numel() == 1:
            d = -0.1 * lr * g / ((self.v / unbias).sqrt() + 1e-8)
            self.p = self.p.clamp(-10, 10)
        else:
            self.slopes.append((self.p * g).sum().item())
            growth = self.growth(lr, b2**4) if self.count % 4 == 0 else 0.0
            v = self.v / (unbias if unbias < 0.99 else 1)
            d = -lr * max(self.size, 1e-5) * g / (v.sqrt() + 1e-8) + growth * self.p
        self.m = b1 * self.m + (1 - b1) * d
        self.p = self.p + self.m

    def growth(self, lr: float, decay: float) -> float:
        self.size, last = self.rms(), self.slopes[-4:]
        self.square = decay * self.square + (1 - decay) * sum(s * s for s in last) / 4
        unbiased = math.sqrt(self.square / (1 - decay ** (self.count // 4)))
        if self.size < 1e-5:
            return 0.0
        step = -0.1 * lr * sum(last) / (unbiased + 1e-8)
        return min(max(step, -0.1), 0.1, (3 - self.size) / self.size)


@pytest.mark.parametrize("lr", [0.045, 0.3])
def test_it_moves_as_the_formulas_say_tensor_by_tensor(lr):
    params = parameters()
    plain = [Plain(p) for p in params]
    optimizer = ScaledAdam(params, lr)
    for count, grads in enumerate(gradients(range(260))):  # after step 228 v is unbiased
        for p, one, grad in zip(params, plain, grads, strict=True):
            p.grad = grad
            one.step(grad, lr)
        optimizer.step()
        if count in (0, 1, 3, 4, 20, 227, 228, 259):
            for p, one in zip(params, plain, strict=True):
                torch.testing.assert_close(p.detach().double(), one.p, rtol=1e-4, atol=4e-5 * lr)


def test_it_moves_as_the_reference_does(golden_folder):
    folder = golden_folder("icefall_zipformer2_training")
    config = json.loads((folder / "config.json").read_text())["scaled_adam"]
    with np.load(folder / "io.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if "scaled_adam" in name}
    begin = {name: arrays[f"scaled_adam.param.{name}.init"] for name in config["shapes"]}
    last, saved = config["save"][-1], config["save"]
    if all(torch.equal(p, arrays[f"scaled_adam.param.{name}.after{last}"]) for name, p in begin.items()):
        begin, saved = drawn_again(config["shapes"], end=begin), [last]
    params = {name: nn.Parameter(p.clone()) for name, p in begin.items()}
    optimizer = ScaledAdam(params.values(), config["lr"], tuple(config["betas"]))
    for step in range(config["steps"]):
        for name, p in params.items():
            p.grad = arrays[f"scaled_adam.grad.{name}"][step].clone()
        optimizer.clip(config["clipping_scale"])
        optimizer.step()
        for name, p in params.items() if step + 1 in saved else ():
            expected = arrays[f"scaled_adam.param.{name}.after{step + 1}"]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


def drawn_again(shapes, end):
    """The beginning of a set that gives its end in place of it: normal numbers of a small seed, in order.

    No tensor moves far, so the right ones resemble the end."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        begin = {
            name: torch.randn(shape, generator=generator) * scale if scale else torch.zeros(shape)
            for name, (shape, scale) in shapes.items()
        }
        names = [name for name, (_, scale) in shapes.items() if scale > 1e-3]
        both = [torch.cat([x[name].flatten() / shapes[name][1] for name in names]) for x in (begin, end)]
        if torch.corrcoef(torch.stack(both))[0, 1] > 0.8:
            return begin
    pytest.skip("what the set says of the beginning is what it says of the end")


def test_a_tensor_that_has_become_too_large_shrinks():
    p = nn.Parameter(torch.full((8,), 3.3))
    optimizer = ScaledAdam([p], 1e-6)
    for _ in range(24):
        p.grad = torch.randn(8)
        optimizer.step()
    assert p.square().mean().sqrt() < 3


def test_the_first_step_scales_with_the_tensor():
    """A tensor k times as large with a gradient of 1 / k moves k times as far."""
    steps = []
    for k in (1.0, 8.0):
        p = nn.Parameter(k * torch.linspace(-0.3, 0.2, 12))
        before = p.detach().clone()
        p.grad = torch.arange(12) / k
        ScaledAdam([p], 0.045).step()
        steps.append((p.detach() - before) / k)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-7)
    assert steps[0].any()


def lengths(optimizer: ScaledAdam, factors: list[float]) -> list[float]:
    """The norms of gradients after clipping, relative to that of an ordinary one."""
    p = optimizer.param_groups[0]["params"][0]
    found = []
    for factor in factors:
        p.grad = torch.full_like(p, factor)
        optimizer.clip(2.0)
        found.append(p.grad[0].item())
        optimizer.step()
    return found


def test_long_gradients_are_shortened_to_twice_the_median():
    """Never before step 10; to four times it until step 100; then the median is that of the last hundred."""
    ordinary = [1.0] * 8
    found = lengths(
        ScaledAdam([nn.Parameter(torch.ones(4))], 0.0),
        [9.0, *ordinary, 9.0, 9.0, 3.0, *[1.0] * 80, 9.0, *[1.0] * 7, 3.0, 1.0, 0.5],
    )
    expected = [9.0, *ordinary, 9.0, 4.0, 3.0, *[1.0] * 80, 4.0, *[1.0] * 7, 2.0, 1.0, 0.5]
    assert len(found) > 101
    assert found == pytest.approx(expected)


def test_the_median_is_of_what_was_remembered():
    """The norms of steps 1 to 10: 5 is their element 2 (10 // 4) when sorted."""
    optimizer = ScaledAdam([nn.Parameter(torch.ones(4))], 0.0)
    found = lengths(optimizer, [100.0, 10.0, 3.0, 1.0, 9.0, 2.0, 5.0, 8.0, 7.0, 6.0, 4.0, 50.0])
    assert found[-2:] == pytest.approx([4.0, 2 * 2 * 5.0])


def test_what_is_not_finite_is_neither_shortened_nor_remembered():
    optimizer = ScaledAdam([nn.Parameter(torch.ones(4))], 0.0)
    lengths(optimizer, [1.0] * 11)
    (p,) = optimizer.param_groups[0]["params"]
    before = list(optimizer.param_groups[0]["norms"])
    p.grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
    assert not optimizer.clip(2.0).isfinite()
    assert optimizer.param_groups[0]["norms"] == before
    assert optimizer.param_groups[0]["threshold"] == pytest.approx(4)


@pytest.mark.parametrize("stop", [1, 3, 4, 14, 107])
def test_resumed_equals_uninterrupted(stop):
    """From a file without code, bit-exact, wherever it stops."""
    whole = ScaledAdam(parameters(), 0.045)
    walk(whole, range(stop))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    walk(whole, range(stop, stop + 9))
    begun = ScaledAdam(parameters(), 0.045)
    walk(begun, range(stop))
    params = parameters()
    resumed = ScaledAdam(params, 0.1)
    walk(resumed, range(1))  # its previous state is replaced
    with torch.no_grad():
        for p, saved in zip(params, begun.param_groups[0]["params"], strict=True):
            p.copy_(saved)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    walk(resumed, range(stop, stop + 9))
    for a, b in zip(whole.param_groups[0]["params"], params, strict=True):
        assert torch.equal(a, b)


def test_a_parameter_without_a_gradient_has_one_of_zero():
    params = parameters()
    optimizer = ScaledAdam(params, 0.045)
    before = params[0].detach().clone()
    for _ in range(5):
        for p in params[1:]:
            p.grad = torch.ones_like(p)
        optimizer.clip(2.0)
        optimizer.step()
    assert torch.equal(params[0], before)


def test_a_rate_of_zero_moves_nothing():
    params = [nn.Parameter(0.3 * torch.randn(shape)) for shape in SHAPES]
    before = [p.detach().clone() for p in params]
    walk(ScaledAdam(params, 0.0), range(9))
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-25)


def test_kernels_of_a_gpu_say_what_those_of_a_cpu_say(monkeypatch):
    xs, ys = ([torch.randn(shape) for shape in SHAPES] for _ in range(2))
    scales = [0.1 * i for i in range(len(xs))]
    dots, sums = _dots(xs, ys), [x.clone() for x in xs]
    _add(sums, ys, scales)
    _scale_and_add(sums, scales, ys, scales)
    monkeypatch.setattr("asr.scaled_adam._is_cpu", lambda tensors: False)
    torch.testing.assert_close(_dots(xs, ys), dots, rtol=1e-5, atol=1e-5)
    _add(xs, ys, scales)
    _scale_and_add(xs, scales, ys, scales)
    for x, expected in zip(xs, sums, strict=True):
        torch.testing.assert_close(x, expected)


def test_it_learns():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(200, 5)
    y = x[:, :1] * x[:, 1:2]
    optimizer = ScaledAdam(model.parameters(), 0.03)
    losses = []
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip(2.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
