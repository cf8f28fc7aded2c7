"""A Zipformer's stream equals its masked form, padding changes nothing, and training follows its schedules.

Its values: test_golden_zipformer.py.
"""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn, tensor

from asr.config import load_config
from asr.errors import ConfigError
from asr.model.masks import ChunkConfig
from asr.model.schedule import scheduled, set_batch_count
from asr.model.state import join, select, split
from asr.model.zipformer import Zipformer, ZipformerConfig
from asr.model.zipformer_convolution import ChunkConvolution, Edges
from asr.model.zipformer_front import PIECE
from asr.model.zipformer_layer import QUERIES
from asr.model.zipformer_state import ZipformerState
from asr.model.zipformer_training import Rates, dropout, feature_masks, kept, layer_skip

CONF = Path(__file__).parents[2] / "recipes" / "conf"
NUM_BINS = 12
SIZES = {
    "dims": [12, 20, 16],
    "unmasked_dims": [8, 10, 12],
    "rates": [1, 2, 8],
    "depths": [1, 2, 1],
    "num_heads": [2, 1, 3],
    "query_dims": [4, 6, 5],
    "value_dims": [3, 4, 2],
    "position_head_dims": [2, 2, 2],
    "position_dim": 6,
    "ff_dims": [16, 12, 16],
    "kernel_sizes": [9, 5, 3],
    "causal": True,
}


def tiny(**changes) -> Zipformer:
    encoder = Zipformer(ZipformerConfig(**SIZES | changes), NUM_BINS).eval()
    with torch.no_grad():  # initially a layer adds next to nothing
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def stream(encoder, x, x_lens, chunk, left, chunks_per_call=1, wrap=int):
    """Overlapping calls of `chunks_per_call` chunks until all is out; frames of each, zero after the end."""
    step = chunk * chunks_per_call * encoder.subsampling
    x = nn.functional.pad(x, (0, 0, 0, step + encoder.overlap_frames), value=9.0)
    state, parts = encoder.init_state(len(x), max(left, 0) * chunk), []
    for start in range(0, int(x_lens.max()), step):
        part = x[:, start : start + step + encoder.overlap_frames]
        if left < 0:
            state = state.widen(chunk * chunks_per_call, encoder.chunk_unit)
        lens = (x_lens - start).clamp(0, part.shape[1])
        y, _, state = encoder(part, lens, state, wrap(chunk), wrap(left))
        parts.append(y)
    return torch.cat(parts, dim=1), state


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


needs_no_grad = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize(("name", "count"), [("s", 22_118_279), ("m", 64_250_603), ("l", 147_010_094)])
def test_published_sizes(name: str, count: int):
    """With the head for 500 units, as in icefall."""
    config = load_config([CONF / f"zipformer-{name}.yaml"])
    with torch.device("meta"):
        encoder = Zipformer(config.encoder, config.features.num_bins)
        head = nn.Linear(encoder.dim, 500)
    assert sum(p.numel() for part in (encoder, head) for p in part.parameters()) == count


