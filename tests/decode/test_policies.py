"""Policies on a model whose attention is known: what may be committed when, and what never changes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from asr.context import WHOLE
from asr.decode.config import SearchConfig
from asr.decode.modes import decode, start_search
from asr.decode.policies import little_recent, outside_margin
from asr.decode.scorer import Step
from asr.decode.words import word_starts
from asr.errors import ConfigError

POLICIES = ["alignatt", "edatt"]
WRITING = [*POLICIES, "triggered"]
PIECES = [(1,), (5,), (7, 1, 0, 3), (40,)]
WIDE = SearchConfig(beam=4, nbest=1, length_margin=100, max_repeats=100)


@pytest.fixture
def listener(toy):
    """A toy that knows what has arrived: a memory is (seed, frames) of each utterance.

    Token k attends to frame 3 k + 2, or to the last frame but one until that has arrived; a third of the
    attention is always on the last frame. The decoder's tables depend on the number of frames so far, up to
    three after that position.
    """

    class Listener(toy):
        def encode(self, samples, context=WHOLE):
            pairs = [(int(seed), int(num_frames)) for seed, num_frames in samples]
            return [self.log_probs(*pair) for pair in pairs], pairs

        def view(self, memory, utterance, num_frames):
            seed, total = memory[utterance]
            return [(seed, min(num_frames, total))]

        def start(self, memory, owner):
            return [(memory[n], (), 0) for n in owner]

        def join(self, states, memory):
            return [(memory[0], past, key) for state in states for _, past, key in state]

        def step(self, state, tokens, k, window=None):
            ends = window.end if window else [frames for (_, frames), _, _ in state]
            grown, attention = [], np.zeros((len(state), max(ends)), np.float32)
            rows = tokens.reshape(len(tokens), -1).tolist()
            for b, (((seed, frames), past, _), row, end) in enumerate(zip(state, rows, ends, strict=True)):
                past = (*past, *row)
                place = min(3 * (len(past) - 1) + 2, max(end - 2, 0))
                grown.append(((seed, frames), past, min(end, place + 4)))
                attention[b, place] += 2 / 3
                attention[b, end - 1] += 1 / 3
            self.num_steps += 1
            table = np.stack(
                [self.following(seed + 100 * heard, past[1:]) for (seed, _), past, heard in grown]
            )
            ids = np.argsort(-table, 1)[:, :k]
            return Step(ids, np.take_along_axis(table, ids, 1), attention, grown)

        def score(self, memory, owner, tokens, reverse=False, prompt=()):
            return [self._score(memory[n], row) for n, row in zip(owner, tokens, strict=True)]

        def _score(self, memory, row):
            found = []
            for u, token in enumerate([*row, self.sos_eos]):
                past = np.array([[self.sos_eos, *row[:u]]])
                answer = self.step([(memory, (), 0)], past, self.num_tokens)
                found.append(answer.log_probs[0, answer.ids[0].tolist().index(token)])
            return np.array(found, np.float32)

    return Listener


def run(scorer, mode, wave, config, sizes):
    """best() after each piece, and the final results."""
    (log_probs,), memory = scorer.encode([np.array(wave)])
    search, shown, start = start_search(mode, scorer, config), [], 0
    for size in itertools.cycle(sizes):
        if start >= len(log_probs):
            return shown, search.finish()
        end = min(start + size, len(log_probs))
        search.advance(scorer.view(memory, 0, end), log_probs[start:end])
        shown.append((end, search.best()))
        start = end
    raise AssertionError


def test_place_decides_and_the_last_frames_are_forbidden():
    attention = np.array([[0.1, 0.6, 0.1, 0.2], [0.2, 0.1, 0.4, 0.3], [0.1, 0.1, 0.2, 0.6]], np.float32)
    for margin, expected in ((0, [1, 1, 1]), (1, [1, 1, 0]), (2, [1, 0, 0]), (3, [0, 0, 0])):
        found = outside_margin(attention, SearchConfig(margin_frames=margin))
        assert found.tolist() == [bool(x) for x in expected]


def test_share_decides_whatever_the_row_sums_to():
    attention = np.array([[0.1, 0.6, 0.1, 0.2], [0.2, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1]], np.float32)
    for share, frames, expected in ((0.31, 2, [1, 1, 0]), (0.29, 2, [0, 1, 0]), (0.3, 1, [1, 1, 0])):
        config = SearchConfig(recent_share=share, recent_frames=frames)
        assert little_recent(attention, config).tolist() == [bool(x) for x in expected]
        assert little_recent(attention / 7, config).tolist() == [bool(x) for x in expected]


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize(("weight", "offline"), [(0.0, "attention"), (0.3, "joint")])
@pytest.mark.parametrize("mode", POLICIES)
def test_without_a_limit_and_all_at_once_it_is_the_offline_search(listener, mode, weight, offline, beam):
    config = SearchConfig(beam=beam, nbest=3, ctc_weight=weight, margin_frames=0, recent_share=np.inf)
    waves = [np.array(x) for x in ((1, 9), (2, 20), (3, 1), (4, 40), (5, 3))]
    assert decode(listener(6), mode, waves, config) == decode(listener(6), offline, waves, config)


@pytest.mark.parametrize("sizes", PIECES)
@pytest.mark.parametrize("mode", WRITING)
def test_what_is_written_stays(listener, mode, sizes):
    grew = 0
    for seed in range(5):
        config = SearchConfig(beam=4, margin_frames=2, recent_share=0.3, trigger_frames=2)
        shown, answers = run(listener(8), mode, (seed, 40), config, sizes)
        texts = [x.tokens for _, x in shown] + [answers[0].tokens]
        assert all(b[: len(a)] == a for a, b in itertools.pairwise(texts))
        grew += len(set(texts)) > 2
        for end, x in shown:
            assert len(x.tokens) == len(x.frames) == len(x.confidence)
            assert all(0 <= frame < end for frame in x.frames)
            assert all(0 <= p <= 1 for p in x.confidence)
    assert grew > 2 or sizes == (40,)


def test_the_margin_is_kept_by_every_token(listener):
    """Token k attends to frame 3 k + 2, and the last frame does not count."""
    for margin in (1, 3, 6):
        config = replace(WIDE, margin_frames=margin)
        for seed in range(2):
            shown, _ = run(listener(8), "alignatt", (seed, 40), config, (1,))
            for end, x in shown:
                assert all(3 * k + 2 < end - 1 - margin for k in range(len(x.tokens)))


def test_a_larger_margin_never_writes_earlier(listener):
    """The decoder's tables do not depend on what has arrived, only the policy does."""

    class Steady(listener):
        def following(self, seed, tokens):
            return super().following(seed % 100, tokens)

    counts = []
    for margin in (1, 2, 4, 8, 50):
        config = replace(WIDE, margin_frames=margin, ctc_weight=0.0, beam=1)
        shown = [run(Steady(8), "alignatt", (seed, 40), config, (2,))[0] for seed in range(6)]
        counts.append([len(x.tokens) for one in shown for _, x in one])
    for less, more in itertools.pairwise(counts):
        assert all(a >= b for a, b in zip(less, more, strict=True))
    assert sum(counts[0]) > sum(counts[3]) > 0 == sum(counts[-1])


