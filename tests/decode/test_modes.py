"""Every mode against enumeration of all token sequences, at extreme weights, and one utterance at a time."""

import itertools

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.modes import decode, modes_for
from asr.decode.words import Word, words
from asr.errors import ConfigError

WIDE = SearchConfig(beam=400, nbest=8, tokens_per_frame=4, length_margin=100, max_repeats=100)
WEIGHTS = {"ctc-greedy": 1.0, "ctc-prefix": 1.0, "attention": 0.0, "unbounded": 0.0}
WEIGHTS |= dict.fromkeys(("joint", "rescore", "alignatt", "edatt", "triggered"), 0.3)
WAVES = [np.array(x, np.float32) for x in ((1, 5), (2, 4), (3, 1), (4, 5), (5, 3))]


def every_answer(toy, wave, weight, enumerate_ctc):
    """Score of each token sequence that fits into the frames: (1 - w) attention + w ctc."""
    ctc = enumerate_ctc(toy.log_probs(*map(int, wave)))
    units = range(2, toy.num_tokens)
    texts = [t for n in range(int(wave[1]) + 1) for t in itertools.product(units, repeat=n)]
    attention = toy.score([int(wave[0])], np.zeros(len(texts), int), texts)
    scores = {t: weight * ctc.get(t, -np.inf) if weight else 0.0 for t in texts}
    for t, a in zip(texts, attention, strict=True):
        scores[t] += (1 - weight) * a.sum(dtype=np.float64) if weight < 1 else 0.0
    return sorted(((s, t) for t, s in scores.items() if s > -np.inf), reverse=True)


@pytest.mark.parametrize("mode", ["ctc-prefix", "attention", "joint", "rescore"])
@pytest.mark.parametrize("wave", WAVES, ids=str)
def test_wide_search_finds_the_exact_nbest_list(toy, enumerate_ctc, mode, wave):
    scorer = toy(5)
    expected = every_answer(scorer, wave, WEIGHTS[mode], enumerate_ctc)[: WIDE.nbest]
    found = decode(scorer, mode, [wave], WIDE)[0]
    assert [x.tokens for x in found] == [t for _, t in expected]
    np.testing.assert_allclose([x.score for x in found], [s for s, _ in expected], rtol=0, atol=1e-5)
    assert not any(x.guard for x in found)


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_a_batch_equals_one_by_one(toy, mode):
    config = SearchConfig(beam=4, nbest=3)
    waves = [*WAVES, np.zeros(0, np.float32), np.array((6, 0), np.float32), np.array((7, 30), np.float32)]
    together = decode(toy(6), mode, waves, config)
    for wave, nbest in zip(waves, together, strict=True):
        alone = decode(toy(6), mode, [wave], config)[0]
        assert [(x.tokens, x.frames, x.guard) for x in alone] == [
            (x.tokens, x.frames, x.guard) for x in nbest
        ]
        np.testing.assert_allclose([x.score for x in alone], [x.score for x in nbest], rtol=1e-9)


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_every_answer_is_complete(toy, mode):
    config = SearchConfig(beam=5, nbest=5, ctc_weight=0.4)
    weight = 0.4 if WEIGHTS[mode] == 0.3 else WEIGHTS[mode]
    for nbest in decode(toy(6), mode, [np.array((n, 3 + n), np.float32) for n in range(12)], config):
        assert 1 <= len(nbest) <= 5
        assert len({x.tokens for x in nbest}) == len(nbest)
        assert [x.score for x in nbest] == sorted((x.score for x in nbest), reverse=True)
        for x in nbest:
            assert len(x.tokens) == len(x.frames) == len(x.confidence)
            assert all(a < b for a, b in itertools.pairwise(x.frames)) or mode in ("attention", "unbounded")
            assert all(0 <= p <= 1 for p in x.confidence)
            if not x.guard:
                parts = x.parts["ctc"] * weight if weight else 0.0
                parts += x.parts["attention"] * (1 - weight) if weight < 1 else 0.0
                assert x.score == pytest.approx(parts, abs=1e-9)


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_nothing_heard_is_nothing_said(toy, mode):
    scorer = toy(5)
    silences = [np.zeros(0, np.float32), np.array((1, 0), np.float32)]
    for nbest in decode(scorer, mode, silences, SearchConfig(nbest=3)):
        assert [(x.tokens, x.frames, x.guard) for x in nbest] == [((), (), "")]
    assert scorer.num_steps == 0
    assert decode(scorer, mode, [], SearchConfig()) == []


