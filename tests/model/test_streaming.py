"""Encoding chunk by chunk equals encoding at once, whatever the chunk, the context and the company."""

from dataclasses import fields, replace

import pytest
import torch
from torch import tensor

from asr.context import Context
from asr.model.conformer import ConformerState
from asr.model.state import join, select, split

DAYS = 25 * 3600 * 24 * 30  # encoder frames of a month

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("subsampling", [4, 8])
@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("left", [0, 1, 4, -1])
def test_streaming_equals_masked_full_context(tiny_encoder, stream, subsampling, chunk, left):
    encoder = tiny_encoder(subsampling=subsampling)
    x, x_lens = (
        torch.randn(3, 203, 16),
        tensor([203, 150, 7]),
    )  # the last chunk is short, for each differently
    whole, _, _ = encoder(x, x_lens, None, chunk, left)
    parts, _ = stream(encoder, x, x_lens, Context(chunk, left))
    close(parts, whole)


@pytest.mark.parametrize("chunks_per_call", [2, 3, 100])
@pytest.mark.parametrize("left", [1, -1])
def test_several_chunks_in_a_call_equal_one(tiny_encoder, stream, chunks_per_call, left):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(2, 150, 16), tensor([150, 99])
    one, _ = stream(encoder, x, x_lens, Context(4, left))
    several, _ = stream(encoder, x, x_lens, Context(4, left), chunks_per_call)
    close(several, one)


@pytest.mark.parametrize("field", [f.name for f in fields(ConformerState)])
@pytest.mark.parametrize("subsampling", [4, 8])
def test_every_field_of_the_state_matters(tiny_encoder, field, subsampling):
    encoder = tiny_encoder(subsampling=subsampling)
    x, x_lens, context = torch.randn(1, 96, 16), tensor([96]), Context(2, 2, 1)
    _, _, state = encoder(x, x_lens, encoder.init_state(1, context.width, context.delay), *context)
    without = replace(state, **{field: torch.zeros_like(getattr(state, field))})
    y, without_y = (encoder(x, x_lens, s, *context)[0] for s in (state, without))
    assert (y - without_y).abs().max() > 1e-3


def test_joined_streams_are_the_streams(tiny_encoder, stream):
    encoder = tiny_encoder()
    x = torch.randn(3, 48, 16)
    parts = [(x[i : i + 1, :n], tensor([n])) for i, n in enumerate((16, 48, 8))]
    states = [stream(encoder, *part, Context(2, 3))[1] for part in parts]
    alone = [encoder(x[i : i + 1], tensor([48]), s, 2, 3) for i, s in enumerate(states)]
    y, _, state = encoder(x, tensor([48] * 3), join(states), 2, 3)
    close(y, torch.cat([a[0] for a in alone]))
    for part, (_, _, expected) in zip(split(state), alone, strict=True):
        for a, b in zip(part.tensors(), expected.tensors(), strict=True):
            close(a, b)


def test_selected_streams_go_on_in_the_new_order(tiny_encoder, stream):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(3, 32, 16), tensor([32] * 3)
    _, state = stream(encoder, x, x_lens, Context(2, 3))
    y, _, _ = encoder(x, x_lens, state, 2, 3)
    index = tensor([2, 0, 2])
    close(encoder(x[index], x_lens, select(state, index), 2, 3)[0], y[index])


@pytest.mark.parametrize("num_frames", [0, 8, 16])
def test_a_padded_call_leaves_the_state_of_the_call_alone(tiny_encoder, stream, num_frames):
    encoder = tiny_encoder()
    x = torch.randn(2, 40, 16)
    _, state = stream(encoder, x, tensor([40, 40]), Context(2, 3))
    _, _, both = encoder(x, tensor([40, num_frames]), state, 2, 3)
    expected = split(state)[1]
    if num_frames:
        _, _, expected = encoder(x[1:, :num_frames], tensor([num_frames]), expected, 2, 3)
    for a, b in zip(split(both)[1].tensors(), expected.tensors(), strict=True):
        close(a, b)


def test_a_stream_may_run_for_a_month(tiny_encoder):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(1, 64, 16), tensor([64])
    state = encoder.init_state(1, 8)
    early, late = (
        encoder(x, x_lens, replace(state, offset=tensor([offset])), 4, 2) for offset in (400, 400 + DAYS)
    )
    close(late[0], early[0], atol=1e-4)
    again = [encoder(x, x_lens, result[2], 4, 2)[0] for result in (early, late)]
    close(again[1], again[0], atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4])
def test_nothing_beyond_the_chunk_is_heard(tiny_encoder, chunk):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(1, 64, 16), tensor([64])
    y, _, _ = encoder(x, x_lens, None, chunk)
    changed = x.clone()
    changed[:, 32:] += 1
    changed_y, _, _ = encoder(changed, x_lens, None, chunk)
    close(changed_y[:, :8], y[:, :8], atol=0)
    assert (changed_y[:, 8] - y[:, 8]).abs().max() > 1e-3


def test_the_whole_chunk_is_heard(tiny_encoder):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(1, 32, 16), tensor([32])
    changed = x.clone()
    changed[:, 28:] += 1
    y, changed_y = (encoder(frames, x_lens, None, 4)[0] for frames in (x, changed))
    assert (changed_y - y)[:, 4:].abs().amax(-1).min() > 1e-4
    close(changed_y[:, :4], y[:, :4], atol=0)
