"""The unbounded search: against enumeration, and how it differs from mode attention."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.modes import decode

MODE, SOS_EOS, SEED, NUM_FRAMES = "unbounded", 1, 3, 4
WAVE = np.array((SEED, NUM_FRAMES), np.float32)


def every_answer(scorer) -> Iterator[tuple[tuple[int, ...], float]]:
    """All texts that end within the frames, and all that fill them without an end; blank is never likely."""
    units = range(2, scorer.num_tokens)
    for length in range(NUM_FRAMES + 1):
        texts = list(itertools.product(units, repeat=length))
        scores = scorer.score([SEED], np.zeros(len(texts), int), texts)
        for text, log_probs in zip(texts, scores, strict=True):
            end = length + (length < NUM_FRAMES)
            yield text, float(log_probs[:end].sum(dtype=np.float64))


@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0])
def test_a_wide_beam_finds_the_exact_nbest_list(toy, length_penalty):
    scorer = toy(5)
    found = decode(scorer, MODE, [WAVE], SearchConfig(beam=1000, nbest=9, length_penalty=length_penalty))[0]
    expected = sorted(
        ((s / len(t) ** length_penalty if t else s if not length_penalty else -np.inf), t)
        for t, s in every_answer(scorer)
    )[::-1][:9]
    assert [x.tokens for x in found] == [t for _, t in expected]
    np.testing.assert_allclose([x.score for x in found], [s for s, _ in expected], rtol=0, atol=1e-5)


def certain(of: dict[int, float], num_tokens: int = 6) -> np.ndarray:
    rest = (1 - sum(of.values())) / (num_tokens - len(of))
    return np.log([of.get(v, rest) for v in range(num_tokens)]).astype(np.float32)


def test_nothing_stops_a_loop_not_even_of_blanks(toy):
    wave = np.array((SEED, 30), np.float32)
    config = SearchConfig(beam=4)
    loop = decode(toy(6, lambda tokens: certain({2 * (len(tokens) % 2): 0.95})), MODE, [wave], config)[0][0]
    assert (loop.tokens, loop.guard) == ((0, 2) * 15, "")


def test_what_has_ended_takes_its_place_in_the_beam(toy):
    """With a beam of one the first end is the result, although a longer text would be better."""

    def decoder(tokens):
        return certain({1: 0.5, 2: 0.45}) if not tokens else certain({1: 0.99})

    scorer = toy(6, decoder)
    found = decode(scorer, MODE, [WAVE], SearchConfig(beam=1, length_penalty=1.0))[0][0]
    assert found.tokens == ()
    assert scorer.num_steps == 1
    best = decode(scorer, MODE, [WAVE], SearchConfig(beam=2, length_penalty=1.0))[0][0]
    assert best.tokens == (2,)
