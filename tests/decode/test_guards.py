"""A decoder that loops or never ends is stopped and CTC's result used; a good decoder is left alone."""

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.guards import max_tokens, repeats
from asr.decode.modes import decode

CONFIG = SearchConfig(beam=4, nbest=2)
WAVE = np.array((3, 60), np.float32)


def certain(of: dict[int, float], num_tokens: int = 6):
    """Log-probabilities: those of `of` for its tokens, the rest divided among the others."""
    rest = (1 - sum(of.values())) / (num_tokens - len(of))
    return np.log([of.get(v, rest) for v in range(num_tokens)]).astype(np.float32)


def never_ends(tokens):
    """Emits tokens forever, without repeating a phrase."""
    random = np.random.default_rng(len(tokens)).integers(2, 6)
    return certain({int(random): 0.95, 1: 1e-9})


def loops(tokens):
    """The same three tokens again and again."""
    return certain({2 + len(tokens) % 3: 0.95, 1: 1e-9})


def stops_now_and_then(tokens):
    """A loop; the beam also holds ended hypotheses that are far worse."""
    return certain({2: 0.9, 1: 0.04})


RUNAWAYS = [(never_ends, "length"), (loops, "repetition"), (stops_now_and_then, "repetition")]


@pytest.mark.parametrize(("decoder", "guard"), RUNAWAYS)
def test_a_runaway_decoder_is_replaced_by_ctc(toy, decoder, guard):
    scorer = toy(6, decoder)
    found = decode(scorer, "attention", [WAVE], CONFIG)[0]
    by_ctc = decode(toy(6), "ctc-prefix", [WAVE], CONFIG)[0]
    assert [x.guard for x in found] == [guard, guard]
    assert [(x.tokens, x.score, x.frames) for x in found] == [(x.tokens, x.score, x.frames) for x in by_ctc]
    assert scorer.num_steps == {never_ends: 60 + 1, loops: 3 * 5, stops_now_and_then: 5}[decoder]


def test_ctc_alone_keeps_a_looping_decoder_in_bounds(toy):
    found = decode(toy(6, loops), "joint", [WAVE], SearchConfig(beam=4, ctc_weight=0.5))[0][0]
    assert len(found.tokens) <= 60


def test_one_runaway_does_not_touch_the_others(toy):
    healthy = decode(toy(6), "attention", [WAVE], CONFIG)[0]

    class Mixed(toy):
        def following(self, seed, tokens):
            return loops(tokens) if seed == 9 else super().following(seed, tokens)

    waves = [WAVE, np.array((9, 60), np.float32), WAVE]
    found = decode(Mixed(6), "attention", waves, CONFIG)
    assert [x[0].guard for x in found] == ["", "repetition", ""]
    assert [x.tokens for x in found[0]] == [x.tokens for x in found[2]] == [x.tokens for x in healthy]


def test_an_end_better_than_what_was_cut_stands(toy):
    """The loop is a poor hypothesis: the result ends by itself and no guard is reported."""

    def decoder(tokens):
        return loops(tokens) if tokens[:1] == (2,) else certain({1: 0.9, 2: 0.05})

    found = decode(toy(6, decoder), "attention", [WAVE], SearchConfig(beam=4))[0][0]
    assert (found.tokens, found.guard) == ((), "")


def test_a_loop_that_does_not_lead_is_merely_dropped(toy):
    """Besides the right text of 12 tokens, the beam holds a loop, worse at every length, that never ends."""
    right = (2, 3, 4, 5, 3, 2, 5, 4, 2, 4, 3, 5)

    def decoder(tokens):
        if tokens == right:
            return certain({1: 0.3})
        if tokens == right[: len(tokens)]:
            return certain({0: 0.385, 1: 1e-9, 2: 0.01} | {right[len(tokens)]: 0.6})
        return certain({2: 0.999, 1: 1e-9})

    found = decode(toy(6, decoder), "attention", [WAVE], SearchConfig(beam=4))[0][0]
    assert (found.tokens, found.guard) == (right, "")


@pytest.mark.parametrize("mode", ["attention", "joint"])
def test_blank_is_never_written(toy, mode):
    def decoder(tokens):
        return certain({0: 0.9, 1: 0.05 if tokens else 1e-6})

    assert not any(0 in x.tokens for x in decode(toy(6, decoder), mode, [WAVE], CONFIG)[0])


def test_a_repetition_that_ctc_hears_is_allowed():
    config = SearchConfig(max_repeats=2, max_phrase=3)
    tokens = np.array([[5, 4, 4, 4], [4, 4, 4, 5], [3, 3, 4, 4], [4, 4, 4, 4]])
    assert repeats(tokens, [()] * 4, config).tolist() == [True, False, False, True]
    assert repeats(tokens, [(7, 4, 4, 4, 7), (), (), (4, 4, 7, 4)], config).tolist() == [False] * 3 + [True]
    phrase = np.array([[7, 2, 3, 2, 3, 2, 3], [1, 2, 3, 1, 2, 3, 1]])
    assert repeats(phrase, [(), ()], config).tolist() == [True, False]
    assert repeats(phrase, [(2, 3, 2, 3, 2, 3), ()], config).tolist() == [False, False]


def test_the_bound_follows_the_ctc_best_path_and_the_frames():
    config = SearchConfig(length_factor=1.5, length_margin=10)
    assert max_tokens(20, 100, config) == 40
    assert max_tokens(0, 100, config) == 10
    assert max_tokens(90, 100, config) == 100
