"""The likeliest segment ends of a known text: against enumeration, and the same in any batch."""

import itertools
from dataclasses import replace

import pytest
import torch

from asr.model.boundaries import likeliest_ends
from asr.model.segmental import SegmentalConfig, SegmentalDecoder

CONFIG = SegmentalConfig(dim=16, num_layers=1, num_heads=2, ff_dim=32, length_dim=8, max_segment_frames=3)
EVERYWHERE = 20


def tiny(**changes):
    decoder = SegmentalDecoder(replace(CONFIG, **changes), 6, memory_dim=6).eval()
    with torch.no_grad():  # peaked enough for everything to matter
        for layer in (decoder.out, decoder.cross, decoder.length.out, decoder.length.frame):
            layer.weight *= 4
    return decoder


def loss_of(decoder, y, tokens, ends):
    """-log p(tokens, ends | y) of one utterance (1, T, C) for each of many ends."""
    count, rows = len(ends), torch.tensor(ends).reshape(len(ends), -1)
    frames, lens = (torch.full((count,), value) for value in (y.shape[1], len(tokens)))
    texts = torch.tensor([tokens] * count, dtype=torch.int64).reshape(count, -1)
    return decoder.loss(y.expand(count, -1, -1), frames, texts, lens, rows, 0.0).detach()


def found_in(decoder, y, tokens, near, reach=EVERYWHERE):
    rows = (torch.tensor([x], dtype=torch.int64).reshape(1, -1) for x in (tokens, near))
    lens = (torch.tensor([x]) for x in (y.shape[1], len(tokens)))
    (y_lens, token_lens), (row, ends) = lens, rows
    found = likeliest_ends(decoder, y, y_lens, row, token_lens, ends, reach)
    return tuple(found.end[0].tolist()), found.score[0]


@pytest.mark.parametrize("left_tokens", [-1, 1])
@pytest.mark.parametrize("tokens", [(2,), (3, 3), (4, 2, 5), (2, 3, 4, 5, 2)])
@pytest.mark.parametrize("num_frames", [5, 8])
def test_the_ends_are_the_best_of_all(num_frames, tokens, left_tokens):
    decoder, y = tiny(left_tokens=left_tokens), torch.randn(1, num_frames, 6)
    every = list(itertools.combinations(range(1, num_frames + 1), len(tokens)))
    losses = loss_of(decoder, y, tokens, every)
    end, score = found_in(decoder, y, tokens, near=every[0])
    assert end == every[int(losses.argmin())]
    assert (score < 0).all()
    assert float(score.sum()) > -float(losses.min()) - 1e-4  # without the frames after the last token


@pytest.mark.parametrize("num_layers", [1, 3])
def test_scores_are_those_of_the_loss(num_layers):
    decoder, y, ends = tiny(num_layers=num_layers), torch.randn(1, 9, 6), (2, 3, 9)
    found, score = found_in(decoder, y, (4, 4, 2), ends, reach=0)
    assert found == ends
    torch.testing.assert_close(-score.sum()[None], loss_of(decoder, y, (4, 4, 2), [ends]), rtol=0, atol=1e-4)


def test_a_decoder_of_several_layers_gets_no_worse():
    """It may miss the best ends, but their score agrees with the loss and is no worse than before."""
    decoder, tokens = tiny(num_layers=3), (3, 3, 5)
    for _ in range(5):
        y = torch.randn(1, 8, 6)
        end, score = found_in(decoder, y, tokens, (1, 2, 3))
        again, alone = found_in(decoder, y, tokens, end, reach=0)
        assert again == end
        torch.testing.assert_close(score, alone, rtol=0, atol=1e-4)
        assert loss_of(decoder, y, tokens, [end]) <= loss_of(decoder, y, tokens, [(1, 2, 3)])


def test_ends_stay_near():
    decoder, y, near = tiny(), torch.randn(1, 12, 6), (3, 6, 7)
    every = list(itertools.combinations(range(1, 13), 3))
    close = [x for x in every if max(abs(a - b) for a, b in zip(x, near, strict=True)) <= 2]
    losses = loss_of(decoder, y, (2, 5, 3), close)
    assert found_in(decoder, y, (2, 5, 3), near, reach=2)[0] == close[int(losses.argmin())]
    assert len(close) < len(every)


def test_utterances_do_not_change_each_other():
    decoder, y = tiny(num_layers=2), torch.randn(5, 10, 6)
    tokens, y_lens = [(), (3, 4), (2, 2, 5, 3), (4,), (5, 2, 3)], torch.tensor([4, 7, 10, 1, 3])
    near = [(), (2, 2), (9, 9, 9, 9), (1,), (0, 0, 5)]
    lens = torch.tensor([len(x) for x in tokens])
    rows, ends = (torch.tensor([[*x, *[0] * (4 - len(x))] for x in some]) for some in (tokens, near))
    together = likeliest_ends(decoder, y, y_lens, rows, lens, ends)
    for n, text in enumerate(tokens):
        end, score = found_in(decoder, y[n : n + 1, : y_lens[n]], text, near[n], reach=6)
        assert tuple(together.end[n, : len(text)].tolist()) == end
        torch.testing.assert_close(together.score[n, : len(text)], score, rtol=0, atol=1e-4)
