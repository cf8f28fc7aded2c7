"""A stream with look-ahead is a shift register of layers, and equals the masked whole utterance."""

import pytest
import torch
from torch import tensor

from asr.context import Context
from asr.model.state import join, split

LIMITED = [Context(1, 10, 0), Context(1, 10, 2), Context(1, 10, 10)]
CHUNKED = [Context(chunk, left, right) for chunk in (2, 4) for left in (0, 1, 4, -1) for right in (1, 2)]

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("context", [*LIMITED, *CHUNKED])
@pytest.mark.parametrize("chunks_per_call", [1, 3, 100])
@pytest.mark.parametrize("num_frames", [203, 192])
def test_the_shift_register_equals_the_mask(tiny_encoder, stream, context, chunks_per_call, num_frames):
    encoder = tiny_encoder(num_layers=3)
    x, x_lens = torch.randn(1, num_frames, 16), tensor([num_frames])
    whole, _, _ = encoder(x, x_lens, None, *context)
    parts, _ = stream(encoder, x, x_lens, context, chunks_per_call)
    close(parts, whole)


@pytest.mark.parametrize("subsampling", [4, 8])
@pytest.mark.parametrize("context", [Context(1, 10, 2), Context(4, 1, 2)])
def test_streams_of_different_lengths_end_together(tiny_encoder, stream, subsampling, context):
    encoder = tiny_encoder(subsampling=subsampling)
    x, x_lens = torch.randn(4, 203, 16), tensor([203, 150, 192, 161])
    whole, _, _ = encoder(x, x_lens, None, *context)
    parts, _ = stream(encoder, x, x_lens, context)
    close(parts, whole)


@pytest.mark.parametrize("num_frames", [0, 1, 7, 16])
def test_a_stream_shorter_than_its_delay(tiny_encoder, num_frames):
    encoder, context = tiny_encoder(), Context(2, 4, 3)
    x = torch.randn(1, num_frames + encoder.flush_frames(context.delay), 16)
    state = encoder.init_state(1, context.width, context.delay)
    y, y_lens, _ = encoder(x, tensor([num_frames]), state, *context)
    whole, whole_lens, _ = encoder(x, tensor([num_frames]), None, *context)
    assert y_lens.tolist() == whole_lens.tolist() == [-(-num_frames // 4)]
    close(y, whole)


@pytest.mark.parametrize("context", [Context(1, 10, 2), Context(2, 2, 1)])
def test_outputs_come_as_late_as_the_look_ahead_of_all_layers(tiny_encoder, context):
    encoder = tiny_encoder(num_layers=3)
    state = encoder.init_state(2, context.width, context.delay)
    x, heard = torch.randn(2, 8, 16), []
    for _ in range(6):
        y, y_lens, state = encoder(x, tensor([8, 8]), state, *context)
        assert (y[:, y_lens[0] :] == 0).all()
        heard.append(y_lens.tolist())
    assert heard == [[0, 0]] * 3 + [[2, 2]] * 3
    assert encoder.flush_frames(context.delay) == 3 * 2 * 4


def test_one_call_for_streams_that_have_come_to_different_places(tiny_encoder):
    encoder, context = tiny_encoder(), Context(2, 3, 2)
    x = torch.randn(3, 64, 16)
    fresh = encoder.init_state(1, context.width, context.delay)
    calls = [(x[i : i + 1, :n], tensor([n]), fresh) for i, n in enumerate((16, 48, 8))]
    states = [encoder(*call, *context)[2] for call in calls]
    alone = [encoder(x[i : i + 1], tensor([64]), s, *context) for i, s in enumerate(states)]
    y, y_lens, state = encoder(x, tensor([64] * 3), join(states), *context)
    assert y_lens.tolist() == [12, 16, 10]
    close(y, torch.cat([a[0] for a in alone]))
    for part, (_, _, expected) in zip(split(state), alone, strict=True):
        for a, b in zip(part.tensors(), expected.tensors(), strict=True):
            close(a, b)


@pytest.mark.parametrize("context", [*LIMITED, *CHUNKED])
@pytest.mark.parametrize("frame", [4, 5, 6, 7])
def test_the_first_frame_that_is_not_heard(tiny_encoder, context, frame):
    """It sees D = layers * right * chunk frames more, and those to the end of the chunk reached."""
    encoder = tiny_encoder(num_layers=2)
    to_end = context.chunk - 1 - frame % context.chunk
    beyond = frame + 2 * context.delay + to_end + 1
    x = torch.randn(1, 4 * (beyond + 3), 16)
    y, _, _ = encoder(x, tensor([x.shape[1]]), None, *context)
    for first, is_heard in ((4 * beyond - 1, True), (4 * beyond, False)):
        changed = x.clone()
        changed[:, first:] += 5
        changed_y, _, _ = encoder(changed, tensor([x.shape[1]]), None, *context)
        assert torch.equal(changed_y[0, frame], y[0, frame]) != is_heard


def test_no_look_ahead_is_the_chunk_alone(tiny_encoder):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(1, 64, 16), tensor([64])
    alone, none, ahead = (encoder(x, x_lens, None, *context)[0] for context in ((4, 1), (4, 1, 0), (4, 1, 1)))
    close(alone, none, atol=0)
    assert (ahead - none).abs().max() > 1e-2


def test_gradients_of_a_look_ahead_are_finite_and_not_those_without(tiny_encoder):
    encoder = tiny_encoder(dropout=0.0).train()
    x, x_lens = torch.randn(2, 40, 16), tensor([40, 17])
    found = []
    for right in (0, 2):
        with torch.enable_grad():
            y, _, _ = encoder(x, x_lens, None, 2, 1, right)
            y.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
        encoder.zero_grad()
    assert all(grad.isfinite().all() for grad in found)
    assert not torch.allclose(*found)
