"""Whisper's rules hold whatever the decoder predicts, and its search finds the best text that they allow."""

import itertools

import numpy as np
import pytest

from asr.decode.scorer import Step
from asr.decode.whisper import Rules, Specials, WhisperOptions, before_start, behind_start
from asr.decode.whisper_search import detect_language, search_window
from asr.decode.whisper_times import Stretch, cut, median_filter, token_starts, warp
from asr.errors import ConfigError

NAMES = ["startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
MARKS = [f"<|{x}|>" for x in (*NAMES, "notimestamps", "0.00", "0.02", "0.04", "0.06")]
SYMBOLS = ["<blk>", "<sos/eos>", "<unk>", "▁", "a", "b", *MARKS]
V = len(SYMBOLS)
SPECIALS = Specials.of(SYMBOLS)
SPACE, A, B = 3, 4, 5
TIME = SPECIALS.timestamps
END = 1
CONTEXT = 20


def options(**changes):
    return WhisperOptions(**{"language": "en", "beam": 2, "max_first_time": 1} | changes)


def mask(written, favoured=(), **changes):
    """Which units may follow, where those in `favoured` are much likelier."""
    table = np.zeros((1, V))
    table[0, list(favoured)] += 20
    rules = Rules(SPECIALS, options(**changes), V)
    found = rules(table, np.array([written], np.int64).reshape(1, -1))
    assert np.logaddexp.reduce(found[0]) == pytest.approx(0, abs=1e-9)
    return set(np.flatnonzero(found[0] > -np.inf).tolist())


TEXT = {SPACE, A, B}
LANGUAGES = set(SPECIALS.languages.values())
TIMES = set(range(TIME, V))
FREE = {*TEXT, *LANGUAGES, END}


def test_units_are_known_by_their_names():
    assert SPECIALS.languages == {"en": 7, "de": 8}
    assert SPECIALS.space == SPACE
    assert SYMBOLS[SPECIALS.no_speech] == "<|nospeech|>"
    assert set(np.flatnonzero(SPECIALS.is_text(V)).tolist()) == TEXT
    with pytest.raises(ConfigError, match=r"no unit <\|startoftranscript\|>; expected the units of Whisper"):
        Specials.of(["<blk>", "a"])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([], {TIME, TIME + 1}),  # the latest first time is 1
        ([TIME], FREE),
        ([TIME, A], FREE | TIMES - {TIME}),  # text has a duration
        ([TIME + 1, A], FREE | {TIME + 2, TIME + 3}),
        (
            [TIME, A, TIME + 2],
            LANGUAGES | {END, TIME + 2, TIME + 3},
        ),  # the end, or where the next text begins
        ([TIME, A, TIME + 2, TIME + 2], FREE),
        ([TIME, A, TIME + 2, TIME + 2, B], FREE | {TIME + 3}),
        ([TIME, A, TIME + 3, TIME + 3, B], FREE),
    ],
)
def test_times_come_in_pairs_and_never_go_back(written, expected):
    assert mask(written, favoured=FREE) == expected


def test_likely_times_keep_text_out():
    assert mask([TIME, A], favoured=[TIME + 2]) == TIMES - {TIME}
    assert mask([TIME], favoured=[TIME + 2]) == FREE  # no time may follow


def test_without_times_all_but_marks_may_come():
    kept = FREE | TIMES | {SPECIALS.no_timestamps}
    assert mask([A], timestamps=False) == kept
    assert mask([], timestamps=False) == kept - {SPACE, END}
    assert mask([], timestamps=False, suppress_space=False) == kept
    assert mask([A], timestamps=False, suppress=(A, TIME)) == kept - {A, TIME}
    assert mask([A], timestamps=False, suppress=None) == set(range(V)) - {0, 2}
    assert mask([], favoured=FREE, max_first_time=None) == TIMES


