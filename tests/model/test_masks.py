from collections import Counter
from typing import Any

import pytest
import torch
from torch import tensor

from asr.model.masks import ChunkConfig, context_mask, draw_context, valid_mask


def _may_attend(i: int, j: int, num_frames: int, chunk: int, left: int) -> bool:
    first = max(0, (i // chunk - left) * chunk) if left >= 0 else 0
    return first <= j < min((i // chunk + 1) * chunk, num_frames)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("left", [-1, 0, 1, 2, 9])
def test_the_mask_is_the_published_formula(chunk, left):
    mask = context_mask(tensor([0]), tensor([9]), 0, 9, chunk, left)[0]
    expected = [[_may_attend(i, j, 9, chunk, left) for j in range(9)] for i in range(9)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("left", [-1, 0, 1])
def test_a_stream_sees_the_columns_of_the_whole_mask(left):
    whole = context_mask(tensor([0]), tensor([12]), 0, 12, 2, left)[0]
    part = context_mask(tensor([4, 8]), tensor([4, 4]), 4, 4, 2, left)
    assert torch.equal(part[0], whole[4:8, 0:8])
    assert torch.equal(part[1], whole[8:12, 4:12])


def test_cached_frames_before_the_utterance_do_not_exist():
    mask = context_mask(tensor([1]), tensor([2]), 4, 2, 0, -1)[0]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_padding_is_seen_by_nothing_but_itself():
    mask = context_mask(tensor([0]), tensor([2]), 0, 4, 0, -1)[0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_valid_mask_ends_where_the_utterance_does():
    assert valid_mask(tensor([2, 0]), 3).tolist() == [[True, True, False], [False] * 3]


def _draws(num_frames: int, count: int = 2000, **config: Any) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(3)
    return [draw_context(num_frames, generator, ChunkConfig(**config)) for _ in range(count)]


def test_half_of_the_batches_have_the_whole_utterance():
    draws = _draws(400)
    assert 0.46 < draws.count((0, -1)) / len(draws) < 0.54
    chunks = Counter(chunk for chunk, _ in draws if chunk)
    assert set(chunks) == set(range(1, 26))
    assert max(chunks.values()) < 2 * min(chunks.values())


def test_half_of_the_chunked_batches_have_limited_left_context():
    chunked = [(chunk, left) for chunk, left in _draws(100) if chunk]
    assert 0.4 < sum(left < 0 for _, left in chunked) / len(chunked) < 0.6
    assert all(left <= 99 // chunk for chunk, left in chunked)
    assert {left for chunk, left in chunked if chunk == 25} == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("num_frames", [0, 1, 2, 3])
def test_short_batches_have_a_context_too(num_frames):
    assert all(0 <= chunk <= max(num_frames, 1) for chunk, _ in _draws(num_frames, count=50))


def test_the_configuration_is_heeded():
    assert set(_draws(400, 50, dynamic=False)) == {(0, -1)}
    draws = _draws(400, 500, max_chunk=3, limit_left=False)
    assert set(draws) == {(0, -1), (1, -1), (2, -1), (3, -1)}


def test_the_generator_alone_decides():
    assert _draws(100, count=20) == _draws(100, count=20)
