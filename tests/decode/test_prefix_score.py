"""Prefix probabilities against enumeration of all alignments, and that they form a distribution."""

import numpy as np
import pytest

from asr.decode.prefix_score import CtcPrefixScorer

PREFIXES = [(), (1,), (2, 2), (3, 1), (1, 2, 1), (3, 3, 3)]
EVERY = np.arange(4)


def walk(scorer: CtcPrefixScorer, owner: int, prefix: tuple[int, ...]):
    """The state after a prefix, and the score of the prefix."""
    state, score = scorer.start(np.array([owner])), 0.0
    for token in prefix:
        score = float(scorer.score(state, np.array([[token]]))[0, 0])
        state = scorer.extend(state, np.array([token]))
    return state, score


@pytest.fixture
def utterances(random_log_probs):
    return [random_log_probs(n, num_frames, 4) for n, num_frames in enumerate((6, 3, 1, 5))]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_scores_equal_enumeration(utterances, enumerate_ctc, prefix):
    scorer = CtcPrefixScorer(utterances)
    for n, log_probs in enumerate(utterances):
        expected = enumerate_ctc(log_probs)
        state, _ = walk(scorer, n, prefix)
        scores = scorer.score(state, EVERY[None])[0]
        assert scores[0] == -np.inf  # blank is no token
        for c in range(1, 4):
            longer = (*prefix, c)
            begins = [score for tokens, score in expected.items() if tokens[: len(longer)] == longer]
            np.testing.assert_allclose(scores[c], np.logaddexp.reduce(begins, initial=-np.inf), atol=1e-6)
        np.testing.assert_allclose(scorer.end(state)[0], expected.get(prefix, -np.inf), atol=1e-6)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_follows_a_prefix_sums_to_it(utterances, prefix):
    scorer = CtcPrefixScorer(utterances)
    for n in range(len(utterances)):
        state, score = walk(scorer, n, prefix)
        follows = np.logaddexp(np.logaddexp.reduce(scorer.score(state, EVERY[None])[0]), scorer.end(state)[0])
        np.testing.assert_allclose(follows, score, atol=1e-6)


def test_a_batch_of_hypotheses_equals_one_by_one(utterances):
    scorer = CtcPrefixScorer(utterances)
    owner, first, second = np.array([0, 0, 3, 1]), np.array([1, 2, 3, 1]), np.array([1, 3, 3, 2])
    state = scorer.extend(scorer.extend(scorer.start(owner), first), second)
    scores, ends = scorer.score(state, np.tile(EVERY, (4, 1))), scorer.end(state)
    index = np.array([2, 2, 0])
    np.testing.assert_array_equal(scorer.end(state.select(index)), ends[index])
    for b in range(4):
        alone = CtcPrefixScorer([utterances[owner[b]]])
        state, _ = walk(alone, 0, (first[b], second[b]))
        np.testing.assert_allclose(scores[b], alone.score(state, EVERY[None])[0], atol=1e-9)
        np.testing.assert_allclose(ends[b], alone.end(state)[0], atol=1e-9)


def test_long_utterances_and_impossible_symbols_stay_exact(random_log_probs):
    log_probs = random_log_probs(0, 2000, 4, scale=8)
    log_probs[:, 3] = -np.inf
    log_probs -= np.logaddexp.reduce(log_probs, 1, keepdims=True)
    scorer = CtcPrefixScorer([log_probs])
    state, total = scorer.start(np.array([0])), 0.0
    for token in [1, 2, 2] * 20:
        scores = scorer.score(state, EVERY[None])[0]
        assert scores[3] == -np.inf
        follows = np.logaddexp(np.logaddexp.reduce(scores), scorer.end(state)[0])
        assert follows == pytest.approx(total, abs=1e-3)  # float32 tables sum to 1 within 1e-7 a frame
        total, state = scores[token], scorer.extend(state, np.array([token]))
