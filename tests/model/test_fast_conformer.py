"""Fast Conformer in a stream, a window and a batch; NeMo's numbers: tests/convert/test_golden_nemo.py."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asr.context import Context
from asr.errors import ConfigError
from asr.model import masked_subsampling
from asr.model.fast_conformer import FastConformer, FastConformerConfig, FastConformerState
from asr.model.limited_attention import Window, attend_near
from asr.model.masks import ChunkConfig
from asr.model.relative_attention import RelativeAttention, Sight, align_distances
from asr.model.state import join, select, split

NUM_BINS = 20
AT_ONCE = ChunkConfig(dynamic=False)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tiny(**changes) -> FastConformer:
    sizes = {"dim": 24, "num_layers": 2, "num_heads": 3, "ff_dim": 32, "kernel_size": 5, "chunk": AT_ONCE}
    sizes |= {"subsampling_channels": 4}
    encoder = FastConformer(FastConformerConfig(**sizes | changes), NUM_BINS).eval()
    for name, x in encoder.state_dict().items():  # or biases of positions and convolutions would be zero
        if x.is_floating_point():
            x += 0.2 * torch.rand_like(x) if "var" in name else 0.2 * torch.randn_like(x)
    return encoder


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---- streams


@pytest.mark.parametrize(("subsampling", "norm"), [(8, "layer_norm"), (8, "batch_norm"), (4, "layer_norm")])
@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 49])
@pytest.mark.parametrize("left", [0, 1, 4, -1])
def test_streaming_equals_masked_full_context(stream, subsampling, norm, chunk, left):
    encoder = tiny(subsampling=subsampling, norm=norm)
    x, x_lens = torch.randn(3, 203, NUM_BINS), tensor([203, 150, 121])
    whole, y_lens, _ = encoder(x, x_lens, None, chunk, left)
    parts, state = stream(encoder, x, x_lens, Context(chunk, left))
    close(parts, whole)
    assert state.offset.tolist() == y_lens.tolist()


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 16, 17, 18, 31, 32, 33, 34])
@pytest.mark.parametrize("chunks_per_call", [1, 2, 100])
def test_a_stream_gives_all_frames_whatever_its_length(stream, num_frames, chunks_per_call):
    encoder = tiny()
    x, x_lens = torch.randn(1, num_frames, NUM_BINS), tensor([num_frames])
    whole, y_lens, _ = encoder(x, x_lens, None, 2, 1)
    parts, _ = stream(encoder, x, x_lens, Context(2, 1), chunks_per_call)
    assert parts.shape[1] == whole.shape[1] == int(y_lens)
    close(parts, whole)


@pytest.mark.parametrize("field", [f.name for f in fields(FastConformerState)])
def test_every_field_of_the_state_matters(field):
    encoder = tiny()
    x, x_lens = torch.randn(1, 64, NUM_BINS), tensor([64])
    _, _, state = encoder(x, x_lens, encoder.init_state(1, 4), 2, 2)
    without = replace(state, **{field: torch.zeros_like(getattr(state, field))})
    y, without_y = (encoder(x, x_lens, s, 2, 2)[0] for s in (state, without))
    assert (y - without_y).abs().max() > 1e-3


def test_joined_and_selected_streams_are_the_streams():
    encoder = tiny()
    x, x_lens = torch.randn(3, 48, NUM_BINS), tensor([48] * 3)
    states = []
    for i, n in enumerate((16, 48, 0)):
        part = x[i : i + 1, : max(n, 1)]
        states.append(encoder(part, tensor([n]), encoder.init_state(1, 6), 2, 3)[2])
    alone = [encoder(x[i : i + 1], tensor([48]), s, 2, 3) for i, s in enumerate(states)]
    y, _, state = encoder(x, x_lens, join(states), 2, 3)
    close(y, torch.cat([a[0] for a in alone]))
    for part, (_, _, expected) in zip(split(state), alone, strict=True):
        for a, b in zip(part.tensors(), expected.tensors(), strict=True):
            close(a, b)
    index = tensor([2, 0, 2])
    close(encoder(x[index], x_lens, select(join(states), index), 2, 3)[0], y[index])


def test_a_call_with_nothing_for_a_stream_leaves_it_as_it_is():
    encoder = tiny()
    x = torch.randn(2, 32, NUM_BINS)
    _, _, state = encoder(x, tensor([32, 32]), encoder.init_state(2, 6), 2, 3)
    _, y_lens, after = encoder(x, tensor([32, 0]), state, 2, 3)
    assert y_lens.tolist() == [4, 0]
    for a, b in zip(split(after)[1].tensors(), split(state)[1].tensors(), strict=True):
        close(a, b, atol=0)


def test_a_stream_may_run_for_a_month():
    encoder = tiny()
    x, x_lens, month = torch.randn(1, 64, NUM_BINS), tensor([64]), 12 * 3600 * 24 * 30
    state = encoder.init_state(1, 8)
    early, late = (
        encoder(x, x_lens, replace(state, offset=tensor([n])), 4, 2)[0] for n in (400, 400 + month)
    )
    close(late, early)


def test_the_future_beyond_a_chunk_is_not_heard():
    encoder = tiny()
    x, x_lens = torch.randn(1, 120, NUM_BINS), tensor([120])
    changed = x.clone()
    changed[:, 57:] += 1  # encoder frame 8 is the first to see this
    y, changed_y = (encoder(frames, x_lens, None, 4)[0] for frames in (x, changed))
    close(changed_y[:, :8], y[:, :8], atol=0)
    assert (changed_y - y)[:, 8].abs().max() > 1e-3


def test_a_context_may_be_tensors():
    encoder = tiny(context=[3, 1])
    x, x_lens = torch.randn(1, 96, NUM_BINS), tensor([96])
    state = encoder.init_state(1, 6)
    for context in ((2, 3, 0), (0, -1, 0)):
        y, of_tensors = (encoder(x, x_lens, state, *c)[0] for c in (context, map(tensor, context)))
        close(of_tensors, y, atol=0)
    close(y[:, :10], encoder(x, x_lens)[0][:, :10])  # the window as a mask; the last frame lacks look-ahead


# ---- windows


@pytest.mark.parametrize(("left", "right"), [(5, 2), (0, 0), (0, 7), (20, 3), (16, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_in_blocks_equals_a_mask(left, right, causal):
    encoder = tiny(causal=causal, context=[left, right])
    x, x_lens = torch.randn(3, 401, NUM_BINS), tensor([401, 130, 3])
    y, _, _ = encoder(x, x_lens)
    close(y, encoder(x, x_lens, None, 1, left, right)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_as_wide_as_the_utterance_is_global_attention(causal):
    encoder = tiny(causal=causal)
    limited = tiny(causal=causal, context=[60, 60])
    limited.load_state_dict(encoder.state_dict())
    x, x_lens = torch.randn(2, 401, NUM_BINS), tensor([401, 130])
    close(limited(x, x_lens)[0], encoder(x, x_lens)[0])


@pytest.mark.parametrize("num_global", [1, 2, 3])
def test_global_tokens_are_more_scores_and_rows_of_their_own(num_global):
    """Against the formula, frame by frame, for each utterance of a batch."""
    window, lens = Window(3, 2, num_global), tensor([21, 2, 9])
    q, keys, values = torch.randn(3, 3, 2, 21, 4)
    places, u = torch.randn(3, 2, 21, 6), torch.randn(2, 4)
    y = attend_near(q, u, places, keys, values, lens, window)
    for n, head in itertools.product(range(3), range(2)):
        for i in range(lens[n]):
            first = 0 if i < num_global else max(i - 3, 0)
            end = int(lens[n]) if i < num_global else min(i + 3, int(lens[n]))
            near = range(first, end)
            k, v = keys[n, head], values[n, head]
            if i < num_global:
                scores = k[: int(lens[n])] @ q[n, head, i] / 2
                heard = v[: int(lens[n])]
            else:
                scores = (
                    k[near] @ (q[n, head, i] + u[head]) / 2 + places[n, head, i, [3 - (i - j) for j in near]]
                )
                firsts = range(min(num_global, int(lens[n])))
                scores = torch.cat([scores, k[firsts] @ q[n, head, i] / 2])
                heard = torch.cat([v[near], v[firsts]])
            close(y[n, head, i], scores.softmax(-1) @ heard)


def test_distances_are_aligned_with_keys():
    length, width = 5, 3
    distances = torch.arange(width + length - 1, -length, -1).expand(1, 1, length, -1).float()
    expected = width + torch.arange(length)[:, None] - torch.arange(width + length)
    assert torch.equal(align_distances(distances)[0, 0], expected.float())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor created."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return made


@pytest.mark.parametrize(("limits", "growth"), [([16, 16], 2.0), (None, 4.0)])
def test_memory_of_a_window_is_linear_in_time(limits, growth):
    found = []
    for length in (256, 512, 1024):
        with Largest() as largest:
            lens, attention = torch.full((1,), length), RelativeAttention(16, 2)
            empty = torch.zeros(1, 2, 0, 8)
            if limits:
                sight = Sight.of_window(lens, length, Window(*limits, 1), 16)
            else:
                sight = Sight.of_mask(lens, torch.ones(1, length, length, dtype=torch.bool), 16)
            attention(torch.zeros(1, length, 16), empty, empty, sight)
        found.append(largest.bytes)
    assert found[1] / found[0] == pytest.approx(growth, rel=0.01)
    assert found[2] / found[1] == pytest.approx(growth, rel=0.01)


# ---- batches and long utterances


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"subsampling": 4},
        {"causal": False, "norm": "batch_norm"},
        {"causal": False, "context": [3, 2], "global_tokens": 1},
    ],
)
def test_an_utterance_is_the_same_alone_and_in_a_batch(changes):
    encoder = tiny(**changes)
    x, x_lens = torch.randn(5, 131, NUM_BINS) * 3, tensor([131, 90, 7, 1, 0])
    x[1, 90:], x[4] = torch.nan, torch.nan
    y, y_lens, _ = encoder(x, x_lens)
    for i, (n, t) in enumerate(zip(x_lens.tolist(), y_lens.tolist(), strict=True)):
        if n:
            alone, alone_lens, _ = encoder(x[i : i + 1, :n], x_lens[i : i + 1])
            assert alone_lens.tolist() == [t] == [alone.shape[1]]
            close(y[i : i + 1, :t], alone)
        assert (y[i, t:] == 0).all()
    assert y_lens[-1] == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("subsampling", [4, 8])
@pytest.mark.parametrize("num_frames", [47, 48, 49, 50, 55])
def test_a_long_utterance_goes_through_the_subsampling_in_pieces(
    monkeypatch, causal, subsampling, num_frames
):
    encoder = tiny(causal=causal, subsampling=subsampling)
    x, x_lens = torch.randn(2, num_frames, NUM_BINS), tensor([num_frames, 30])
    y = encoder.front.whole(x, x_lens)
    monkeypatch.setattr(masked_subsampling, "PIECE_FRAMES", 16)
    pieces = encoder.front.whole(x, x_lens)
    lens = encoder.front.num_frames(x_lens)
    close(pieces[0], y[0])
    close(pieces[1, : lens[1]], y[1, : lens[1]])


@pytest.mark.parametrize(("causal", "pad"), [(True, (2, 1)), (False, (1, 1))])
def test_every_convolution_of_the_subsampling_is_padded_by_zeros(causal, pad):
    front = tiny(causal=causal).front
    x = torch.randn(1, 67, NUM_BINS)
    y = x[:, None]
    for layer in front.convolutions:
        if isinstance(layer, nn.Conv2d):
            y = nn.functional.pad(y, pad + pad) if layer.stride[0] == 2 else y
            y = nn.functional.conv2d(y, layer.weight, layer.bias, layer.stride, groups=layer.groups)
        else:
            y = y.relu()
    close(front.whole(x, tensor([67])), front.out(y.transpose(1, 2).flatten(2)))


def test_batch_norm_learns_from_frames_that_count():
    x, x_lens = torch.randn(2, 90, NUM_BINS), tensor([90, 40])
    for i in range(2):
        x[i, x_lens[i] :] = 50.0
    results = []
    for padding in (0, 70):
        torch.manual_seed(1)
        encoder = tiny(causal=False, norm="batch_norm", dropout=0.0).train()
        y, _, _ = encoder(nn.functional.pad(x, (0, 0, 0, padding), value=50.0), x_lens)
        norm = encoder.layers[0].convolution.depthwise_norm
        results.append((y[:, :11], norm.running_mean, norm.running_var))
    for few, many in zip(*results, strict=True):
        close(many, few)


@pytest.mark.parametrize("changes", [{}, {"causal": False, "context": [3, 2], "global_tokens": 1}])
def test_gradients_are_finite_and_reach_every_parameter(changes):
    encoder = tiny(**changes).train()
    x, x_lens = torch.randn(3, 80, NUM_BINS), tensor([80, 33, 0])
    with torch.enable_grad():
        encoder(x, x_lens)[0].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_biases_of_layers_are_optional():
    names = set(tiny(bias=False).state_dict())
    without = set(tiny().state_dict()) - names
    assert {x.split(".", 2)[2] for x in without} == {
        f"{part}.bias"
        for part in (
            *(f"feed_forward_{i}.{j}" for i in (1, 2) for j in (1, 4)),
            *(f"attention.{x}" for x in ("project", "out")),
            *(f"convolution.{x}" for x in ("gated", "depthwise", "out")),
        )
    }


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 25}, "encoder.dim: 25 channels do not divide into 3 heads"),
        ({"causal": False, "kernel_size": 4}, "encoder.kernel_size: 4 is even"),
        ({"context": [5]}, r"context is \[5\]; expected \[left, right\]"),
        ({"context": [5, -1]}, r"context is \[5, -1\]"),
        ({"global_tokens": 1}, "global_tokens is 1; expected 0, or a limited context"),
        ({"global_tokens": 1, "context": [2, 2], "chunk": ChunkConfig()}, "chunk.dynamic: false"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_what_cannot_stream_is_said():
    with pytest.raises(ConfigError, match="a model with causal: false cannot stream"):
        tiny(causal=False).init_state(1, 4)
    with pytest.raises(ConfigError, match="a model with global_tokens cannot stream"):
        tiny(context=[2, 2], global_tokens=1).init_state(1, 4)
    with pytest.raises(ConfigError, match="right: 2 frames of look-ahead"):
        tiny().init_state(1, 4, 2)
    with pytest.raises(ConfigError, match="chunk: 4; expected 0"):
        tiny(context=[2, 2], global_tokens=1)(torch.zeros(1, 8, NUM_BINS), tensor([8]), None, 4)
