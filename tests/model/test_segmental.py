"""The segmental decoder: one segment is ordinary attention; all texts and boundaries sum to 1."""

import itertools
from dataclasses import replace

import pytest
import torch

from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import SOS_EOS, TransformerDecoder, Window
from asr.model.segmental import SegmentalConfig, SegmentalDecoder, end_odds, fit_ends
from asr.model.torch_scorer import TorchScorer

CONFIG = SegmentalConfig(dim=16, num_layers=2, num_heads=2, ff_dim=32, length_dim=8, max_segment_frames=4)


def tiny(num_tokens=5, **changes):
    decoder = SegmentalDecoder(replace(CONFIG, **changes), num_tokens, memory_dim=6).eval()
    with torch.no_grad():  # peaked enough for everything to matter
        decoder.out.weight *= 3
        decoder.length.out.weight *= 3
    return decoder


def every_path(num_frames, units):
    """All pairs of tokens and their ends within num_frames; the last token may end at the last frame."""
    for count in range(num_frames + 1):
        for ends in itertools.combinations(range(1, num_frames + 1), count):
            for tokens in itertools.product(units, repeat=count):
                yield tokens, ends


def padded(rows, width):
    return torch.tensor([[*x, *[0] * (width - len(x))] for x in rows], dtype=torch.int64).reshape(
        len(rows), width
    )


def loss_of(decoder, y, tokens, ends, smoothing=0.0, width=None):
    """The loss of one or several utterances y (N or 1, T, C) with lists of tokens and ends."""
    n, width = len(tokens), width or max(map(len, tokens), default=0)
    y_lens = torch.full((n,), y.shape[1])
    lens = torch.tensor([len(x) for x in tokens])
    return decoder.loss(
        y.expand(n, -1, -1), y_lens, padded(tokens, width), lens, padded(ends, width), smoothing
    )


@pytest.mark.parametrize("max_segment_frames", [2, 9])
@pytest.mark.parametrize(("num_frames", "num_tokens"), [(1, 4), (2, 5), (4, 4)])
def test_all_texts_and_boundaries_are_certain_together(num_frames, num_tokens, max_segment_frames):
    decoder = tiny(num_tokens, max_segment_frames=max_segment_frames)
    y = torch.randn(1, num_frames, 6)
    tokens, ends = zip(*every_path(num_frames, range(2, num_tokens)), strict=True)
    total = (-loss_of(decoder, y, tokens, ends, width=num_frames).double()).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_the_loss_is_that_of_the_boundaries_written_out():
    """Step by step: each segment by itself, with its frames and its length."""
    decoder, y = tiny(), torch.randn(1, 9, 6)
    for tokens, ends in (((3, 2, 4), (1, 3, 8)), ((3, 2, 4), (2, 8, 9)), ((), ())):
        keys, values = decoder.memory(y)
        state, last, start, expected = None, SOS_EOS, 0, 0.0
        segments = list(zip(tokens, ends, strict=True))
        if not ends or ends[-1] < 9:
            segments.append((SOS_EOS, 9))
        for token, end in segments:
            for t in range(start + 1, min(end, 8) + 1):
                odds = decoder.length(y[0, t - 1], torch.tensor(last), torch.tensor(t - start))
                p = odds.sigmoid() if t == end else 1 - odds.sigmoid()
                expected -= p.log()
            window = Window(torch.tensor([[max(start, end - 4)]]), torch.tensor([[end]]))
            found = decoder(torch.tensor([[last]]), keys, values, torch.tensor([9]), state, window)
            p, state = decoder.log_probs(found.logits)[0, 0].exp(), found.state
            goes_on = 1 - p[SOS_EOS] if end == 9 and token != SOS_EOS else 1.0
            expected -= (p[token] * goes_on).log()
            last, start = token, end
        torch.testing.assert_close(
            loss_of(decoder, y, [tokens], [ends]), expected[None], rtol=1e-5, atol=1e-5
        )


def test_the_length_model_has_its_weight():
    y, tokens, ends = torch.randn(1, 6, 6), [(3, 2)], [(2, 4)]
    decoder = tiny()
    losses = []
    for weight in (0.0, 1.0, 2.5):
        decoder.config = replace(decoder.config, length_weight=weight)
        losses.append(loss_of(decoder, y, tokens, ends))
    torch.testing.assert_close(losses[2] - losses[0], 2.5 * (losses[1] - losses[0]))
    assert losses[1] > losses[0] + 0.1


