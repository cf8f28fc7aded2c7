"""Encoding chunk by chunk equals encoding the whole, for any chunk, context and batch.

`any_encoder` is each of ENCODERS in turn; chunks are in its units.
"""

from dataclasses import replace

import pytest
import torch
from torch import tensor

from asr.context import Context
from asr.errors import ConfigError
from asr.model.encoder import look_ahead_layers
from asr.model.state import join, select, split

DAYS = 25 * 3600 * 24 * 30  # encoder frames of a month

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def in_units(encoder, chunk, left=-1, right=0):
    return Context(chunk * encoder.chunk_unit, left, right)


def overlapping(encoder, units):
    """The number of feature frames in a call of so many chunk units that is not the last."""
    return units * encoder.chunk_unit * encoder.subsampling + encoder.overlap_frames


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("left", [0, 1, 4, -1])
def test_streaming_equals_masked_full_context(any_encoder, stream, chunk, left):
    encoder = any_encoder()
    context = in_units(encoder, chunk, left)
    x, x_lens = (
        torch.randn(3, 203, 16),
        tensor([203, 150, 17]),
    )  # the last chunk is short, of a different length for each
    whole, y_lens, _ = encoder(x, x_lens, None, *context)
    parts, _ = stream(encoder, x, x_lens, context)
    close(parts, whole)
    assert y_lens.min() > 0


@pytest.mark.parametrize("num_frames", [*range(1, 20), 64, 67, 68])
def test_no_frame_is_lost_at_the_end(any_encoder, stream, num_frames):
    encoder = any_encoder()
    context = in_units(encoder, 2, 2)
    x, x_lens = torch.randn(1, num_frames, 16), tensor([num_frames])
    whole, y_lens, _ = encoder(x, x_lens, None, *context)
    close(stream(encoder, x, x_lens, context)[0], whole[:, : y_lens[0]])


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("left", [0, 4])
def test_another_subsampling_streams(tiny_encoder, stream, chunk, left):
    encoder = tiny_encoder(subsampling=8)
    x, x_lens = torch.randn(3, 203, 16), tensor([203, 150, 7])
    whole, _, _ = encoder(x, x_lens, None, chunk, left)
    close(stream(encoder, x, x_lens, Context(chunk, left))[0], whole)


@pytest.mark.parametrize("chunks_per_call", [2, 3, 100])
@pytest.mark.parametrize("left", [1, -1])
def test_several_chunks_in_a_call_equal_one(any_encoder, stream, chunks_per_call, left):
    encoder = any_encoder()
    context = in_units(encoder, 4, left)
    x, x_lens = torch.randn(2, 150, 16), tensor([150, 99])
    one, _ = stream(encoder, x, x_lens, context)
    several, _ = stream(encoder, x, x_lens, context, chunks_per_call)
    close(several, one)


def test_every_tensor_of_the_state_matters(any_encoder):
    encoder = any_encoder()
    context = in_units(encoder, 2, 2, int(look_ahead_layers(encoder) > 0))
    num = overlapping(encoder, 12)
    x, x_lens = torch.randn(1, num, 16), tensor([num])
    _, _, state = encoder(x, x_lens, encoder.init_state(1, context.width, context.delay), *context)
    y = encoder(x, x_lens, state, *context)[0]
    for i, name in enumerate(state.named()):
        changed = [torch.zeros_like(t) if k == i else t for k, t in enumerate(state.tensors())]
        without = encoder(x, x_lens, state.of(changed), *context)[0]
        assert (y - without).abs().max() > 1e-3, name


def test_joined_streams_are_the_streams(any_encoder, stream):
    encoder = any_encoder()
    context, unit = in_units(encoder, 2, 3), 2
    num = overlapping(encoder, 6 * unit)
    x, x_lens = torch.randn(3, num, 16), tensor([num])
    fresh = encoder.init_state(1, context.width)
    calls = [overlapping(encoder, n * unit) for n in (2, 6, 1)]
    states = [encoder(x[i : i + 1, :n], tensor([n]), fresh, *context)[2] for i, n in enumerate(calls)]
    alone = [encoder(x[i : i + 1], x_lens, s, *context) for i, s in enumerate(states)]
    y, _, state = encoder(x, x_lens.expand(3), join(states), *context)
    close(y, torch.cat([a[0] for a in alone]))
    for part, (_, _, expected) in zip(split(state), alone, strict=True):
        for a, b in zip(part.tensors(), expected.tensors(), strict=True):
            close(a, b)
    index = tensor([2, 0, 2])
    close(encoder(x[index], x_lens.expand(3), select(join(states), index), *context)[0], y[index])


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
def test_nothing_beyond_the_chunk_is_heard(any_encoder, chunk):
    """Nor anything beyond the overlapping frames."""
    encoder = any_encoder()
    context = in_units(encoder, chunk)
    last, num = overlapping(encoder, 2 * chunk), overlapping(encoder, 4 * chunk)
    x, x_lens = torch.randn(1, num, 16), tensor([num])
    changed = x.clone()
    changed[:, last:] += 1
    y, changed_y = (encoder(frames, x_lens, None, *context)[0] for frames in (x, changed))
    first = 2 * context.chunk
    close(changed_y[:, :first], y[:, :first], atol=0)
    assert (changed_y[:, first:] - y[:, first:]).abs().max() > 1e-3


def test_the_whole_chunk_is_heard(any_encoder):
    encoder = any_encoder()
    context = in_units(encoder, 4)
    num = overlapping(encoder, 8)
    x, x_lens = torch.randn(1, num, 16), tensor([num])
    changed = x.clone()
    changed[:, -encoder.subsampling :] += 5
    y, changed_y = (encoder(frames, x_lens, None, *context)[0] for frames in (x, changed))
    assert (changed_y - y)[:, context.chunk : 2 * context.chunk].abs().amax(-1).min() > 1e-5
    close(changed_y[:, : context.chunk], y[:, : context.chunk], atol=0)


def test_other_encoders_say_that_they_cannot_stream(whole_encoder):
    assert not whole_encoder.can_stream
    with pytest.raises(ConfigError):
        whole_encoder.init_state(1, 4)
