from collections import Counter
from typing import Any

import pytest
import torch
from torch import tensor

from asr.context import WHOLE
from asr.errors import ConfigError
from asr.model.masks import ChunkConfig, context_mask, draw_context, valid_mask


def _may_attend(i: int, j: int, num_frames: int, chunk: int, left: int, right: int) -> bool:
    first = max(0, (i // chunk - left) * chunk) if left >= 0 else 0
    return first <= j < min((i // chunk + 1 + right) * chunk, num_frames)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("left", [-1, 0, 1, 2, 9])
@pytest.mark.parametrize("right", [0, 1, 2, 9])
def test_the_mask_is_the_published_formula(chunk, left, right):
    mask = context_mask(tensor([0]), tensor([9]), 0, 9, chunk, left, right)[0]
    expected = [[_may_attend(i, j, 9, chunk, left, right) for j in range(9)] for i in range(9)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("left", [-1, 0, 1])
def test_a_stream_sees_the_columns_of_the_whole_mask(left):
    whole = context_mask(tensor([0]), tensor([12]), 0, 12, 2, left)[0]
    part = context_mask(tensor([4, 8]), tensor([4, 4]), 4, 4, 2, left)
    assert torch.equal(part[0], whole[4:8, 0:8])
    assert torch.equal(part[1], whole[8:12, 4:12])


@pytest.mark.parametrize("left", [-1, 0, 1])
@pytest.mark.parametrize("right", [1, 2])
def test_a_delayed_stream_sees_rows_and_columns_of_the_whole_mask(left, right):
    whole = context_mask(tensor([0]), tensor([16]), 0, 16, 2, left, right)[0]
    part = context_mask(tensor([8, 12]), tensor([4, 4]), 8, 4, 2, left, right, delay=2 * right)
    for mask, start in zip(part, (8, 12), strict=True):
        rows = slice(start - 2 * right, start - 2 * right + 4)
        assert torch.equal(mask, whole[rows, start - 8 : start + 4])


def test_cached_frames_before_the_utterance_do_not_exist():
    mask = context_mask(tensor([1]), tensor([2]), 4, 2, 0, -1)[0]
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_padding_is_seen_by_nothing_but_itself():
    mask = context_mask(tensor([0]), tensor([2]), 0, 4, 0, -1)[0]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_valid_mask_ends_where_the_utterance_does():
    assert valid_mask(tensor([2, 0]), 3).tolist() == [[True, True, False], [False] * 3]


def _draws(num_frames: int, count: int = 2000, **config: Any) -> list[tuple[int, int, int]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(draw_context(num_frames, generator, ChunkConfig(**config))) for _ in range(count)]


def test_half_of_the_batches_have_the_whole_utterance():
    draws = _draws(400)
    assert 0.46 < draws.count(WHOLE) / len(draws) < 0.54
    chunks = Counter(chunk for chunk, _, _ in draws if chunk)
    assert set(chunks) == set(range(1, 26))
    assert max(chunks.values()) < 2 * min(chunks.values())


def test_half_of_the_chunked_batches_have_limited_left_context():
    chunked = [(chunk, left) for chunk, left, _ in _draws(100) if chunk]
    assert 0.4 < sum(left < 0 for _, left in chunked) / len(chunked) < 0.6
    assert all(left <= 99 // chunk for chunk, left in chunked)
    assert {left for chunk, left in chunked if chunk == 25} == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("num_frames", [0, 1, 2, 3])
def test_short_batches_have_a_context_too(num_frames):
    assert all(0 <= chunk <= max(num_frames, 1) for chunk, _, _ in _draws(num_frames, count=50))


def test_the_configuration_is_heeded():
    assert set(_draws(400, 50, dynamic=False)) == {WHOLE}
    draws = _draws(400, 500, max_chunk=3, limit_left=False)
    assert set(draws) == {WHOLE, (1, -1, 0), (2, -1, 0), (3, -1, 0)}
    draws = _draws(400, 500, max_chunk=2, limit_left=False, max_right=2)
    assert set(draws) == {WHOLE, *((chunk, -1, right) for chunk in (1, 2) for right in (0, 1, 2))}


def test_contexts_of_a_list_are_drawn_alike():
    draws = _draws(400, 900, contexts=[[12, 3], [0, 0], [-1, 5]])
    assert set(draws) == {(4, 3, 0), (1, 0, 0), (6, -1, 0)}
    assert min(Counter(draws).values()) > 250


@pytest.mark.parametrize("pair", [[4], [4, -1], [-2, 3], [5, 3], [4, 3, 2]])
def test_impossible_contexts_of_a_list_are_refused(pair):
    with pytest.raises(ConfigError, match=r"contexts has \[.*expected \[left, right\]"):
        ChunkConfig(contexts=[[4, 3], pair])


def test_without_look_ahead_the_contexts_are_those_that_were_always_drawn():
    """The draws of a generator must not change, or a resumed training would differ."""
    generator = torch.Generator().manual_seed(5)
    found = [tuple(draw_context(200, generator, ChunkConfig())) for _ in range(12)]
    chunked = {0: (11, 16, 0), 1: (3, 8, 0), 7: (19, -1, 0), 9: (6, 23, 0), 11: (19, -1, 0)}
    assert found == [chunked.get(n, WHOLE) for n in range(12)]


def test_chunks_that_are_listed_are_drawn_alike():
    draws = Counter(_draws(400, chunks=[8, 32, 0], left_frames=[64, 20, -1]))
    left = {8: (8, 2, -1), 32: (2, 1, -1)}
    assert set(draws) == {WHOLE, *((chunk, n, 0) for chunk, numbers in left.items() for n in numbers)}
    assert 600 < draws[WHOLE] < 740
    assert all(170 < count < 280 for draw, count in draws.items() if draw != WHOLE)


@pytest.mark.parametrize(
    "bad",
    [{"max_right": -1}, {"max_chunk": 0}, {"chunks": [4, -1]}, {"left_frames": []}, {"left_frames": [0]}],
)
def test_impossible_contexts_are_refused(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} is"):
        ChunkConfig(**bad)


def test_the_generator_alone_decides():
    assert _draws(100, count=20) == _draws(100, count=20)