@needs_no_grad
@pytest.mark.parametrize("chunk", [8, 16, 32])
@pytest.mark.parametrize("left_frames", [32, 64, 128, -1])
def test_streaming_equals_masked_full_context(chunk, left_frames):
    encoder, left = tiny(), max(left_frames // chunk, -1)
    x, x_lens = torch.randn(5, 339, NUM_BINS), tensor([339, 338, 198, 135, 13])
    whole, y_lens, _ = encoder(x, x_lens, None, chunk, left)
    assert y_lens.tolist() == [83, 83, 48, 32, 2]
    parts, state = stream(encoder, x, x_lens, chunk, left)
    close(parts[:, : whole.shape[1]], whole)
    assert (parts[:, whole.shape[1] :] == 0).all()
    assert state.offset.tolist() == y_lens.tolist()


@needs_no_grad
@pytest.mark.parametrize("num_frames", [*range(135, 153), 9, 10, 15, 64, 77, 78, 79])
def test_every_end_of_an_utterance_comes_out(num_frames):
    encoder = tiny()
    x, x_lens = torch.randn(1, num_frames, NUM_BINS), tensor([num_frames])
    whole, y_lens, _ = encoder(x, x_lens, None, 16, 1)
    assert y_lens.tolist() == [((num_frames - 7) // 2 + 1) // 2]
    close(stream(encoder, x, x_lens, 16, 1)[0][:, : whole.shape[1]], whole)


@needs_no_grad
def test_the_last_call_may_take_all_that_is_left():
    encoder = tiny()
    x = torch.randn(1, 170, NUM_BINS)
    whole, _, _ = encoder(x, tensor([170]), None, 16, 2)
    first, _, state = encoder(x[:, :77], tensor([77]), encoder.init_state(1, 32), 16, 2)
    rest = nn.functional.pad(x[:, 64:], (0, 0, 0, encoder.flush_frames(0)), value=9.0)
    last, last_lens, _ = encoder(rest, tensor([106]), state, 16, 2)
    assert last_lens.tolist() == [25]
    close(torch.cat([first, last], 1)[:, : whole.shape[1]], whole)


@needs_no_grad
@pytest.mark.parametrize("chunks_per_call", [2, 5])
def test_several_chunks_in_a_call_equal_one(chunks_per_call):
    encoder = tiny()
    x, x_lens = torch.randn(2, 250, NUM_BINS), tensor([250, 199])
    one, _ = stream(encoder, x, x_lens, 8, 2)
    several, _ = stream(encoder, x, x_lens, 8, 2, chunks_per_call)
    size = min(one.shape[1], several.shape[1])
    close(several[:, :size], one[:, :size])


@needs_no_grad
@pytest.mark.parametrize(("chunk", "left"), [(0, -1), (4, 3), (8, 2), (32, -1)])
def test_the_context_may_be_tensors(chunk, left):
    encoder = tiny()
    x, x_lens = torch.randn(2, 150, NUM_BINS), tensor([150, 44])
    y, _, _ = encoder(x, x_lens, None, chunk, left)
    close(encoder(x, x_lens, None, tensor(chunk), tensor(left), tensor(0))[0], y)
    if chunk:
        close(*(stream(encoder, x, x_lens, chunk, left, wrap=wrap)[0] for wrap in (int, tensor)))


@needs_no_grad
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("chunk", "left"), [(0, -1), (4, 2), (16, 1)])
def test_an_utterance_is_the_same_alone_and_in_a_batch(causal, chunk, left):
    if chunk and not causal:
        return
    encoder = tiny(causal=causal)
    x, x_lens = torch.randn(5, 90, NUM_BINS), tensor([90, 57, 33, 9, 8])  # the last gives no frame
    x[1, 57:] = torch.nan
    y, y_lens, _ = encoder(x, x_lens, None, chunk, left)
    assert y_lens.tolist() == [21, 13, 7, 1, 0]
    for i, (n, t) in enumerate(zip(x_lens, y_lens, strict=True)):
        alone, alone_lens, _ = encoder(x[i : i + 1, :n], x_lens[i : i + 1], None, chunk, left)
        assert alone_lens.tolist() == [t]
        close(y[i : i + 1, :t], alone[:, :t])
        assert (y[i, t:] == 0).all()


@needs_no_grad
@pytest.mark.parametrize("field", [f.name for f in fields(ZipformerState)])
def test_every_field_of_the_state_matters(field):
    encoder = tiny()
    x = torch.randn(1, 77, NUM_BINS)
    _, state = stream(encoder, torch.randn(1, 64, NUM_BINS), tensor([64]), 8, 3)
    without = replace(state, **{field: torch.zeros_like(getattr(state, field))})
    y, without_y = (encoder(x, tensor([77]), s, 8, 3)[0] for s in (state, without))
    assert (y - without_y).abs().max() > 1e-3


@needs_no_grad
def test_every_part_of_the_memory_matters():
    encoder = tiny()
    x = torch.randn(1, 77, NUM_BINS)
    _, state = stream(encoder, torch.randn(1, 200, NUM_BINS), tensor([200]), 16, 1)
    expected = encoder(x, tensor([77]), state, 16, 1)[0]
    for name in ("memory", "convolutions"):
        whole = getattr(state, name)
        for part in range(0, whole.shape[-1], whole.shape[-1] // 12):
            changed = whole.clone()
            changed[..., part : part + whole.shape[-1] // 12] = 0
            y = encoder(x, tensor([77]), replace(state, **{name: changed}), 16, 1)[0]
            assert (y - expected).abs().max() > 1e-5


@needs_no_grad
def test_joined_and_selected_streams_are_the_streams():
    encoder = tiny()
    x, lens = torch.randn(3, 77, NUM_BINS), tensor([77] * 3)
    states = [encoder.init_state(1, 24)]
    states += [stream(encoder, torch.randn(1, n, NUM_BINS), tensor([n]), 8, 3)[1] for n in (32, 96)]
    alone = [encoder(x[i : i + 1], lens[:1], s, 8, 3) for i, s in enumerate(states)]
    y, _, state = encoder(x, lens, join(states), 8, 3)
    close(y, torch.cat([a[0] for a in alone]))
    for part, (_, _, expected) in zip(split(state), alone, strict=True):
        for a, b in zip(part.tensors(), expected.tensors(), strict=True):
            close(a, b)
    index = tensor([2, 0, 2])
    close(encoder(x[index], lens, select(join(states), index), 8, 3)[0], y[index])


@needs_no_grad
def test_a_call_with_nothing_for_a_stream_leaves_it_as_it_is():
    encoder = tiny()
    _, state = stream(encoder, torch.randn(2, 64, NUM_BINS), tensor([64, 64]), 8, 2)
    _, _, after = encoder(torch.randn(2, 77, NUM_BINS), tensor([77, 0]), state, 8, 2)
    for a, b in zip(split(after)[1].tensors(), split(state)[1].tensors(), strict=True):
        close(a, b, atol=0)


@needs_no_grad
def test_the_future_beyond_a_chunk_is_not_heard():
    encoder = tiny()
    x, x_lens = torch.randn(1, 131, NUM_BINS), tensor([131])
    changed = x.clone()
    changed[:, 64 + 13 :] += 1  # after all that two chunks of 8 frames see
    y, changed_y = (encoder(frames, x_lens, None, 8)[0] for frames in (x, changed))
    close(changed_y[:, :16], y[:, :16], atol=0)
    assert (changed_y[:, 16] - y[:, 16]).abs().max() > 1e-4
    changed = x.clone()
    changed[:, 64 + 12] += 1
    changed_y = encoder(changed, x_lens, None, 8)[0]
    close(changed_y[:, :8], y[:, :8], atol=0)
    assert (changed_y[:, 8] - y[:, 8]).abs().max() > 1e-5  # a frame sees its chunk to the end


@needs_no_grad
@pytest.mark.parametrize("causal", [False, True])
def test_pieces_are_the_whole(causal):
    """Without gradients it is computed in pieces: several for the front end and for attention."""
    encoder, lens = tiny(causal=causal), tensor([437, 303])
    x = torch.randn(2, 437, NUM_BINS)
    chunk, left = (8, 2) if causal else (0, -1)
    assert lens.min() // 2 > max(PIECE, QUERIES)
    with torch.enable_grad():
        whole, whole_lens, state = encoder(x, lens, chunk=chunk, left=left)
    with torch.no_grad():
        pieces, pieces_lens, other = encoder(x, lens, chunk=chunk, left=left)
    assert whole.requires_grad
    assert torch.equal(whole_lens, pieces_lens)
    close(pieces, whole)
    for field in fields(ZipformerState):
        close(getattr(other, field.name), getattr(state, field.name))


def test_the_left_context_ends():
    encoder = tiny(kernel_sizes=[1, 1, 1], depths=[1, 1, 1])
    x, x_lens = torch.randn(1, 400, NUM_BINS), tensor([400])
    changed = x.clone()
    changed[:, :32] += 1
    for left, end in ((0, 16), (1, 8 * (2 + 3 * 3))):  # the context adds up over three layers
        y, changed_y = (encoder(frames, x_lens, None, 8, left)[0] for frames in (x, changed))
        close(changed_y[:, end:], y[:, end:], atol=0)
    assert (changed_y - y)[:, 16:24].abs().max() > 1e-5


@needs_no_grad
def test_a_stream_may_run_for_days():
    encoder = tiny()
    x, x_lens = torch.randn(1, 77, NUM_BINS), tensor([77])
    _, state = stream(encoder, torch.randn(1, 128, NUM_BINS), tensor([128]), 8, 2)
    y, late = (
        encoder(x, x_lens, replace(state, offset=state.offset + days), 8, 2)[0]
        for days in (0, 25 * 86400 * 8)
    )
    close(late, y, atol=0)


# ---- what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [1, 1]}, r"encoder\.depths: \[1, 1\], expected 3 positive numbers"),
        ({"rates": [1, 0, 2]}, r"encoder\.rates: \[1, 0, 2\], expected 3 positive numbers"),
        ({"dims": []}, r"encoder\.dims: \[\], expected"),
        ({"kernel_sizes": [9, 4, 3]}, r"encoder\.kernel_sizes: 4 is even, expected odd"),
        ({"unmasked_dims": [8, 21, 4]}, r"encoder\.unmasked_dims: \[8, 21, 4\], beyond"),
        ({"position_dim": 5}, r"encoder\.position_dim: 5 is odd"),
        ({"causal": False, "chunk": ChunkConfig()}, r"encoder\.chunk\.dynamic: true needs encoder\.causal"),
        ({"chunk": ChunkConfig()}, r"encoder\.chunk\.chunks: \[\], expected multiples of 4"),
        ({"chunk": ChunkConfig(chunks=[8, 6])}, r"encoder\.chunk\.chunks: \[8, 6\], expected multiples of 4"),
        ({"chunk": ChunkConfig(dynamic=False, max_right=1)}, r"encoder\.chunk\.max_right: 1, and layers"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_too_few_bins():
    with pytest.raises(ConfigError, match=r"^features\.num_bins: 6, expected 7 or more"):
        Zipformer(ZipformerConfig(), 6)


def test_contexts_that_no_chunk_allows():
    x, x_lens = torch.randn(1, 77, NUM_BINS), tensor([77])
    with pytest.raises(ConfigError, match=r"^chunk: 6 encoder frames, not a multiple of 4 .*; take 8$"):
        tiny()(x, x_lens, None, 6)
    with pytest.raises(ConfigError, match=r"^right: 1, and layers of a Zipformer cannot look ahead"):
        tiny()(x, x_lens, None, 8, 1, 1)
    with pytest.raises(ConfigError, match=r"^delay: 2, and"):
        tiny().init_state(1, 8, 2)
    offline = tiny(causal=False)
    with pytest.raises(ConfigError, match=r"^encoder\.causal: false, so it has no chunks"):
        offline(x, x_lens, None, 8)
    with pytest.raises(ConfigError, match=r"^encoder\.causal: false, so it cannot stream"):
        offline.init_state(1, 8)


# ---- training


def test_training_drops_evaluation_does_not():
    encoder = tiny()
    x, x_lens = torch.randn(2, 90, NUM_BINS), tensor([90, 60])
    y, again = (encoder(x, x_lens)[0] for _ in range(2))
    close(again, y, atol=0)
    encoder.train()
    dropped, again = (encoder(x, x_lens)[0] for _ in range(2))
    assert (dropped - again).abs().max() > 1e-3
    encoder.eval()
    close(encoder(x, x_lens)[0], y, atol=0)


@pytest.mark.parametrize("batch_count", [0.0, 100_000.0])
def test_every_parameter_learns(batch_count):
    encoder = tiny().train()
    set_batch_count(scheduled(encoder), batch_count)
    for _ in range(5):  # layers are skipped at first
        encoder(torch.randn(4, 150, NUM_BINS), tensor([150, 120, 90, 60]), None, 8, 2)[
            0
        ].square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
    idle = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert idle == [f"stacks.{i}.layers.{j}.unused_scale" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0))]


def test_the_batch_count_reaches_all_schedules():
    encoder = tiny()
    set_batch_count(scheduled(encoder), 1234.5)
    assert encoder.batch_count == 1234.5
    assert encoder.stacks[1].layers[1].convolution_2.gate_balancer.batch_count == 1234.5
    assert "batch_count" not in str(list(encoder.state_dict()))


@pytest.mark.parametrize(
    ("batch_count", "expected"),
    [
        (0, (0.3, 0.2, 0.2, 0.1, 0.25, 0.5, 0.2, 0.9)),
        (4000, (0.26, 0.05, 0.05, 0.01, 0.025, 0, 0.163, 0.76)),
        (20000, (0.1, 0, 0, 0.01 * 30 / 46, 0.025, 0, 0.015, 0.2)),
        (1e6, (0.1, 0, 0, 0, 0.025, 0, 0.015, 0.2)),
    ],
)
def test_rates_fall_as_published(batch_count, expected):
    assert Rates.at(batch_count, 0.1)[1:] == pytest.approx(expected)


def test_layers_begin_one_after_the_other():
    first, second = (layer_skip(1, 3, 4, layer, 2) for layer in range(2))
    assert (first(0), first(2000), first(2500), first(3000)) == pytest.approx((0.5, 0.5, 0.07, 0.07))
    assert (second(2500), second(2750), second(3000)) == pytest.approx((0.5, 0.285, 0.07))


def test_a_skipped_layer_changes_nothing():
    encoder = tiny(depths=[1, 1, 1]).train()
    layer = encoder.stacks[0].layers[0]
    layer.skip = layer_skip(0, 1, 1, 0, 1)
    before, x = torch.randn(2000, 3, 12), torch.randn(2000, 3, 12)
    y = layer.bypass(before, x, Rates.at(0, 0.1), layer.skip)
    skipped = (y == before).all(-1).all(-1)
    assert 0.45 < skipped.float().mean() < 0.55
    assert ((y != before).all(-1).all(-1) | skipped).all()


def test_dropout_is_shared_over_time_and_keeps_the_mean():
    x = torch.ones(20, 7, 500)
    y = dropout(x, 0.3)
    assert (y == y[:, :1]).all()
    assert y.mean() == pytest.approx(1, abs=0.03)
    assert y.max() == pytest.approx(1 / 0.7)
    assert kept(torch.zeros(5000, 1, 1), 0.3).mean() == pytest.approx(0.7, abs=0.03)


def test_feature_masks_agree_between_stacks():
    masks = feature_masks(torch.zeros(20_000, 1, 1), [12, 20], [8, 10])
    assert [mask.shape for mask in masks] == [(20_000, 1, 12), (20_000, 1, 20)]
    rows = torch.cat([mask[:, 0] for mask in masks], dim=1)
    assert (rows[:, :8] == 1).all()
    half, rest = rows[:, 8:10], rows[:, 10:12]
    for part, value in (((12, 22), 1.0), ((22, 27), half[:, :1]), ((27, 32), rest[:, :1])):
        assert (rows[:, slice(*part)] == value).all()
    assert half.mean() == pytest.approx(0.875, abs=0.01)
    assert rest.mean() == pytest.approx(0.875**2, abs=0.01)
    assert (rest <= half).all()


# ---- the chunked convolution


@pytest.mark.parametrize("chunk", [3, 4, 7, 100, 0])
def test_the_chunked_convolution_is_the_sum_of_two(chunk):
    convolution, length, side = ChunkConvolution(2, 5), 10, 2
    nn.init.normal_(convolution.edges)
    x = torch.randn(1, 2, length)
    y = convolution(nn.functional.pad(x, (side, 0)), Edges.at(tensor([0]), tensor([length]), length, chunk))
    size = chunk if 0 < chunk <= length else length
    past, within = convolution.past, convolution.within
    for t in range(length):
        first = t // size * size
        for c in range(2):
            total = past.bias[c] + sum(
                past.weight[c, 0, 0, side - k] * x[0, c, t - k] for k in range(side + 1) if t >= k
            )
            own = within.bias[c] + sum(
                within.weight[c, 0, 0, side + k] * x[0, c, t + k]
                for k in range(-side, side + 1)
                if first <= t + k < min(first + size, length)
            )
            before, behind = t - first, first + size - 1 - t
            left = convolution.edges[0, c, before] if before < 5 else 0
            right = convolution.edges[1, c, 4 - behind] if behind < 5 else 0
            close(y[0, c, t], total + own * (1 + left + right))
