"""Temperature, end penalty, length penalty and limits: against enumeration and by hand."""

import itertools

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.guards import max_tokens
from asr.decode.modes import decode
from asr.decode.step import step
from asr.errors import ConfigError

SOS_EOS, SEED = 1, 3


def wave(num_frames: int) -> np.ndarray:
    return np.array((SEED, num_frames), np.float32)


def heard(scorer, tokens, config: SearchConfig) -> np.ndarray:
    """log p(next) with temperature and end penalty, by definition."""
    table = np.exp(scorer.following(SEED, tokens).astype(np.float64) / config.temperature)
    log_probs = np.log(table / table.sum())
    log_probs[SOS_EOS] *= config.eos_scale
    return log_probs


CONFIGS = [
    SearchConfig(beam=400, nbest=8, temperature=1.25),
    SearchConfig(beam=400, nbest=8, eos_scale=0.6),
    SearchConfig(beam=400, nbest=8, eos_scale=1.5, temperature=0.5),
    SearchConfig(beam=400, nbest=8, length_penalty=0.6, length_offset=5.0, temperature=1.25),
]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("config", CONFIGS)
def test_a_wide_beam_finds_the_exact_nbest_list(toy, config):
    scorer, num_frames = toy(5), 4
    expected = []
    for length in range(num_frames + 1):
        for text in itertools.product(range(2, 5), repeat=length):
            score = sum(heard(scorer, text[:u], config)[v] for u, v in enumerate(text))
            if length < num_frames:  # a text that fills the frames need not end
                score += heard(scorer, text, config)[SOS_EOS]
            penalty = ((config.length_offset + length) / (config.length_offset + 1)) ** config.length_penalty
            expected.append((score / penalty, text))
    expected.sort(reverse=True)
    found = decode(scorer, "unbounded", [wave(num_frames)], config)[0]
    assert [x.tokens for x in found] == [text for _, text in expected[:8]]
    np.testing.assert_allclose([x.score for x in found], [s for s, _ in expected[:8]], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_an_end_at_a_lower_price_may_enter_the_best(toy):
    """It was the fourth unit, so a search that asks for three would not see it."""
    scorer = toy(6)
    tokens = next(
        text
        for n in range(9)
        for text in itertools.product(range(2, 6), repeat=n)
        if np.argsort(-scorer.following(SEED, text)).tolist().index(SOS_EOS) == 3
    )
    config = SearchConfig(eos_scale=0.01)
    state = [(SEED, (SOS_EOS, *tokens[:-1]))]
    found = step(scorer, state, np.array(tokens[-1:]), 3, config)
    log_probs = heard(scorer, tokens, config)
    best = np.argsort(-log_probs)[:3]
    assert found.ids.tolist() == [best.tolist()]
    assert found.ids[0, 0] == SOS_EOS
    np.testing.assert_allclose(found.log_probs[0], log_probs[best], rtol=1e-5)


def test_ends_that_cost_less_make_texts_shorter(toy):
    lens = [
        len(decode(toy(6), mode, [wave(40)], SearchConfig(beam=3, eos_scale=scale))[0][0].tokens)
        for mode in ("attention", "unbounded")
        for scale in (1.0, 1e-3)
    ]
    assert lens[1] == lens[3] == 0 < min(lens[0], lens[2])


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 9), ({"extra_tokens": 4}, 13), ({"max_tokens": 5}, 5), ({"extra_tokens": 4, "max_tokens": 11}, 11)],
)
def test_how_much_may_be_written(toy, settings, most):
    def never_ends(tokens):
        table = np.random.default_rng(len(tokens)).normal(0, 1, 6)
        return np.where(np.arange(6) < 2, -1e3, table - np.logaddexp.reduce(table[2:])).astype(np.float32)

    found = decode(toy(6, never_ends), "unbounded", [wave(9)], SearchConfig(beam=2, **settings))[0][0]
    assert len(found.tokens) == most
    assert max_tokens(100, 9, SearchConfig(**settings)) == most
    assert max_tokens(1, 9, SearchConfig(length_factor=1, length_margin=2, **settings)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0\.0, expected more than 0"),
        ({"eos_scale": -1.0}, r"eos_scale is -1\.0, expected more than 0"),
        ({"length_offset": -1.0}, r"length_offset is -1\.0, expected 0 or more"),
        ({"max_tokens": -1}, r"max_tokens is -1, expected 0 or more"),
        ({"extra_tokens": -1}, r"extra_tokens is -1, expected 0 or more"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**settings)