def test_what_the_decoder_is_shown():
    given = options(prompt=(A, B) * 10, prefix=(A, B, B), timestamps=False, task="translate", max_tokens=8)
    assert before_start(SPECIALS, options(), CONTEXT) == [END]
    found = before_start(SPECIALS, given, CONTEXT)
    assert found == [SPECIALS.start_previous, B, *(A, B) * 4, END]
    found = behind_start(SPECIALS, given, "de", CONTEXT)
    assert found == [8, SPECIALS.translate, SPECIALS.no_timestamps, B, B]
    assert behind_start(SPECIALS, options(), "en", CONTEXT) == [7, SPECIALS.transcribe]
    assert behind_start(SPECIALS, options(), None, CONTEXT) == []
    with pytest.raises(ConfigError, match="language is xx, expected one of en, de"):
        behind_start(SPECIALS, options(), "xx", CONTEXT)


def best_of_all(toy, seed, given, most):
    """By enumeration: texts that have ended, or fill all the room for tokens."""
    rules = Rules(SPECIALS, given, V)
    shown = behind_start(SPECIALS, given, given.language, CONTEXT)
    found = {}

    def grow(written, total):
        if len(written) == most:
            found[written] = total
            return
        row = rules(
            toy.following(seed, [*shown, *written])[None].astype(float), np.array([written], np.int64)
        )[0]
        for token in np.flatnonzero(row > -np.inf).tolist():
            if token == END:
                found[written] = total + row[token]
            else:
                grow((*written, token), total + row[token])

    grow((), 0.0)
    penalty = given.length_penalty

    def score(written):
        n = len(written)
        return found[written] / (n if penalty is None else ((5 + n) / 6) ** penalty)

    best = max(found, key=score)
    return best, found[best]


@pytest.mark.parametrize("penalty", [None, 0.6, 2.0])
@pytest.mark.parametrize("timestamps", [False, True])
def test_a_wide_search_finds_the_best_of_all(toy, timestamps, penalty):
    for seed in range(3):
        scorer = toy(V)
        given = options(
            beam=3000, timestamps=timestamps, length_penalty=penalty, max_tokens=3, suppress=(7, 8, 13, 17)
        )
        found = search_window(scorer, [seed], 0, SPECIALS, given, CONTEXT)
        best, total = best_of_all(scorer, seed, given, most=3)
        assert found.tokens == best
        assert sum(found.log_probs) == pytest.approx(total, abs=1e-5)
        assert found.mean_log_prob == pytest.approx(total / (len(best) + 1), abs=1e-5)


def test_a_beam_of_one_takes_the_best_each_time(toy):
    for seed in range(5):
        scorer, given = toy(V), options(beam=1, timestamps=False, max_tokens=6)
        rules, written = Rules(SPECIALS, given, V), ()
        shown = behind_start(SPECIALS, given, "en", CONTEXT)
        while len(written) < 6:
            table = scorer.following(seed, [*shown, *written])[None].astype(float)
            token = int(rules(table, np.array([written], np.int64)).argmax())
            if token == END:
                break
            written = (*written, token)
        assert search_window(scorer, [seed], 0, SPECIALS, given, CONTEXT).tokens == written


def test_patience_waits_for_more_to_end(toy):
    steps = []
    for patience in (0.5, 1.0, 3.0):
        scorer = toy(V)
        for seed in range(5):
            given = options(beam=4, patience=patience, timestamps=False, max_tokens=9)
            search_window(scorer, [seed], 0, SPECIALS, given, CONTEXT)
        steps.append(scorer.num_steps)
    assert steps == sorted(set(steps))


