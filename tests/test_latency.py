"""Lagging and delays of traces, computed by hand; when a word is written, by definition."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.latency import (
    Told,
    Trace,
    average_lagging,
    differentiable_average_lagging,
    length_adaptive_average_lagging,
    make_trace,
    summarise,
    word_delays,
)
from asr.wer import ErrorCount

LAGS = (average_lagging, length_adaptive_average_lagging, differentiable_average_lagging)
S = 1200.0


def trace(
    read_ms: Sequence[float], num_ref: int, elapsed_ms: Sequence[float] | None = None, source_ms: float = S
) -> Trace:
    return Trace(
        source_ms,
        words=("w",) * len(read_ms),
        read_ms=tuple(read_ms),
        elapsed_ms=tuple(elapsed_ms or read_ms),
        reference=("w",) * num_ref,
        ends_ms=(None,) * num_ref,
    )


def told(*texts: str, final: str | None = None) -> list[Told]:
    """Partial texts at 100, 200, ... ms, then a final one; the clock shows 7 ms more."""
    every = [*texts, *([final] if final is not None else [])]
    return [
        Told(100.0 * n, 100.0 * n + 7, text, final is not None and n == len(every))
        for n, text in enumerate(every, 1)
    ]


def written(texts: Sequence[Told]) -> list[tuple[str, float]]:
    made = make_trace(texts, S, [], [])
    assert [x + 7 for x in made.read_ms] == list(made.elapsed_ms)
    return list(zip(made.words, made.read_ms, strict=True))


# Lagging


@pytest.mark.parametrize("num", [1, 2, 5])
def test_an_ideal_writer_does_not_lag(num: int):
    ideal = trace([i * S / num for i in range(num)], num)
    for lag in LAGS:
        assert lag(ideal, ideal.read_ms) == pytest.approx(0)


@pytest.mark.parametrize(("num_hyp", "num_ref"), [(1, 1), (3, 3), (3, 5), (5, 3)])
def test_who_waits_for_the_end_lags_by_all_of_it(num_hyp: int, num_ref: int):
    patient = trace([S] * num_hyp, num_ref)
    for lag in LAGS:
        assert lag(patient, patient.read_ms) == pytest.approx(S)


def test_only_the_first_word_behind_the_end_counts():
    made = trace([300, 1200, 1200, 1200], 4)
    assert average_lagging(made, made.read_ms) == (300 + 1200 - 300) / 2


def test_a_word_too_many_lowers_al_and_not_laal():
    made = trace([300, 600, 900], 2)  # nothing at the end: all three count
    assert average_lagging(made, made.read_ms) == (300 + (600 - 600) + (900 - 1200)) / 3
    assert length_adaptive_average_lagging(made, made.read_ms) == (300 + (600 - 400) + (900 - 800)) / 3


def test_a_word_too_few_leaves_al_and_laal_alike():
    made = trace([300, 600], 4)
    assert average_lagging(made, made.read_ms) == (300 + (600 - 300)) / 2
    assert length_adaptive_average_lagging(made, made.read_ms) == (300 + (600 - 300)) / 2


@pytest.mark.parametrize(
    ("read_ms", "expected"),
    [
        ((300, 300, 900), 300),  # 300, 600, 900 less 0, 300, 600
        ((600, 600, 600), 600),
        ((0, 900, 900), (0 + (900 - 300) + (1200 - 600)) / 3),
        ((0, 600, 600), (0 + (600 - 300) + (900 - 600)) / 3),
    ],
)
def test_dal_does_not_catch_up(read_ms: tuple[float, ...], expected: float):
    made = trace(read_ms, 7, source_ms=900)
    assert differentiable_average_lagging(made, made.read_ms) == pytest.approx(expected)


def test_computing_does_not_end_the_count_early():
    """By the clock the third word is written after the end of the audio, by what was read it is not."""
    made = trace([0, 300, 1100, 1200], 4, elapsed_ms=[0, 300, 1210, 1210])
    assert average_lagging(made, made.read_ms) == (0 + 0 + 500 + 300) / 4
    assert average_lagging(made, made.elapsed_ms) == (0 + 0 + 610 + 310) / 4


TIMES = st.lists(st.floats(0, S), min_size=1, max_size=8).map(sorted)


@given(TIMES, st.integers(1, 8))
def test_laal_is_never_below_al_and_equal_without_words_too_many(read_ms: list[float], num_ref: int):
    made = trace(read_ms, num_ref)
    al, laal = average_lagging(made, made.read_ms), length_adaptive_average_lagging(made, made.read_ms)
    assert laal == al if len(read_ms) <= num_ref else laal >= al - 1e-9


@given(TIMES, st.integers(1, 8), st.lists(st.floats(0, 3000), min_size=8, max_size=8))
def test_computing_only_adds(read_ms: list[float], num_ref: int, spent_ms: list[float]):
    made = trace(read_ms, num_ref, [a + b for a, b in zip(read_ms, spent_ms, strict=False)])
    for lag in LAGS:
        assert lag(made, made.elapsed_ms) >= lag(made, made.read_ms) - 1e-9


# When a word is written


def test_a_word_is_written_when_it_stands_for_good():
    assert written(told("a", "a b", "a c", final="a c d")) == [("a", 100), ("c", 300), ("d", 400)]


def test_a_word_that_comes_back_is_written_when_it_comes_back():
    assert written(told("a b", "a c", final="a b")) == [("a", 100), ("b", 300)]


def test_a_word_stands_only_behind_words_that_stand():
    assert written(told("a b", "x b", final="a b")) == [("a", 300), ("b", 300)]


def test_a_final_text_that_was_told_before_is_no_later():
    assert written(told("a", "a b", final="a b")) == [("a", 100), ("b", 200)]


def test_half_a_word_is_not_written():
    assert written(told("hel", "hello", final="hello")) == [("hello", 200)]


def test_final_texts_follow_each_other():
    texts = [
        Told(1, 8, "a", False),
        Told(2, 9, "a b", True),
        Told(3, 10, "a", False),  # of the next utterance: not the word already written
        Told(4, 11, "a", True),
        Told(4, 11, "c", False),
        Told(5, 12, "c d", True),
    ]
    assert written(texts) == [("a", 1), ("b", 2), ("a", 3), ("c", 4), ("d", 5)]
    assert make_trace(texts, S, [], []).retracted == 0


def test_what_no_final_text_follows_is_not_written():
    made = make_trace([*told(final="a"), *told("b c")], S, ["a"], [50.0])
    assert (made.words, made.read_ms, made.retracted) == (("a",), (100.0,), 2)
    assert make_trace([], S, ["a"], [None]).words == ()


@pytest.mark.parametrize(
    ("texts", "retracted"),
    [
        (told("a", "a b", final="a b c"), 0),
        (told("a b", "a c", final="a c"), 1),
        (told("a b c", "x b c", final="x b c"), 3),  # all words after the change count as rewritten
        (told("a b", "a", final="a b"), 1),
        (told("a b", "", final="a"), 2),
        (told("a b c", final="a"), 2),
    ],
)
def test_words_that_are_taken_back_are_counted(texts: list[Told], retracted: int):
    assert make_trace(texts, S, [], []).retracted == retracted


TEXTS = st.lists(st.text("ab ", max_size=5).map(lambda text: " ".join(text.replace(" ", "")))).filter(len)


@given(TEXTS)
def test_written_is_as_defined(texts: list[str]):
    *partial, final = texts
    words = final.split()
    expected = []
    for i in range(len(words)):
        stands = [text.split()[: i + 1] == words[: i + 1] for text in texts]
        first = min(n for n in range(len(texts)) if all(stands[n:]))
        expected.append((words[i], 100.0 * (first + 1)))
    assert written(told(*partial, final=final)) == expected


# Delays after the speaker


def spoken(ref: str, hyp: str, ends_ms: Sequence[float | None] | None = None) -> Trace:
    """Word n of the reference ends at 100 n; word n of the hypothesis is written at 100 n + 10."""
    refs, hyps = ref.split(), hyp.split()
    at = tuple(100.0 * n + 10 for n in range(1, len(hyps) + 1))
    ends = tuple(100.0 * n for n in range(1, len(refs) + 1)) if ends_ms is None else tuple(ends_ms)
    return Trace(S, tuple(hyps), at, tuple(x + 7 for x in at), tuple(refs), ends)


@pytest.mark.parametrize(
    ("ref", "hyp", "expected"),
    [
        ("a b c", "a b c", {0: 10, 1: 10, 2: 10}),
        ("a b c", "a x c", {0: 10, 2: 10}),
        ("a b c", "a c", {0: 10, 2: -90}),  # c is the second word of the hypothesis: before its end
        ("a c", "a b c", {0: 10, 1: 110}),
        ("a b", "", {}),
        ("", "a b", {}),
        ("a b", "x y", {}),
    ],
)
def test_words_that_were_recognised_have_a_delay(ref: str, hyp: str, expected: dict[int, float]):
    made = spoken(ref, hyp)
    assert word_delays(made, made.read_ms) == expected
    assert word_delays(made, made.elapsed_ms) == {j: ms + 7 for j, ms in expected.items()}


def test_a_word_whose_end_is_not_known_has_no_delay():
    made = spoken("a b c", "a b c", [100, None, 300])
    assert word_delays(made, made.read_ms) == {0: 10, 2: 10}


# All utterances together


def test_figures_of_several_utterances():
    found = summarise(
        [
            spoken("a b c", "a b c"),
            spoken("a b", "x b c"),  # first word wrong, one word inserted
            spoken("a b", ""),
            spoken("", "a"),
            spoken("a b", "a b", [None, 150]),
        ]
    )
    assert (found.utterances, found.without_words, found.unaligned) == (5, 2, 1)
    assert found.errors == ErrorCount(ref=9, ins=2, dels=2, subs=1)
    unaware, aware = found.unaware, found.aware
    assert (unaware.first_word.count, unaware.word.count, unaware.last_word.count) == (1, 5, 3)
    assert (unaware.word.p50, aware.word.p50) == (10, 17)
    assert unaware.last_word.p99 == pytest.approx(10 + 0.98 * 50)
    assert unaware.al == pytest.approx(
        ((110 + 210 - 400 + 310 - 800) / 3 + (110 + 210 - 600 + 310 - 1200) / 3 + (110 + 210 - 600) / 2) / 3
    )
    for name in ("al", "laal", "dal"):
        assert getattr(aware, name) == pytest.approx(getattr(unaware, name) + 7)


def test_retractions_are_a_share_of_the_words_written():
    traces = [make_trace(told("a b", "a c", final="a c d"), S, [], []), make_trace(told("a"), S, [], [])]
    found = summarise(traces)
    assert (found.retracted, found.retracted_share) == (2, 2 / 3)


def test_nothing_written_is_no_error():
    found = summarise([spoken("a b", "")])
    assert (found.unaware.al, found.aware.dal, found.unaware.word.p50) == (None, None, None)
    assert (found.errors.rate, found.retracted_share) == (1, 0)
    assert summarise([]).utterances == 0
