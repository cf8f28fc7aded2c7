"""Policies that ask whether the audio so far ends at a word boundary, on a toy that knows."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.modes import decode, start_search
from asr.decode.policies import ends_with_a_word
from asr.decode.scorer import Step
from asr.errors import ConfigError

POLICIES = ["alignatt", "edatt"]
CONFIG = SearchConfig(beam=2, ctc_weight=0.0, margin_frames=2, recent_share=0.3, length_margin=100)
DETECT = replace(CONFIG, detect_truncation=True)
COMPLETE, TRUNCATED = (0.1, 0.0, 0.0, 0.9), (0.9, 0.1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        ([], False),
        ([0.4], False),  # no word at all
        ([0.0] * 5, False),
        ([0.9], True),
        ([0.5, 0.4], True),
        ([1, 0], True),
        ([1, 0, 0], False),  # the word ended two frames before the end
        ([0, 1, 0], True),
        ([0, 0, 1], True),
        ([0, 1, 0, 0, 0, 1, 0], True),  # the second word
        ([0, 1, 0, 0, 1, 0, 0], False),
        ([0, 0.9, 0.1, 0, 0, 0.5], False),  # the second word is half there
        ([0, 0.9, 0, 0, 0.1, 0.7], True),  # 1.7 is two words
        ([0, 0.9, 0, 0, 0.1, 0.3], False),  # 1.3: the second word has only begun
        ([0.05] * 20, False),  # one word, the middle of it at frame 9
        ([0, 0.9, 0, 0, 0, 0.9, 0, 0, 0, 0, 0.8], True),  # scaled by 3 / 2.6
        ([0, 0.6, 0, 0, 0], False),
        ([0, 0, 0, 0.3, 0.3], True),
    ],
)
def test_a_word_ends_where_the_running_sum_passes_its_half(alpha, expected):
    assert ends_with_a_word(np.array(alpha, np.float32)) is expected


def test_a_long_sum_does_not_drift():
    """The scaled sum of 2,000 words is 2,000, despite rounding."""
    word = np.array([0, 0, 0.05, 0.1, 0.8, 0.07], np.float32)
    alpha = np.tile(word, 2000)
    assert ends_with_a_word(alpha)
    assert not ends_with_a_word(np.append(alpha, np.zeros(2, np.float32)))
    assert not ends_with_a_word(alpha[:-3])


@pytest.fixture
def speaker(toy):
    """A decoder that emits 3 5 3 5 ..., where 3 begins a word, two tokens per eight frames, then eos. It
    attends to the first frame, or to where `places` puts the token. Every frame has a CTC spike. `alpha` are
    the weights of the head, whatever the input."""

    class Speaker(toy):
        has_fire = True
        places = {}  # noqa: RUF012
        alpha = COMPLETE

        def __init__(self):
            super().__init__(8)
            self.word_starts = np.arange(8) == 3
            self.asked = 0

        def fire(self, memory):
            self.asked += 1
            return np.array(self.alpha, np.float32)

        def log_probs(self, seed, num_frames):
            table = np.full((num_frames, 8), -9, np.float32)
            table[np.arange(num_frames), 5 - 2 * (np.arange(num_frames) % 2)] = -0.01
            return table

        def encode(self, samples, chunk=0, left=-1):
            return [self.log_probs(*map(int, x)) for x in samples], [int(x[1]) for x in samples]

        def view(self, memory, utterance, num_frames):
            return [min(memory[utterance], num_frames)]

        def step(self, state, tokens, k, window=None):
            grown, tables, attention = [], [], np.zeros((len(state), max(x for x, _ in state)), np.float32)
            for b, ((frames, past), row) in enumerate(
                zip(state, tokens.reshape(len(tokens), -1), strict=True)
            ):
                past = (*past, *row.tolist())
                following = len(past) - 1
                grown.append((frames, past))
                token = self.sos_eos if following >= 2 * (frames // 8) else 5 if following % 2 else 3
                tables.append(np.where(np.arange(8) == token, -0.01, -9).astype(np.float32))
                attention[b, min(self.places.get(following, 0), frames - 1)] = 1
            table = np.stack(tables)
            ids = np.argsort(-table, 1, kind="stable")[:, :k]
            return Step(ids, np.take_along_axis(table, ids, 1), attention, grown)

        def score(self, memory, owner, tokens, reverse=False, prompt=()):
            return [np.full(len(x) + 1, -0.01, np.float32) for x in tokens]

    return Speaker


def pieces(scorer, mode, config, ends, alphas=None):
    """Tokens committed after each piece, and the final result."""
    (log_probs,), memory = scorer.encode([np.array([0, ends[-1]])])
    search, shown, start = start_search(mode, scorer, config), [], 0
    for end, alpha in zip(ends, alphas or itertools.repeat(scorer.alpha), strict=alphas is not None):
        scorer.alpha = alpha
        search.advance(scorer.view(memory, 0, end), log_probs[start:end])
        shown.append(search.best().tokens)
        start = end
    return shown, search.finish()[0].tokens


@pytest.mark.parametrize("mode", POLICIES)
def test_the_last_word_of_a_text_that_ended_is_kept_or_dropped(speaker, mode):
    whole = (3, 5) * 3
    assert pieces(speaker(), mode, CONFIG, [8, 16, 24]) == ([whole[:2], whole[:4], whole], whole)
    assert pieces(speaker(), mode, DETECT, [8, 16, 24]) == ([whole[:2], whole[:4], whole], whole)
    truncated = speaker()
    truncated.alpha = TRUNCATED
    assert pieces(truncated, mode, DETECT, [8, 16, 24]) == ([(), whole[:2], whole[:4]], whole)
    mixed = pieces(speaker(), mode, DETECT, [8, 16, 24], [TRUNCATED, COMPLETE, TRUNCATED])
    assert mixed == ([(), whole[:4], whole[:4]], whole)


@pytest.mark.parametrize("mode", POLICIES)
def test_a_complete_word_does_not_wait_for_the_next(speaker, mode):
    """Token 3, the end of the second word, may not be committed yet; the decoder would continue the word."""
    for alpha, config, expected in (
        (COMPLETE, CONFIG, (3, 5)),
        (TRUNCATED, DETECT, (3, 5)),
        (COMPLETE, DETECT, (3, 5, 3)),
    ):
        scorer = speaker()
        scorer.places, scorer.alpha = {3: 22}, alpha
        assert pieces(scorer, mode, config, [24])[0] == [expected]


@pytest.mark.parametrize("mode", POLICIES)
def test_a_word_that_another_follows_is_written_all_the_same(speaker, mode):
    """Token 4, the start of the third word, may not be committed yet: the second is no longer the last."""
    for alpha, config in itertools.product((COMPLETE, TRUNCATED), (CONFIG, DETECT)):
        scorer = speaker()
        scorer.places, scorer.alpha = {4: 22}, alpha
        assert pieces(scorer, mode, config, [24])[0] == [(3, 5, 3, 5)]


@pytest.mark.parametrize("mode", POLICIES)
def test_what_is_written_stays_whatever_is_said_of_the_end(speaker, mode):
    lengths = set()
    for alphas in itertools.product((COMPLETE, TRUNCATED), repeat=5):
        scorer = speaker()
        scorer.places = {1: 6, 3: 18, 6: 29}
        shown, answer = pieces(scorer, mode, DETECT, [8, 12, 20, 32, 35], list(alphas))
        for less, more in itertools.pairwise([*shown, answer]):
            assert more[: len(less)] == less
        assert answer == (3, 5) * 4
        lengths.add(tuple(map(len, shown)))
    assert len(lengths) > 5


def test_the_end_is_searched_as_without_it(speaker):
    for alpha in (COMPLETE, TRUNCATED):
        scorer = speaker()
        scorer.alpha = alpha
        waves = [np.array([0, 24]), np.array([0, 9])]
        assert decode(scorer, "alignatt", waves, DETECT) == decode(scorer, "joint", waves, CONFIG)


def test_who_does_not_ask_is_not_told(speaker):
    scorer = speaker()
    pieces(scorer, "alignatt", CONFIG, [8, 16, 24])
    assert scorer.asked == 0
    pieces(scorer, "alignatt", DETECT, [8, 16, 24])
    assert scorer.asked == 3


@pytest.mark.parametrize("mode", POLICIES)
def test_a_model_that_cannot_tell_is_refused_at_once(toy, speaker, mode):
    with pytest.raises(ConfigError, match=r"detect_truncation: .*no head that counts words.*loss\.quantity"):
        start_search(mode, toy(8), DETECT)
    scorer = speaker()
    scorer.word_starts = np.zeros(8, bool)
    with pytest.raises(ConfigError, match="detect_truncation: the units do not say"):
        start_search(mode, scorer, DETECT)
    start_search("joint", toy(8), DETECT)
