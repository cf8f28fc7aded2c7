import torch
import torch.nn.functional as F
from torch import nn, tensor

from asr.model.layers import ConvModule, initialise, keep
from asr.model.subsampling import Subsampling


def test_keep_takes_what_ends_at_each_length():
    x = torch.arange(14).view(2, 7)  # 3 past frames, 4 new ones, of which 4 and 1 are valid
    assert keep(x, tensor([4, 1]), 3, dim=1).tolist() == [[4, 5, 6], [8, 9, 10]]
    assert keep(x[:, :4], tensor([4, 1]), 0, dim=1).shape == (2, 0)


def test_the_convolution_is_causal_and_shows_what_it_saw():
    module = ConvModule(6, 3, 0.0)
    x, past = torch.randn(1, 5, 6), torch.randn(1, 6, 2)
    y, seen = module(x, past, torch.ones(1, 5, 1, dtype=torch.bool))
    gated = F.glu(module.gated(module.norm(x)), -1)
    torch.testing.assert_close(seen, torch.cat([past, gated.transpose(1, 2)], 2))
    z = F.conv1d(seen, module.depthwise.weight[:, :, 0], module.depthwise.bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(y, module.out(F.silu(module.depthwise_norm(z))))


def test_subsampled_frames_see_as_far_as_they_say():
    for rate in (4, 8):
        front = Subsampling(10, 3, 6, rate)
        past = torch.randn(1, rate - 1, 10)
        x = torch.randn(1, 4 * rate, 10, requires_grad=True)
        front(x, past)[0, 2].sum().backward()
        seen = x.grad[0].abs().sum(-1).nonzero().flatten()
        assert (seen[0], seen[-1]) == (rate + 1, 3 * rate - 1)


def test_linear_maps_keep_the_variance():
    linear = nn.Linear(400, 300)
    linear.apply(initialise)
    assert 0.9 < linear(torch.randn(100, 400)).var() < 1.1
    assert (linear.bias == 0).all()
