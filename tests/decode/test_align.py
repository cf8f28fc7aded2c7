"""Forced alignment and total probability, against reference vectors and enumeration."""

import numpy as np
import pytest

from asr.decode.align import align, ctc_log_prob, locate, min_frames


def test_alignment_equals_the_reference(vectors, cases):
    for case in cases("align"):
        best = align(vectors[f"{case}.log_probs"], vectors[f"{case}.targets"].tolist())
        np.testing.assert_array_equal(best.path, vectors[f"{case}.path"])
        np.testing.assert_array_equal(best.start, vectors[f"{case}.span_start"])
        np.testing.assert_array_equal(best.end, vectors[f"{case}.span_end"])
        np.testing.assert_allclose(best.log_probs, vectors[f"{case}.frame_scores"], atol=1e-6)
        assert best.score == pytest.approx(float(vectors[f"{case}.viterbi_score"]), abs=1e-9)


def test_total_and_best_path_of_the_loss_cases(vectors):
    for case, log_probs in enumerate(vectors["ctc.log_probs"]):
        tokens = vectors["ctc.targets"][case][: vectors["ctc.target_lens"][case]].tolist()
        loss = float(vectors["ctc.loss"][case])
        assert -ctc_log_prob(log_probs, tokens) == pytest.approx(loss, abs=1e-6)
        best = align(log_probs, tokens)
        if np.isinf(loss):
            assert best is None
            assert min_frames(tokens) > len(log_probs)
        else:
            np.testing.assert_array_equal(best.path, vectors["ctc.viterbi_alignment"][case])


@pytest.mark.parametrize("seed", range(5))
def test_total_equals_enumeration(random_log_probs, enumerate_ctc, seed):
    log_probs = random_log_probs(seed, 5, 4)
    for tokens, score in enumerate_ctc(log_probs).items():
        assert ctc_log_prob(log_probs, tokens) == pytest.approx(score, abs=1e-9)


def test_a_blank_among_the_tokens_is_a_token(random_log_probs):
    log_probs = random_log_probs(0, 6, 4)
    assert align(log_probs, [0, 2, 0, 3, 0, 2]).path.tolist() == [0, 2, 0, 3, 0, 2]
    assert align(log_probs, [2, 0, 0, 3, 2, 3]) is None


def test_no_frames(random_log_probs):
    nothing = random_log_probs(0, 0, 4)
    assert ctc_log_prob(nothing, []) == 0
    assert ctc_log_prob(nothing, [2]) == -np.inf
    assert align(nothing, []).score == 0
    assert locate(nothing, [2, 3])[0] == (0, 0)


def test_locate_spreads_what_cannot_be_aligned(random_log_probs):
    log_probs = random_log_probs(0, 6, 4)
    frames, peaks = locate(log_probs, [1, 2] * 6)
    assert frames == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    assert (peaks <= 0).all()
    assert locate(log_probs, [2, 2])[0] == tuple(align(log_probs, [2, 2]).start.tolist())
