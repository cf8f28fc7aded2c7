"""Error counts against brute force; intervals against kaldialign and against their nominal coverage."""

from functools import cache

import kaldialign
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.wer import (
    NOTHING,
    ErrorCount,
    Interval,
    align,
    by_length,
    char_errors,
    characters,
    compare,
    confusions,
    count_errors,
    interval,
    total,
    word_errors,
)

sentences = st.lists(st.sampled_from("abc"), max_size=6)


def levenshtein(ref: list[str], hyp: list[str]) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        change = distance(i - 1, j - 1) + (ref[i - 1] != hyp[j - 1])
        return min(change, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(ref), len(hyp))


@given(sentences, sentences)
def test_an_alignment_has_the_fewest_errors_and_keeps_both_sides(ref, hyp):
    pairs = align(ref, hyp)
    assert [r for r, _ in pairs if r != NOTHING] == ref
    assert [h for _, h in pairs if h != NOTHING] == hyp
    count = count_errors(pairs)
    assert count.total == levenshtein(ref, hyp) == kaldialign.edit_distance(ref, hyp)["total"]
    assert count.ref == len(ref)
    assert count.ins - count.dels == len(hyp) - len(ref)


def test_words_and_characters_are_counted_apart():
    assert word_errors("the cat sat", "the hat sat down") == ErrorCount(ref=3, ins=1, dels=0, subs=1)
    assert char_errors("你好 世界", "你世界呢") == ErrorCount(ref=4, ins=1, dels=1, subs=0)
    assert characters(" a\u3000b c\n") == ["a", "b", "c"]


def test_counts_add_up():
    counts = [word_errors("a b", "a"), word_errors("c", "d e"), word_errors("", "")]
    assert total(counts) == ErrorCount(ref=3, ins=1, dels=1, subs=1)
    assert total(counts).rate == 1.0
    assert total([]) == ErrorCount()


@pytest.mark.parametrize(("hyp", "rate"), [("", 0.0), ("a", 1.0), ("a b c", 1.0)])
def test_the_rate_of_an_empty_reference_is_defined(hyp, rate):
    count = word_errors("", hyp)
    assert (count.ref, count.rate) == (0, rate)
    assert (word_errors("x y", "x y") + count).total == len(hyp.split())  # and a total counts the insertions


def made(num: int, rate: float, seed: int) -> list[ErrorCount]:
    """Utterances of 1 to 20 words, each wrong with probability `rate`."""
    rng = np.random.default_rng(seed)
    return [ErrorCount(ref=int(n), subs=int(rng.binomial(n, rate))) for n in rng.integers(1, 21, num)]


def test_the_interval_is_that_of_kaldialign():
    counts = made(150, 0.2, seed=1)
    refs = [["a"] * count.ref for count in counts]
    hyps = [["b"] * count.subs + ["a"] * (count.ref - count.subs) for count in counts]
    theirs = kaldialign.bootstrap_wer_ci(refs, hyps)
    ours = interval(counts)
    assert ours.low == pytest.approx(theirs["ci95min"], abs=0.004)
    assert ours.high == pytest.approx(theirs["ci95max"], abs=0.004)


def test_95_of_100_intervals_hold_the_true_rate():
    hits = 0
    for seed in range(200):
        found = interval(made(60, 0.1, seed), num_draws=200)
        hits += found.low <= 0.1 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    counts = made(50, 0.1, seed=3)
    assert interval(counts, seed=4) == interval(counts, seed=4) != interval(counts, seed=5)


def test_intervals_without_errors_words_or_utterances_are_defined():
    assert interval([ErrorCount(ref=5)] * 9) == interval([]) == interval([ErrorCount()]) == Interval(0.0, 0.0)


def test_a_pairing_finds_what_two_intervals_cannot():
    a = made(300, 0.2, seed=6)
    b = [ErrorCount(ref=x.ref, subs=x.subs - (x.subs > 0 and i % 6 == 0)) for i, x in enumerate(a)]
    found = compare(a, b)
    assert interval(a).low < interval(b).high  # the intervals of the two overlap
    assert found.is_significant
    assert found.p < 0.05
    assert found.difference == pytest.approx(total(b).rate - total(a).rate)
    assert found.interval.low < found.difference < found.interval.high < 0


def test_a_comparison_with_itself_or_with_an_equal_is_not_significant():
    a = made(300, 0.2, seed=7)
    assert (compare(a, a).difference, compare(a, a).p, compare(a, a).is_significant) == (0.0, 1.0, False)
    rng = np.random.default_rng(8)
    wrong = sum(
        compare(a, [ErrorCount(ref=x.ref, subs=int(rng.binomial(x.ref, 0.2))) for x in a], 200).is_significant
        for _ in range(60)
    )
    assert wrong <= 9  # 5 % of 60 are 3


def test_comparing_the_other_way_round_turns_the_sign():
    a, b = made(100, 0.2, 9), made(100, 0.2, 9)[::-1]
    b = [ErrorCount(ref=x.ref, subs=min(x.ref, y.subs)) for x, y in zip(a, b, strict=True)]
    one, other = compare(a, b), compare(b, a)
    assert one.difference == -other.difference
    assert one.interval.low == pytest.approx(-other.interval.high)
    assert one.p == other.p


def test_confusions_name_what_was_taken_for_what():
    found = confusions([align(["a", "b"], ["a", "c"]), align(["b"], ["c", "d"]), align(["e"], [])])
    assert found.subs == {("b", "c"): 2}
    assert found.ins == {"d": 1}
    assert found.dels == {"e": 1}


def test_lengths_are_grouped_and_empty_groups_left_out():
    counts = [ErrorCount(ref=n, subs=1) for n in (0, 1, 5, 6, 10, 41, 90)]
    assert by_length(counts) == [
        ("0-5", 3, ErrorCount(ref=6, subs=3)),
        ("6-10", 2, ErrorCount(ref=16, subs=2)),
        ("over 40", 2, ErrorCount(ref=131, subs=2)),
    ]
    assert by_length([]) == []