def test_an_answer_ends_with_the_room_that_there_is(toy):
    endless = np.full(V, -10.0)
    endless[A] = 0.0

    def follow(_):
        return endless.astype(np.float32)

    given = options(beam=1, timestamps=False, max_tokens=100, prompt=(B,) * 9)
    found = search_window(toy(V, follow), [0], 0, SPECIALS, given, CONTEXT)
    # 10 tokens before the start token and 3 after it; the last one's output is not needed
    assert found.tokens == (A,) * (CONTEXT + 1 - 14)
    found = search_window(toy(V, follow), [0], 0, SPECIALS, options(beam=1, timestamps=False), CONTEXT)
    assert found.tokens == (A,) * (CONTEXT // 2)


def test_the_language_is_heard(toy):
    scorer = toy(V)
    found = detect_language(scorer, [5], 0, SPECIALS)
    table = np.exp(scorer.following(5, []).astype(float))
    assert found["en"] == pytest.approx(table[7] / (table[7] + table[8]))
    assert sum(found.values()) == pytest.approx(1)
    answer = search_window(scorer, [5], 0, SPECIALS, options(language="auto"), CONTEXT)
    assert answer.language == max(found, key=found.__getitem__)
    assert answer == search_window(toy(V), [5], 0, SPECIALS, options(language=answer.language), CONTEXT)
    assert answer.no_speech == pytest.approx(table[SPECIALS.no_speech])


def test_steps_may_answer_in_any_order(toy):
    """Scorers sort candidates in an order of their own."""

    class Shuffled(toy):
        def step(self, *args):
            step = super().step(*args)
            order = np.random.default_rng(self.num_steps).permutation(step.ids.shape[1])
            return Step(step.ids[:, order], step.log_probs[:, order], step.attention, step.state)

    for seed in range(3):
        found = [search_window(x(V), [seed], 0, SPECIALS, options(), CONTEXT) for x in (toy, Shuffled)]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam": 0}, "beam is 0 and patience 1"),
        ({"patience": 0.1}, r"patience 0\.1, expected a product of at least 1"),
        ({"task": "sing"}, "task is sing, expected transcribe or translate"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        options(**changes)


def test_the_path_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)

    def cheapest(cost, i, j):
        if i < 0 or j < 0:
            return np.inf
        before = min(cheapest(cost, i - a, j - b) for a, b in ((1, 1), (1, 0), (0, 1))) if i or j else 0.0
        return cost[i, j] + before

    for shape in itertools.product((1, 2, 4), (1, 3, 5)):
        cost = rng.normal(size=shape)
        tokens, frames = warp(cost)
        assert (tokens[0], frames[0], tokens[-1], frames[-1]) == (0, 0, shape[0] - 1, shape[1] - 1)
        steps = set(zip(np.diff(tokens).tolist(), np.diff(frames).tolist(), strict=True))
        assert steps <= {(0, 1), (1, 0), (1, 1)}
        assert cost[tokens, frames].sum() == pytest.approx(cheapest(cost, shape[0] - 1, shape[1] - 1))


def test_tokens_begin_where_heads_begin_to_listen():
    starts = [0, 5, 9, 16]
    attention = np.full((2, 4, 30), 0.01, np.float32)
    for u, (first, last) in enumerate(itertools.pairwise([*starts, 20])):
        attention[:, u, first:last] += 1
    attention[:, :, 25:] += 7  # silence, which is ignored
    attention[1, 2, 3] += 2  # one frame of one head is smoothed away
    assert token_starts(attention, 20).tolist() == starts


def test_a_median_is_that_of_neighbours_mirrored_at_the_ends():
    x = np.random.default_rng(0).normal(size=(2, 9))
    found = median_filter(x, 5)
    mirrored = np.concatenate([x[:, 2:0:-1], x, x[:, -2:-4:-1]], axis=1)
    for t in range(9):
        np.testing.assert_array_equal(found[:, t], np.median(mirrored[:, t : t + 5], axis=1))
    np.testing.assert_array_equal(median_filter(x[:, :2], 5), x[:, :2])


@pytest.mark.parametrize(
    ("answer", "stretches", "advance"),
    [
        # text that ends before the window does: no speech after it
        ("0 a 5", [(0, 5, "a")], 1500),
        ("0 a 5 7 b 9", [(0, 5, "a"), (7, 9, "b")], 1500),
        # text that is cut off is decoded again from its start
        ("0 a 5 7 b 9 9", [(0, 5, "a"), (7, 9, "b")], 9),
        ("0 a 5 7 b", [(0, 5, "a")], 5),
        # text without an end lasts as long as the window
        ("0 a b", [(0, 1500, "ab")], 1500),
        ("", [(0, 1500, "")], 1500),
    ],
)
def test_answers_are_cut_at_their_times(answer, stretches, advance):
    units = {"a": A, "b": B}
    tokens = [units[x] if x in units else 100 + int(x) for x in answer.split()]
    expected = [Stretch(start, end, tuple(units[x] for x in text)) for start, end, text in stretches]
    assert cut(tokens, 100, 1500) == (expected, advance)
