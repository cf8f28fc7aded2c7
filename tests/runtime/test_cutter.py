"""Pieces of recordings: no speech is lost, whatever the pauses."""

import itertools
import math

import numpy as np
import pytest

from asr.decode.scorer import Floats
from asr.errors import ConfigError
from asr.runtime.cutter import CutConfig, Cutter, Piece

RATE, WINDOW, UNIT = 16000, 512, 640


def cut(
    samples: Floats, speech: list[float], config: CutConfig, block: int = 16000
) -> tuple[list[Piece], int]:
    """The pieces, and the largest number of samples held."""
    cutter, pieces, held, given = Cutter(config, RATE, WINDOW, UNIT), [], 0, 0
    for start in range(0, len(samples), block):
        there = min(start + block, len(samples)) // WINDOW
        pieces += cutter.accept(samples[start : start + block], speech[given:there])
        held, given = max(held, len(cutter._buffer)), there
    return pieces + cutter.finish(speech[given:]), held


def made(*parts: tuple[float, float]) -> tuple[Floats, list[float]]:
    """(seconds, probability of speech) in a row, as noise whose loudness is that probability."""
    speech = [p for seconds, p in parts for _ in range(round(seconds * RATE / WINDOW))]
    loudness = np.repeat(np.array(speech) + 0.01, WINDOW)
    return (np.random.default_rng(0).normal(0, 0.1, len(loudness)) * loudness).astype(np.float32), speech


def random_speech(seed: int) -> tuple[Floats, list[float]]:
    """Two minutes of speech and pauses of all lengths, with uncertain windows in both."""
    random = np.random.default_rng(seed)
    longest_s, pause_s = random.choice([0.5, 3.0, 40.0]), random.choice([0.05, 0.4, 4.0])
    parts: list[tuple[float, float]] = []
    while sum(s for s, _ in parts) < 120:
        parts += [(random.uniform(0, pause_s), 0.1), (random.uniform(0, longest_s), 0.9)]
        parts += [(random.uniform(0, 0.1), 0.3)]
    return made(*parts)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("max_s", [5.0, 20.0])
def test_all_speech_is_in_a_piece_and_every_moment_of_it_is_of_one(seed: int, max_s: float):
    samples, speech = random_speech(seed)
    config = CutConfig(max_s=max_s)
    pieces, held = cut(samples, speech, config)
    owners = np.zeros(len(samples), int)
    for piece in pieces:
        assert piece.start % UNIT == 0
        assert len(piece.samples) <= max_s * RATE
        end = piece.start + len(piece.samples)
        np.testing.assert_array_equal(piece.samples, samples[piece.start : end])
        first = max(piece.start, round(RATE * max(piece.own_from_s, 0)))
        owners[first : end if math.isinf(piece.own_to_s) else round(RATE * piece.own_to_s)] += 1
    spoken = np.repeat(np.array(speech) >= config.begins, WINDOW)
    assert owners[spoken].min(initial=1) == 1
    # pauses of two pieces may overlap by what completes an encoder frame
    twice = np.flatnonzero(owners > 1)
    assert len(twice) < UNIT * len(pieces)
    assert owners.max(initial=0) <= 2
    assert held <= (max_s + 2) * RATE


@pytest.mark.parametrize("seed", range(0, 12, 4))
def test_how_samples_arrive_changes_nothing(seed: int):
    samples, speech = random_speech(seed)
    expected, _ = cut(samples, speech, CutConfig())
    for block in (160, 1000, 7777, len(samples)):
        found, _ = cut(samples, speech, CutConfig(), block)
        assert [(x.start, x.own_from_s, x.own_to_s) for x in found] == [
            (x.start, x.own_from_s, x.own_to_s) for x in expected
        ]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.samples, b.samples)


def test_where_there_are_pauses_no_speech_is_cut():
    parts = [part for i in range(40) for part in ((2.0, 0.9), (0.2 + 0.02 * (i % 7), 0.05))]
    samples, speech = made(*parts)
    pieces, _ = cut(samples, speech, CutConfig())
    assert len(pieces) < 8
    for piece, following in itertools.pairwise(pieces):
        assert math.isinf(piece.own_to_s)
        assert math.isinf(following.own_from_s)
        between = slice(
            piece.start // WINDOW + len(piece.samples) // WINDOW - 2, following.start // WINDOW + 3
        )
        assert max(speech[between]) < 0.1


def test_a_piece_ends_in_the_longest_pause_of_its_second_half():
    samples, speech = made(
        (3, 0.9), (1.5, 0), (9, 0.9), (0.3, 0), (1, 0.9), (0.6, 0), (4, 0.9), (0.3, 0), (9, 0.9)
    )
    first = cut(samples, speech, CutConfig())[0][0]
    assert (first.start + len(first.samples)) / RATE == pytest.approx(14.8 + 0.3, abs=0.1)


def test_long_silence_is_in_no_piece_and_padding_is():
    samples, speech = made((30, 0.01), (2, 0.9), (60, 0.01), (0.1, 0.9), (30, 0.01))
    pieces, held = cut(samples, speech, CutConfig())
    spans = [(x.start / RATE, (x.start + len(x.samples)) / RATE) for x in pieces]
    assert spans == [pytest.approx((29.7, 32.3), abs=0.1), pytest.approx((91.7, 92.4), abs=0.1)]
    assert held < 4 * RATE


def test_speech_without_a_pause_is_cut_where_it_is_quietest_and_both_hear_it():
    samples, speech = made((50, 0.9))
    samples[round(14.2 * RATE) : round(14.35 * RATE)] *= 0.1
    first, second, *_ = cut(samples, speech, CutConfig())[0]
    assert first.own_to_s == second.own_from_s == pytest.approx(14.275, abs=0.06)
    assert (first.start + len(first.samples)) / RATE == pytest.approx(first.own_to_s + 1, abs=0.05)
    assert second.start / RATE == pytest.approx(first.own_to_s - 1, abs=0.05)


def test_no_speech_is_no_piece():
    for samples, speech in (made((20, 0.1)), made()):
        assert cut(samples, speech, CutConfig())[0] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_s": 3.0}, "max_s is 3.0, expected 5 seconds or more"),
        ({"max_s": math.inf}, "max_s is inf, expected 5 seconds or more"),
        ({"goes_on": 0.5}, "goes_on is 0.5, begins 0.4"),
        ({"padding_s": 3.0}, "silence_s is 2.0, expected twice padding_s"),
    ],
)
def test_settings_that_are_not_possible(options: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        CutConfig(**options)
