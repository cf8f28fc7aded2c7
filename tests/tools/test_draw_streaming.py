from pathlib import Path

import numpy as np
import pytest

from tools.draw_streaming import (
    ENDS,
    FIGURES,
    FOLDER,
    SPIKES,
    draw,
    hearings,
    look_ahead_mask,
    through_layers,
    utterance,
    writings,
)

MAX_BYTES = 60_000


def test_all_pictures_are_written_the_same_each_time_and_small(tmp_path):
    files = draw(tmp_path / "first")
    assert [x.name for x in files] == list(FIGURES)
    assert all(0 < x.stat().st_size < MAX_BYTES for x in files)
    again = draw(tmp_path / "second")
    assert [x.read_bytes() for x in files] == [x.read_bytes() for x in again]


def test_the_text_shows_every_picture_and_no_other():
    text = (FOLDER.parent / "streaming.md").read_text(encoding="utf-8")
    shown = {Path(part.split(")")[0]).name for part in text.split("](images/")[1:]}
    assert shown == set(FIGURES) == {x.name for x in FOLDER.iterdir()}


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0, 1), (2, 1), (1, 2)])
def test_a_mask_is_chunks_before_and_behind_ones_own(left, right):
    chunk = np.arange(20) // 4
    distance = chunk[:, None] - chunk
    assert np.array_equal(look_ahead_mask(20, 4, left, right), (distance <= left) & (distance >= -right))


def test_look_ahead_adds_up_over_layers():
    one, two = look_ahead_mask(20, 2, 3, 1), look_ahead_mask(20, 2, 6, 2)
    assert np.array_equal(through_layers(one, 2), two)


def test_a_segmental_decoder_hears_every_frame_once_and_the_others_hear_every_spike():
    *to_their_spikes, segmental, chunked = hearings()
    assert (segmental.mask.sum(0) == 1).all()
    assert chunked.mask.any(0).all()
    for hearing in to_their_spikes:
        assert all(hearing.mask[u, spike] for u, spike in enumerate(SPIKES))


def test_nothing_is_written_before_it_is_spoken():
    for writing in writings():
        assert all(spike < n for spike, n in zip(SPIKES, writing.first, strict=True))
        assert all(a <= b for a, b in zip(writing.first, writing.for_good, strict=True))
    assert utterance() > ENDS[-1]
