"""FireRedASR's encoder: whole utterances, each as if it were alone in the batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.export import Dim

from asr.errors import ConfigError
from asr.model.firered import DistanceAttention, FireRedConfig, FireRedEncoder
from asr.model.masks import ChunkConfig

NUM_BINS = 16


def tiny(**changes: object) -> FireRedEncoder:
    sizes = {"dim": 24, "num_layers": 2, "num_heads": 3, "ff_dim": 16, "kernel_size": 5}
    config = FireRedConfig(**sizes | {"subsampling_channels": 4} | changes)  # type: ignore[arg-type]
    return FireRedEncoder(config, NUM_BINS).eval()


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_an_utterance_is_the_same_alone_and_in_a_batch():
    encoder = tiny()
    x, x_lens = torch.randn(4, 90, NUM_BINS) * 3, tensor([90, 33, 7, 6])  # the last is too short for a frame
    x[1, 33:] = torch.nan
    y, y_lens, _ = encoder(x, x_lens)
    assert y_lens.tolist() == [21, 7, 1, 0]
    for i, (n, t) in enumerate(zip(x_lens, y_lens, strict=True)):
        alone, alone_lens, _ = encoder(x[i : i + 1, :n], x_lens[i : i + 1])
        assert alone_lens.tolist() == [t]
        close(y[i : i + 1, :t], alone[:, :t])
        assert (y[i, t:] == 0).all()


def test_attention_is_by_contents_and_distances():
    """Against its definition, query by query and key by key."""
    attention = DistanceAttention(8, 2)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x, distances = torch.randn(1, 5, 8), torch.randn(1, 9, 8)
    found = attention(x, distances, torch.ones(1, 1, 1, 5, dtype=torch.bool))
    q, k, v = attention.query_norm(x), attention.key_norm(x), attention.value_norm(x)
    q, k, v, p = attention.query(q), attention.key(k), attention.value(v), attention.position(distances)
    heads = []
    for h, part in enumerate((slice(0, 4), slice(4, 8))):
        scores = torch.empty(5, 5)
        for i in range(5):
            for j in range(5):
                contents = (q[0, i, part] + attention.content_bias[h]) @ k[0, j, part]
                places = (q[0, i, part] + attention.position_bias[h]) @ p[0, 4 - (i - j), part]
                scores[i, j] = (contents + places) / 2
        heads.append(scores.softmax(-1) @ v[0, :, part])
    close(found[0], attention.out(torch.cat(heads, -1)))


def test_all_frames_are_heard():
    encoder = tiny()
    x, x_lens = torch.randn(1, 67, NUM_BINS), tensor([67])
    changed = x.clone()
    changed[:, -1] += 1
    y, changed_y = (encoder(frames, x_lens)[0] for frames in (x, changed))
    assert ((y - changed_y).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, x, n: e(x, n, None, 4), "not a chunk of 4 frames; decode without chunks"),
        (lambda e, x, n: e(x, n, None, tensor(2)), "not a chunk of 2 frames"),
        (lambda e, x, n: e(x, n, e(x, n)[2]), "not a state"),
        (lambda e, x, n: e.init_state(1, 4), "not a stream; .* an encoder of another type"),
    ],
)
def test_it_does_not_stream(call: Callable, message: str):
    x, x_lens = torch.randn(1, 67, NUM_BINS), tensor([67])
    with pytest.raises(ConfigError, match=f"encoder.type: firered takes whole utterances, {message}"):
        call(tiny(), x, x_lens)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 5}, r"encoder\.dim: 24 channels do not divide into 5 heads"),
        ({"kernel_size": 4}, r"encoder\.kernel_size: 4 is even, expected odd"),
        ({"chunk": ChunkConfig()}, r"encoder\.chunk\.dynamic: true, .* expected false"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**wrong)


class Whole(nn.Module):
    """Only tensors as inputs and outputs, as in a graph."""

    def __init__(self, encoder: FireRedEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x, x_lens)[:2]


@pytest.mark.slow
def test_a_traced_encoder_says_the_same():
    encoder, n, t = Whole(tiny(num_layers=1)).eval(), Dim("N"), Dim("T", min=8)
    x, x_lens = torch.randn(2, 67, NUM_BINS), tensor([67, 41])
    traced = torch.export.export(
        encoder,
        (x, x_lens),
        dynamic_shapes=({0: n, 1: t}, {0: n}),
        prefer_deferred_runtime_asserts_over_guards=True,
    ).module()
    for length in (90, 11):
        x, x_lens = torch.randn(3, length, NUM_BINS), tensor([length, length - 4, 7])
        for a, b in zip(traced(x, x_lens), encoder(x, x_lens), strict=True):
            close(a, b)