def test_a_share_of_nothing_writes_nothing_before_the_end(listener):
    shown, answers = run(listener(8), "edatt", (2, 40), replace(WIDE, recent_share=0.0), (5,))
    assert not any(x.tokens for _, x in shown)
    assert answers == decode(listener(8), "joint", [np.array((2, 40))], WIDE)[0]


def test_only_whole_words_are_written(listener):
    """Also when the text seems to end after a word, and then continues."""
    wrote = 0
    for seed in range(4):
        scorer = listener(8)
        scorer.word_starts = np.array([0, 0, 0, 1, 1, 0, 0, 0], bool)
        shown, answers = run(scorer, "alignatt", (seed, 40), replace(WIDE, margin_frames=2), (4,))
        texts = [x.tokens for _, x in shown] + [answers[0].tokens]
        for less, more in itertools.pairwise(texts):
            assert more[: len(less)] == less
            wrote += 0 < len(less) < len(more)
    assert wrote > 1


def test_half_a_word_waits_for_the_next(listener):
    """3 begins a word, 5 continues it; after six tokens the text ends."""

    def decoder(tokens):
        following = 1 if len(tokens) == 6 else 5 if len(tokens) % 2 else 3
        return np.where(np.arange(8) == following, -0.01, -9).astype(np.float32)

    scorer = listener(8, decoder)
    scorer.word_starts = np.arange(8) == 3
    config = replace(WIDE, ctc_weight=0.0, margin_frames=1)
    shown, _ = run(scorer, "alignatt", (1, 40), config, (1,))
    lengths = [len(x.tokens) for _, x in shown]
    assert sorted(set(lengths)) == [0, 2, 4, 6]
    assert lengths.index(6) < 40 - 1