@pytest.mark.parametrize("wave", WAVES, ids=str)
def test_weights_at_their_limits(toy, wave):
    config = SearchConfig(
        **{f: getattr(WIDE, f) for f in ("beam", "length_margin", "max_repeats")}, ctc_weight=1
    )
    by_ctc = decode(toy(5), "ctc-prefix", [wave], config)[0][0]
    for mode in ("joint", "rescore"):
        found = decode(toy(5), mode, [wave], config)[0][0]
        assert (found.tokens, found.frames) == (by_ctc.tokens, by_ctc.frames)
        assert found.score == pytest.approx(by_ctc.score, abs=1e-6)
        np.testing.assert_allclose(found.confidence, by_ctc.confidence, rtol=1e-6)
    config = SearchConfig(beam=4, nbest=4, ctc_weight=0)
    assert decode(toy(5), "joint", [wave], config) == decode(toy(5), "attention", [wave], config)


def test_joint_decoding_needs_one_step_per_label_for_all_utterances(toy):
    waves = [np.array((n, 12), np.float32) for n in range(6)]
    alone = [toy(5) for _ in waves]
    for scorer, wave in zip(alone, waves, strict=True):
        decode(scorer, "joint", [wave], SearchConfig(beam=4))
    together = toy(5)
    decode(together, "joint", waves, SearchConfig(beam=4))
    assert together.num_steps == max(x.num_steps for x in alone)
    assert 4 < together.largest <= 6 * 4


def test_rescoring_looks_at_all_that_the_first_pass_found(toy):
    """The result is the best of the first pass's beam by both scores, including the empty hypothesis."""
    config = SearchConfig(beam=6, nbest=1, ctc_weight=0.2, tokens_per_frame=4)
    seen_empty = False
    for seed in range(30):
        wave = np.array((seed, 2), np.float32)
        first = decode(toy(4), "ctc-prefix", [wave], SearchConfig(beam=6, nbest=6))[0]
        scores = toy(4).score([seed], np.zeros(len(first), int), [x.tokens for x in first])
        both = [0.8 * a.sum() + 0.2 * x.score for x, a in zip(first, scores, strict=True)]
        second = decode(toy(4), "rescore", [wave], config)[0]
        assert [x.tokens for x in second] == [first[int(np.argmax(both))].tokens]
        seen_empty |= second[0].tokens == ()
    assert seen_empty


def test_rescoring_in_both_directions_blends_them(toy):
    """The reverse weight applies to scores and confidences; a model with one decoder ignores it."""

    class Both(toy):
        has_reverse = True

        def score(self, memory, owner, tokens, reverse=False, prompt=()):
            found = super().score(memory, owner, tokens)
            return [x * 3 - 1 for x in found] if reverse else found

    wave = np.array((3, 6), np.float32)
    config = SearchConfig(beam=6, nbest=6, ctc_weight=0.2, reverse_weight=0.4)
    alone = {x.tokens: x for x in decode(toy(5), "rescore", [wave], config)[0]}
    both = decode(Both(5), "rescore", [wave], config)[0]
    assert [x.score for x in both] == sorted((x.score for x in both), reverse=True)
    for x in both:
        l2r = alone[x.tokens].parts["attention"]
        expected = 0.6 * l2r + 0.4 * (3 * l2r - (len(x.tokens) + 1))
        assert x.parts["attention"] == pytest.approx(expected, rel=1e-5)
        assert x.score == pytest.approx(0.8 * expected + 0.2 * x.parts["ctc"], rel=1e-5)


def test_words_have_times_and_confidences(toy):
    hypothesis = decode(toy(6), "ctc-prefix", [np.array((1, 40), np.float32)], SearchConfig())[0][0]

    def spell(ids):
        return [(f"w{n}", n, min(n + 2, len(ids))) for n in range(0, len(ids), 2)]

    found = words(hypothesis, spell, 0.04)
    frames = hypothesis.frames
    assert found[0] == Word("w0", frames[0] * 0.04, (frames[1] + 1) * 0.04, min(hypothesis.confidence[:2]))
    assert len(found) == (len(frames) + 1) // 2
    assert all(a.start_s < a.end_s <= b.start_s for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("wrong", [{"beam": 0}, {"nbest": 0}, {"ctc_weight": 1.1}, {"max_repeats": 0}])
def test_a_config_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SearchConfig(**wrong)