def test_smoothing_spreads_over_the_tokens_that_can_be():
    decoder, y = tiny(length_weight=0.0), torch.randn(1, 5, 6)
    plain, half = (loss_of(decoder, y, [(3,)], [(5,)], s) for s in (0.0, 0.5))
    window = Window(torch.tensor([[1]]), torch.tensor([[5]]))
    logits = decoder(torch.tensor([[SOS_EOS]]), *decoder.memory(y), torch.tensor([5]), window=window).logits
    uniform = -logits[0, 0, 1:].log_softmax(-1).sum() / 5
    torch.testing.assert_close(half, 0.5 * plain + 0.5 * uniform[None])


def test_one_segment_is_ordinary_attention():
    """With the same parameters, by name; only the normalisation over next tokens differs."""
    decoder = tiny(max_segment_frames=20)
    ordinary = TransformerDecoder(CONFIG, 5, memory_dim=6).eval()
    missing, unexpected = ordinary.load_state_dict(decoder.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("length.") for name in unexpected)
    y, tokens, lens = torch.randn(2, 9, 6), torch.tensor([[1, 3, 2], [1, 4, 4]]), torch.tensor([9, 9])
    expected = ordinary(tokens, *ordinary.memory(y), lens).logits
    window = Window(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 9))
    found = decoder(tokens, *decoder.memory(y), lens, window=window).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    log_probs, all_units = decoder.log_probs(found), expected[..., 1:].log_softmax(-1)  # never blank
    torch.testing.assert_close(log_probs[..., 1], all_units[..., 0], rtol=0, atol=1e-6)
    units = log_probs[..., 2:] + torch.log1p(-log_probs[..., 1:2].exp())
    torch.testing.assert_close(units, all_units[..., 1:], rtol=0, atol=1e-5)

    alone = loss_of(decoder, y[:1], [(3,)], [(9,)])  # U = 1, ending at the last frame
    lengths = sum(
        torch.nn.functional.softplus(decoder.length(y[0, t - 1], torch.tensor(1), torch.tensor(t)))
        for t in range(1, 9)
    )
    torch.testing.assert_close(alone[0] - lengths, -all_units[0, 0, 2], rtol=0, atol=1e-5)


def test_a_token_hears_its_segment_and_no_more():
    """Frames after a segment do not change its loss; of a long one only the last frames count."""
    decoder = tiny(num_layers=1, length_weight=0.0)
    y = torch.randn(1, 12, 6)
    tokens, ends = [(3, 2)], [(3, 10)]

    def change(frame):
        y.grad = None
        loss_of(decoder, y.requires_grad_(), tokens, ends).backward()
        return float(y.grad[0, frame].abs().sum())

    assert [t for t in range(12) if change(t) > 0] == [0, 1, 2, 6, 7, 8, 9, 10, 11]


def test_gradients_reach_everything():
    decoder = tiny()
    loss_of(decoder, torch.randn(2, 8, 6), [(3, 2), (4, 3)], [(2, 4), (3, 8)], 0.1).sum().backward()
    for name, p in decoder.named_parameters():
        assert p.grad is not None, name
        assert 0 < p.grad.abs().sum() < torch.inf, name


def test_padding_changes_nothing():
    """Padding of frames and of tokens; also with no tokens, no frames, or too many tokens."""
    decoder = tiny()
    y, lens = torch.randn(5, 9, 6), [9, 4, 7, 0, 2]
    tokens, ends = [(3, 2, 4), (2,), (), (), (2, 3, 4)], [(2, 5, 9), (3,), (), (), (1, 2, 3)]
    rows, widths = (padded(x, 6) for x in (tokens, ends)), torch.tensor([len(x) for x in tokens])
    ids, bounds = rows
    bounds[:, 3:] = 77
    together = decoder.loss(y, torch.tensor(lens), ids, widths, bounds, 0.1)
    for n, length in enumerate(lens):
        width = int(widths[n])
        if length < width or not length:
            assert together[n] == 0
            continue
        one = decoder.loss(
            y[n : n + 1, :length],
            torch.tensor([length]),
            ids[n : n + 1, :width],
            widths[n : n + 1],
            bounds[n : n + 1, :width],
            0.1,
        )
        torch.testing.assert_close(together[n], one[0], rtol=1e-5, atol=1e-5)
    together.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize(
    ("ends", "frames", "expected"),
    [
        ([2, 5, 9], 9, [2, 5, 9]),
        ([2, 2, 2], 9, [2, 3, 4]),
        ([9, 9, 9], 9, [7, 8, 9]),
        ([30, 4, 50], 9, [7, 8, 9]),
        ([0, 0, 8], 9, [1, 2, 8]),
        ([5, 3, 4], 9, [5, 6, 7]),
        ([1, 1, 1], 3, [1, 2, 3]),
    ],
)
def test_boundaries_are_mended(ends, frames, expected):
    found = fit_ends(torch.tensor([[*ends, 0, 99]]), torch.tensor([3]), torch.tensor([frames]))
    assert found.tolist() == [[*expected, frames, frames, frames]]


