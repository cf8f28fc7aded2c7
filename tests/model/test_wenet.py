"""WeNet's encoder streams like ours, its checkpoints load strictly; its values: test_golden_wenet.py."""

import pytest
import torch
from torch import tensor

from asr.errors import ConfigError
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.masks import ChunkConfig
from asr.model.state import split
from asr.model.wenet import WenetConformer, WenetConformerConfig

NUM_BINS = 20


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tiny(**changes) -> WenetConformer:
    sizes = {"dim": 24, "num_layers": 2, "num_heads": 3, "ff_dim": 32, "kernel_size": 4}
    encoder = WenetConformer(WenetConformerConfig(**sizes | changes), NUM_BINS).eval()
    for (
        name,
        tensor_,
    ) in encoder.state_dict().items():  # or biases of positions and convolutions would be zero
        if tensor_.is_floating_point():
            tensor_ += 0.2 * torch.rand_like(tensor_) if "var" in name else 0.2 * torch.randn_like(tensor_)
    return encoder


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def stream(encoder, x, x_lens, chunk, left, chunks_per_call=1):
    """Overlapping calls of `chunks_per_call` chunks; the last one takes what is left."""
    frames = chunk * chunks_per_call
    step = frames * encoder.subsampling
    state, parts = encoder.init_state(len(x), max(left, 0) * chunk), []
    for start in range(0, x.shape[1] - encoder.front.window + 1, step):
        part = x[:, start : start + step + encoder.overlap_frames]
        state = state.widen(frames) if left < 0 else state
        y, _, state = encoder(part, (x_lens - start).clamp(0, part.shape[1]), state, chunk, left)
        parts.append(y)
    return torch.cat(parts, dim=1), state


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 16, 49])
@pytest.mark.parametrize("left", [0, 1, 4, -1])
def test_streaming_equals_masked_full_context(norm, chunk, left):
    encoder = tiny(norm=norm)
    x, x_lens = torch.randn(3, 201, NUM_BINS), tensor([201, 150, 7])
    whole, y_lens, _ = encoder(x, x_lens, None, chunk, left)
    assert y_lens.tolist() == [49, 36, 1]
    parts, state = stream(encoder, x, x_lens, chunk, left)
    close(parts, whole)
    assert state.offset.tolist() == y_lens.tolist()


@pytest.mark.parametrize(
    ("input_layer", "rate", "overlap"), [("conv2d", 4, 3), ("conv2d6", 6, 5), ("conv2d8", 8, 7)]
)
def test_every_front_streams(input_layer, rate, overlap):
    encoder = tiny(input_layer=input_layer)
    assert (encoder.subsampling, encoder.overlap_frames) == (rate, overlap)
    x, x_lens = torch.randn(2, 150, NUM_BINS), tensor([150, 99])
    whole, y_lens, _ = encoder(x, x_lens, None, 2, 2)
    assert y_lens.tolist() == [(n - overlap) // rate for n in (150, 99)]
    close(stream(encoder, x, x_lens, 2, 2)[0], whole)
    close(stream(encoder, x, x_lens, 2, 2, chunks_per_call=3)[0], whole)


def test_a_front_that_needs_more_bins_says_so():
    with pytest.raises(ConfigError, match=r"encoder\.input_layer: conv2d8 needs more mel bins"):
        WenetConformer(WenetConformerConfig(input_layer="conv2d8", dim=8), 12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("chunk", "left"), [(0, -1), (3, 1)])
def test_an_utterance_is_the_same_alone_and_in_a_batch(causal, chunk, left):
    encoder = tiny(causal=causal, kernel_size=5)
    x, x_lens = torch.randn(4, 90, NUM_BINS) * 3, tensor([90, 33, 7, 6])  # the last is too short for a frame
    x[1, 33:] = torch.nan
    y, y_lens, _ = encoder(x, x_lens, None, chunk, left)
    assert y_lens.tolist() == [21, 7, 1, 0]
    for i, (n, t) in enumerate(zip(x_lens, y_lens, strict=True)):
        alone, alone_lens, _ = encoder(x[i : i + 1, :n], x_lens[i : i + 1], None, chunk, left)
        assert alone_lens.tolist() == [t]
        close(y[i : i + 1, :t], alone[:, :t])
        assert (y[i, t:] == 0).all()


def test_a_call_with_nothing_for_a_stream_leaves_it_as_it_is():
    encoder = tiny()
    x = torch.randn(2, 43, NUM_BINS)
    _, state = stream(encoder, x, tensor([43, 43]), 2, 3)
    _, _, after = encoder(x, tensor([43, 0]), state, 2, 3)
    for a, b in zip(split(after)[1].tensors(), split(state)[1].tensors(), strict=True):
        close(a, b, atol=0)


@pytest.mark.parametrize("right", [1, tensor(2)])
def test_no_layer_looks_ahead(right):
    x, x_lens = torch.randn(1, 67, NUM_BINS), tensor([67])
    with pytest.raises(ConfigError, match=r"^right: [12], and layers of wenet-conformer cannot look ahead"):
        tiny()(x, x_lens, None, 4, 1, right)
    with pytest.raises(ConfigError, match="cannot look ahead"):
        tiny().init_state(1, 4, int(right))


def test_a_symmetric_convolution_does_not_stream():
    encoder = tiny(causal=False, kernel_size=5)
    x, x_lens = torch.randn(1, 67, NUM_BINS), tensor([67])
    _, _, state = encoder(x, x_lens)
    assert not encoder.can_stream
    for call in (lambda: encoder.init_state(1, 4), lambda: encoder(x, x_lens, state, 4)):
        with pytest.raises(ConfigError, match=r"encoder\.causal: false, .* cannot stream"):
            call()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 5}, r"encoder\.dim: 24 channels do not divide into 5 heads"),
        ({"chunk": ChunkConfig(max_right=2)}, r"encoder\.chunk\.max_right: 2, .* expected 0"),
        ({"causal": False}, r"encoder\.kernel_size: 4 is even, expected odd"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**wrong)


@pytest.mark.parametrize("steps", [[1] * 5, [2, 3]])
def test_a_decoder_with_sinusoids_steps_as_it_is_taught(steps):
    config = DecoderConfig(
        dim=20, num_layers=2, num_heads=4, ff_dim=16, activation="relu", positions="sinusoid"
    )
    decoder = TransformerDecoder(config, 11, memory_dim=24).eval()
    memory, y_lens = decoder.memory(torch.randn(2, 6, 24)), tensor([6, 4])
    tokens = tensor([[1, 4, 5, 6, 7], [1, 9, 9, 2, 3]])
    whole = decoder(tokens, *memory, y_lens).logits
    parts, state = [], None
    for part in tokens.split(steps, dim=1):
        logits, _, state = decoder(part, *memory, y_lens, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), whole)
    repeated = decoder(tensor([[9, 9, 9]]), *(x[:1] for x in memory), y_lens[:1]).logits
    assert (repeated[:, 1] - repeated[:, 2]).abs().max() > 1e-3  # they differ only by position


def test_a_decoder_of_odd_size_is_refused():
    config = DecoderConfig(dim=15, num_heads=5, positions="sinusoid")
    with pytest.raises(ConfigError, match=r"decoder\.dim: 15 channels .* are odd"):
        TransformerDecoder(config, 11, memory_dim=24)
