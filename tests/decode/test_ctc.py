"""The CTC searches against enumeration, a plain implementation, and themselves with other pieces of input."""

import numpy as np
import pytest

from asr.decode.align import align
from asr.decode.ctc import CtcGreedy, CtcPrefixBeam, advance_all

SEARCHES = {"greedy": CtcGreedy, "prefix": lambda: CtcPrefixBeam(beam=6, tokens_per_frame=4)}


def test_wide_beam_gives_the_exact_nbest_list(vectors, cases):
    for case in cases("nbest"):
        log_probs, scores = vectors[f"{case}.log_probs"], vectors[f"{case}.scores"]
        rows = zip(vectors[f"{case}.labels"], vectors[f"{case}.lens"], scores, strict=True)
        expected = {tuple(x[:n].tolist()): score for x, n, score in rows}
        beam = CtcPrefixBeam(beam=2000, tokens_per_frame=log_probs.shape[1])
        beam.advance(log_probs)
        nbest = beam.nbest(len(scores))
        np.testing.assert_allclose([x.score for x in nbest], scores, rtol=0, atol=1e-6)
        assert {x.tokens for x in nbest} == set(expected)
        for x in nbest:  # by name, since equal scores may come in any order
            assert x.score == pytest.approx(expected[x.tokens], abs=1e-6)


def test_greedy_is_the_best_path_collapsed(vectors, cases):
    for case in cases("nbest"):
        greedy = CtcGreedy()
        greedy.advance(vectors[f"{case}.log_probs"])
        best = greedy.best()
        assert best.tokens == tuple(vectors[f"{case}.greedy_labels"].tolist())
        assert best.score == pytest.approx(float(vectors[f"{case}.greedy_score"]), abs=1e-6)
        assert greedy.nbest(3) == [best]


@pytest.mark.parametrize("seed", range(10))
def test_all_token_sequences_and_their_alignments(random_log_probs, enumerate_ctc, seed):
    log_probs = random_log_probs(seed, 1 + seed % 6, 2 + seed % 3)
    expected = enumerate_ctc(log_probs)
    beam = CtcPrefixBeam(beam=1000, tokens_per_frame=4)
    beam.advance(log_probs)
    nbest = beam.nbest(1000)
    assert len(nbest) == len(expected)
    for x in nbest:
        assert x.score == pytest.approx(expected[x.tokens], abs=1e-9)
        best = align(log_probs, x.tokens)
        assert x.frames == tuple(best.start.tolist())
        np.testing.assert_allclose(x.confidence, np.exp(best.peaks()), rtol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_narrow_beam_equals_a_dictionary_of_prefixes(random_log_probs, plain_prefix_beam, seed):
    beam, tokens_per_frame = 2 + seed % 7, 1 + seed % 4
    log_probs = random_log_probs(seed, 40, 6)  # few units: prefixes leave the beam, return, and merge often
    search = CtcPrefixBeam(beam, tokens_per_frame)
    search.advance(log_probs)
    expected = plain_prefix_beam(log_probs, beam, tokens_per_frame)
    nbest = search.nbest(beam)
    assert [x.tokens for x in nbest] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([x.score for x in nbest], [score for _, score in expected], rtol=0, atol=1e-9)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("seed", range(5))
def test_chunks_give_what_the_whole_gives(random_log_probs, search, seed):
    log_probs = random_log_probs(seed, 150, 8)
    cuts = np.sort(np.random.default_rng(seed).integers(0, 150, 20))  # some chunks are empty
    whole, parts = SEARCHES[search](), SEARCHES[search]()
    whole.advance(log_probs)
    for part in np.split(log_probs, cuts):
        parts.advance(part)
        assert parts.best().tokens == parts.nbest(6)[0].tokens
    for a, b in zip(whole.nbest(6), parts.nbest(6), strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-9 if search == "greedy" else 0)
        assert (a.tokens, a.frames, a.confidence) == (b.tokens, b.frames, b.confidence)
    assert whole.num_frames == parts.num_frames == 150


def test_many_streams_at_once_equal_each_alone(random_log_probs):
    log_probs = [random_log_probs(n, length, 9) for n, length in enumerate((30, 0, 71, 1, 30))]
    together = [CtcPrefixBeam(5, 4) for _ in log_probs]
    together[3].advance(log_probs[0])  # streams join at any time
    advance_all(together, log_probs)
    for n, x in enumerate(log_probs):
        alone = CtcPrefixBeam(5, 4)
        if n == 3:
            alone.advance(log_probs[0])
        alone.advance(x)
        assert together[n].nbest(5) == alone.nbest(5)


@pytest.mark.parametrize("search", SEARCHES)
def test_frames_rise_and_confidences_are_probabilities(random_log_probs, search):
    x = SEARCHES[search]()
    x.advance(random_log_probs(1, 200, 12, scale=4))
    for hypothesis in x.nbest(6):
        assert len(hypothesis.tokens) == len(hypothesis.frames) == len(hypothesis.confidence) > 20
        assert (np.diff(hypothesis.frames) > 0).all()
        assert all(0 < p <= 1 for p in hypothesis.confidence)


def test_nbest_is_sorted_and_unique(random_log_probs):
    x = CtcPrefixBeam(20, 5)
    x.advance(random_log_probs(2, 100, 6))
    nbest = x.nbest(20)
    assert len(nbest) == len({y.tokens for y in nbest}) == 20
    assert [y.score for y in nbest] == sorted((y.score for y in nbest), reverse=True)


@pytest.mark.parametrize("search", SEARCHES)
def test_no_frames_and_reset(random_log_probs, search):
    x = SEARCHES[search]()
    fresh = x.nbest(6)
    x.advance(np.zeros((0, 5), np.float32))
    assert x.nbest(6) == fresh
    assert (fresh[0].tokens, fresh[0].score) == ((), 0.0)
    x.advance(random_log_probs(0, 30, 5))
    assert x.nbest(6) != fresh
    x.reset()
    assert x.nbest(6) == fresh


def test_impossible_symbols_are_never_emitted(random_log_probs):
    log_probs = random_log_probs(3, 20, 5)
    log_probs[:, 2] = -np.inf
    log_probs[7, 0] = -np.inf
    x = CtcPrefixBeam(200, 4)
    x.advance(log_probs)
    assert all(2 not in y.tokens and y.score > -np.inf for y in x.nbest(200))