def test_an_utterance_without_an_alignment_is_an_error():
    decoder, lens = tiny(), torch.tensor([1])
    with pytest.raises(ConfigError, match="asr align"):
        decoder.loss(torch.randn(1, 4, 6), lens + 3, torch.tensor([[3]]), lens, torch.zeros(1, 0).long(), 0.1)
    empty = torch.zeros(1, 0).long()
    assert decoder.loss(torch.randn(1, 4, 6), lens + 3, empty, lens - 1, empty, 0.1) > 0


@pytest.mark.parametrize(
    "wrong",
    [{"max_segment_frames": 0}, {"length_dim": 0}, {"length_weight": -1.0}, {"reverse_layers": 2}],
)
def test_a_config_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SegmentalConfig(**wrong)


def test_lengths_are_counted_in_training_only():
    decoder = tiny(max_segment_frames=3)
    y, tokens, ends = torch.randn(2, 8, 6), [(3, 2), (3, 3)], [(1, 7), (3, 8)]
    loss_of(decoder, y, tokens, ends)
    assert decoder.length.counts.sum() == 0
    torch.testing.assert_close(decoder.length.log_lengths().exp(), torch.full((5, 3), 1 / 3))
    decoder.train()
    loss_of(decoder, y, tokens, ends)
    expected = torch.zeros(5, 3)
    for token, length in ((3, 1), (2, 3), (SOS_EOS, 1), (3, 3), (3, 3)):  # 6 and 5 frames are at least 3
        expected[token, length - 1] += 1
    torch.testing.assert_close(decoder.length.counts, expected)
    assert "length.counts" in decoder.state_dict()
    p = decoder.length.log_lengths().exp()
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    average = (expected.sum(0) + 1) / 8
    torch.testing.assert_close(p[4], average)  # never seen
    torch.testing.assert_close(p[3], (expected[3] + 10 * average) / 13)
    decoder.length.count(torch.full((5000,), 4), torch.full((5000,), 2))
    assert decoder.length.log_lengths().exp()[4, 1] > 0.99


def test_the_model_trains_on_an_alignment():
    encoder = ConformerConfig(dim=16, num_layers=1, num_heads=2, ff_dim=16, subsampling_channels=4)
    model = build_model(FbankConfig(num_bins=16), encoder, CONFIG, LossConfig(), 7)
    x, x_lens = torch.randn(2, 40, 16), torch.tensor([40, 33])
    tokens, lens = torch.tensor([[3, 4], [5, 0]]), torch.tensor([2, 1])
    loss = model(x, x_lens, tokens, lens, token_ends=torch.tensor([[3, 9], [5, 0]]))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ConfigError, match="asr align"):
        model(x, x_lens, tokens, lens)


def test_ends_are_odds():
    logits = torch.randn(3, 5)
    ends = end_odds(logits)
    torch.testing.assert_close(ends.sigmoid(), logits[:, 1:].softmax(-1)[:, 0])


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("mode", ["segmental", "segmental-simple", "segmental-label"])
def test_what_is_found_is_as_likely_as_the_loss_says(mode, num_layers):
    """With one layer, whose state does not depend on earlier audio, it is also the best."""
    encoder = ConformerConfig(dim=16, num_layers=1, num_heads=2, ff_dim=16, subsampling_channels=4)
    model = build_model(
        FbankConfig(num_bins=16), encoder, replace(CONFIG, num_layers=num_layers), LossConfig(), 4
    ).eval()
    with torch.no_grad():
        model.decoder.out.weight *= 3
    wave = torch.randn(1, 2880)
    y, _ = model.encode(*model.features(wave, torch.tensor([2880])))
    config = SearchConfig(beam=1000, nbest=3, min_emit=0.0)
    (found,) = decode(TorchScorer(model, "cpu"), mode, [wave[0].numpy()], config)
    assert y.shape[1] == 5
    tokens, ends = zip(*every_path(5, (2, 3)), strict=True)
    scores = -loss_of(model.decoder, y, tokens, ends).detach()
    exact = {path: float(score) for path, score in zip(zip(tokens, ends, strict=True), scores, strict=True)}
    for x in found:
        assert x.score == pytest.approx(exact[x.tokens, tuple(t + 1 for t in x.frames)], abs=1e-4)
    if num_layers == 1:
        best = sorted(exact.items(), key=lambda item: -item[1])
        texts = list(dict.fromkeys(text for (text, _), _ in best))
        assert [x.tokens for x in found] == texts[:3]