def test_silence_is_not_searched(listener):
    class Silent(listener):
        def log_probs(self, seed, num_frames):
            return (
                np.where(np.arange(self.num_tokens) == 0, -0.01, -9.0)
                .astype(np.float32)[None]
                .repeat(num_frames, 0)
            )

    for mode in WRITING:
        scorer = Silent(8)
        search = start_search(mode, scorer, WIDE)
        for end in range(1, 20):
            search.advance([(1, end)], scorer.log_probs(1, 1))
        assert (search.best().tokens, scorer.num_steps) == ((), 0)
        assert len(search.finish()) == 1
        assert start_search(mode, scorer, WIDE).finish()[0].tokens == ()


def test_a_guard_leaves_what_is_written(listener):
    """A decoder that loops once 12 frames have arrived: CTC continues after the committed tokens."""

    class Loops(listener):
        def following(self, seed, tokens):
            if seed < 1200:
                return super().following(seed % 100, tokens) - 4 * (np.arange(self.num_tokens) == 1)
            return np.where(np.arange(self.num_tokens) == 5, -0.01, -9.0).astype(np.float32)

    replaced = 0
    for seed in range(12):
        config = SearchConfig(beam=2, margin_frames=1, ctc_weight=0.0, max_repeats=2)
        shown, answers = run(Loops(8), "alignatt", (seed, 40), config, (3,))
        written = shown[-1][1].tokens
        assert answers[0].tokens[: len(written)] == written
        assert len(answers[0].tokens) == len(answers[0].frames) == len(answers[0].confidence)
        if answers[0].guard and written:
            replaced += 1
            assert all(a < b for a, b in itertools.pairwise(answers[0].frames[len(written) - 1 :]))
    assert replaced > 3


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_triggered_in_pieces_is_triggered_at_once(listener, beam, weight):
    for seed, look_ahead in itertools.product(range(4), (0, 3, 100)):
        config = SearchConfig(beam=beam, nbest=3, ctc_weight=weight, trigger_frames=look_ahead)
        expected = decode(listener(8), "triggered", [np.array((seed, 40))], config)[0]
        spikes = decode(listener(8), "ctc-greedy", [np.array((seed, 40))], config)[0][0].frames
        assert all(x.frames == spikes and len(x.tokens) == len(spikes) for x in expected)
        for sizes in PIECES:
            shown, found = run(listener(8), "triggered", (seed, 40), config, sizes)
            assert found == expected
            for end, x in shown:
                assert len(x.tokens) <= sum(frame + look_ahead < end for frame in spikes)
                assert x.tokens == expected[0].tokens[: len(x.tokens)]
                assert beam > 1 or len(x.tokens) == sum(frame + look_ahead < end for frame in spikes)


