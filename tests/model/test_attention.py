import pytest
import torch
from torch import tensor

from asr.model.attention import CrossAttention, Rotation, SelfAttention, split_heads


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    near, far = (
        (Rotation.at(tensor([[i]]), 8)(q) * Rotation.at(tensor([[j]]), 8)(k)).sum()
        for i, j in ((5, 2), (10**9 + 5, 10**9 + 2))
    )
    torch.testing.assert_close(near, far)
    other = (Rotation.at(tensor([[5]]), 8)(q) * Rotation.at(tensor([[3]]), 8)(k)).sum()
    assert (near - other).abs() > 1e-3


def test_rotation_keeps_lengths_and_type():
    x = torch.randn(2, 3, 5, 8)
    rotated = Rotation.at(torch.arange(5)[None], 8)(x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotated[:, :, 0], x[:, :, 0])
    assert Rotation.at(torch.arange(5)[None], 8)(x.bfloat16()).dtype == torch.bfloat16


def test_self_attention_is_softmax_of_scaled_products():
    attention = SelfAttention(8, 2)
    x, past = torch.randn(1, 3, 8), torch.randn(2, 1, 2, 2, 4)
    rotation, mask = Rotation.at(torch.arange(2, 5)[None], 4), torch.ones(3, 5).tril(2).bool()
    y, keys, values = attention(x, *past, rotation, mask[None, None])
    q, k, v = (split_heads(part, 2) for part in attention.project(x).chunk(3, -1))
    torch.testing.assert_close(keys, torch.cat([past[0], rotation(k)], 2))
    torch.testing.assert_close(values, torch.cat([past[1], v], 2))
    weights = (rotation(q) @ keys.transpose(2, 3) / 2).masked_fill(~mask, -1e30).softmax(-1)
    torch.testing.assert_close(y, attention.out((weights @ values).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("num_frames", [0, 4])
def test_attention_to_nothing_is_attention_to_zeros(num_frames):
    attention = CrossAttention(8, 2)
    keys, values = torch.randn(2, 1, 2, num_frames, 4)
    y = attention(torch.randn(1, 3, 8), keys, values, torch.zeros(1, 1, 1, num_frames).bool())
    torch.testing.assert_close(y, attention.out.bias.expand(1, 3, 8))