def test_triggered_hears_up_to_the_look_ahead(listener):
    """With a beam of one each token is the decoder's best, given the frames up to `trigger_frames` after its
    spike; with unlimited look-ahead it is greedy decoding of that length."""
    for seed, look_ahead in itertools.product(range(4), (0, 2, 40)):
        scorer = listener(8)
        config = SearchConfig(beam=1, ctc_weight=0.0, trigger_frames=look_ahead)
        found = decode(scorer, "triggered", [np.array((seed, 30))], config)[0][0]
        tokens = []
        for k, spike in enumerate(found.frames):
            heard = min(spike + look_ahead + 1, 30)
            place = min(3 * k + 2, max(heard - 2, 0))
            table = scorer.following(seed + 100 * min(heard, place + 4), tokens)
            table[[0, 1]] = -np.inf
            tokens.append(int(table.argmax()))
        assert found.tokens == tuple(tokens)


def test_triggered_wide_beam_finds_the_best_sequence(toy):
    """By enumeration: as many tokens as spikes, scored by decoder and CTC."""
    for seed in range(6):
        scorer, wave = toy(5), np.array((seed, 5))
        config = SearchConfig(beam=100, nbest=4, ctc_weight=0.4, trigger_frames=9)
        found = decode(scorer, "triggered", [wave], config)[0]
        log_probs, spikes = scorer.log_probs(seed, 5), found[0].frames
        scores = {}
        for tokens in itertools.product((2, 3, 4), repeat=len(spikes)):
            attention = sum(scorer.following(seed, tokens[:k])[c] for k, c in enumerate(tokens))
            scores[tokens] = 0.6 * attention + 0.4 * log_probs[list(spikes), list(tokens)].sum()
        best = sorted(scores, key=lambda x: -scores[x])[:4]
        assert [x.tokens for x in found] == best
        np.testing.assert_allclose([x.score for x in found], [scores[x] for x in best], rtol=1e-5)


@pytest.mark.parametrize("mode", WRITING)
def test_agreement_ends_a_search_early(listener, mode):
    """The search stops once no further token is allowed: pieces cost less than as many full searches."""
    whole = listener(8)
    decode(whole, "joint", [np.array((1, 40))], WIDE)
    scorer = listener(8)
    (log_probs,), memory = scorer.encode([np.array((1, 40))])
    search = start_search(mode, scorer, replace(WIDE, margin_frames=40, recent_share=0.0, trigger_frames=40))
    for end in range(1, 41):
        search.advance(scorer.view(memory, 0, end), log_probs[end - 1 : end])
    assert scorer.num_steps <= 40 < 40 * whole.num_steps


def test_units_say_where_words_begin():
    symbols = ["<blk>", "<sos/eos>", "⁇", "▁", "▁a", "b", "▁"]

    def spell(ids):
        surface = "".join("" if i < 2 else symbols[i] for i in ids)
        return [(word, 0, 0) for word in surface.replace("▁", " ").split()]

    assert word_starts(spell, 7).tolist() == [False, False, False, True, True, False, True]


@pytest.mark.parametrize(
    "wrong", [{"margin_frames": -1}, {"recent_share": np.nan}, {"recent_frames": 0}, {"trigger_frames": -1}]
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SearchConfig(**wrong)


def test_what_comes_after_a_forbidden_token_waits_too(listener):
    """The third token attends to the end, later ones to the start again."""

    class Jumps(listener):
        def step(self, state, tokens, k, window=None):
            found = super().step(state, tokens, k, window)
            attention = np.zeros_like(found.attention)
            for b, (_, past, _) in enumerate(found.state):
                attention[b, -2 if len(past) == 3 else 0] = 1
            return found._replace(attention=attention)

    config = replace(WIDE, margin_frames=2)
    lengths = {
        len(x.tokens) for seed in range(4) for _, x in run(Jumps(8), "alignatt", (seed, 30), config, (5,))[0]
    }
    assert 2 in lengths
    assert max(lengths) == 2
