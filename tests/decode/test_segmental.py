"""The segmental searches against all texts and boundaries, in chunks of any size, and their cost."""

import functools
import gc
import itertools
import weakref
import zlib
from dataclasses import replace

import numpy as np
import pytest

from asr.context import WHOLE
from asr.decode.config import SearchConfig
from asr.decode.modes import NEEDS, decode, modes_for, start_search
from asr.decode.scorer import Step
from asr.decode.segments import Segments
from asr.errors import ConfigError

BLANK, SOS_EOS = 0, 1
MODES = [mode for mode, decoder in NEEDS.items() if decoder == "segmental"]
ONLINE = ["segmental", "segmental-simple"]
EXACT = SearchConfig(beam=10**6, nbest=6, min_emit=0.0)


@functools.cache
def drawn(key, size):
    return np.random.default_rng(zlib.crc32(np.array(key).tobytes())).normal(size=size)


def normalised(table):
    return table - np.logaddexp.reduce(table, -1, keepdims=True)


class State(list):
    """For each hypothesis its utterance and its tokens after sos/eos; and the memory."""

    memory = None


class Memory(list):
    """(seed, number of frames so far) of each utterance."""


class Toy:
    """A segmental model of random tables: a token depends on the tokens before it and its segment.

    A waveform is [seed, number of frames].
    """

    sos_eos = SOS_EOS
    frame_s = 0.04
    decoder_type = "segmental"
    has_reverse = False
    has_ctc = True
    max_tokens = 0
    prompt = ()
    symbols = ()

    def __init__(self, num_tokens=4, max_frames=9, scale=2.0, odds=-0.5):
        self.num_tokens, self.max_frames, self.scale, self.odds = num_tokens, max_frames, scale, odds
        self.heard = self.num_steps = self.num_rows = 0
        self.states = []

    def encode(self, samples, context=WHOLE):
        lens = [int(n) for _, n in samples]
        frames = [np.zeros((n, self.num_tokens), np.float32) for n in lens]
        return frames, Memory((int(seed), n) for (seed, _), n in zip(samples, lens, strict=True))

    def view(self, memory, utterance, num_frames):
        seed, length = memory[utterance]
        assert num_frames <= length
        return Memory([(seed, num_frames)])

    def start(self, memory, owner):
        return self._made([(memory[n], ()) for n in owner], memory)

    def select(self, state, index):
        return self._made([state[b] for b in index.tolist()], state.memory)

    def join(self, states, memory):
        rows = [(memory[0], past) for state in states for _, past in state]
        assert len({len(past) for _, past in rows}) == 1
        return self._made(rows, memory)

    def step(self, state, tokens, k, window=None):
        assert (window.end > window.start).all()
        assert all(end <= arrived for end, ((_, arrived), _) in zip(window.end, state, strict=True))
        self.heard += int((window.end - window.start).sum())
        self.num_steps, self.num_rows = self.num_steps + 1, self.num_rows + len(state)
        grown = [(memory, (*past, int(token))) for (memory, past), token in zip(state, tokens, strict=True)]
        rows = zip(grown, window.start.tolist(), window.end.tolist(), strict=True)
        table = np.stack([self.following(m[0], past[1:], start, end) for (m, past), start, end in rows])
        ids = np.argsort(-table, 1)[:, :k]
        return Step(
            ids, np.take_along_axis(table, ids, 1), np.zeros((len(ids), 0)), self._made(grown, state.memory)
        )

    @functools.cache  # noqa: B019
    def following(self, seed, tokens, start, end):
        """(V,): the probabilities of units given that the text continues, and of sos/eos that it ends."""
        table = self.draw((seed, *tokens, -1, start, end), self.num_tokens)
        units = normalised(table[2:])
        return np.concatenate([[-np.inf, -np.logaddexp(0, -table[SOS_EOS])], units]).astype(np.float32)

    def emit(self, memory, frames, labels, durations):
        ((seed, arrived),) = memory
        assert (frames < arrived).all()
        rows = zip(frames.tolist(), labels.tolist(), durations.tolist(), strict=True)
        return np.array([self.draw((seed, -2, *row), 1)[0] + self.odds for row in rows], np.float32)

    def log_lengths(self):
        return normalised(self.draw((-3,), self.num_tokens * self.max_frames).reshape(-1, self.max_frames))

    def draw(self, key, size):
        return drawn(key, size) * self.scale

    def _made(self, rows, memory):
        state = State(rows)
        state.memory = memory
        self.states = [x for x in self.states if x() is not None]
        self.states.append(weakref.ref(state))
        return state


def terms(toy, seed, tokens, ends, num_frames, kind):
    """Log-probabilities of tokens and of segment lengths, given the segment ends."""
    ends = [*ends]
    text = [*tokens]
    if not ends or ends[-1] < num_frames:
        ends, text = [*ends, num_frames], [*text, SOS_EOS]
    attention, length, start, last = 0.0, 0.0, 0, SOS_EOS
    for n, (token, end) in enumerate(zip(text, ends, strict=True)):
        table = toy.following(seed, tokens[:n], max(start, end - toy.max_frames), end).astype(np.float64)
        attention += table[token]
        if end == num_frames and token != SOS_EOS:
            attention += np.log(-np.expm1(table[SOS_EOS]))
        for t in range(start + 1, min(end + 1, num_frames)) if kind == "neural" else ():
            odds = toy.emit([(seed, num_frames)], *np.array([[t - 1], [last], [t - start]]))[0]
            length -= np.logaddexp(0, -odds if t == end else odds)
        if kind == "static":
            length += toy.log_lengths()[token, min(end - start, toy.max_frames) - 1]
        start, last = end, token
    return attention, length


def every_path(num_frames, units):
    for count in range(num_frames + 1):
        for ends in itertools.combinations(range(1, num_frames + 1), count):
            for tokens in itertools.product(units, repeat=count):
                yield tokens, ends


def every_answer(toy, wave, config):
    """Each text with the score of its best segmentation, or of all of them, and its best segmentation."""
    seed, num_frames = map(int, wave)
    found = {}
    for tokens, ends in every_path(num_frames, range(2, toy.num_tokens)):
        attention, length = terms(toy, seed, tokens, ends, num_frames, config.length_model)
        found.setdefault(tokens, []).append((attention + config.length_scale * length, ends))
    together = np.logaddexp.reduce if config.recombine == "sum" else max
    answers = {t: (float(together([s for s, _ in paths])), max(paths)[1]) for t, paths in found.items()}
    return sorted(((score, tokens, ends) for tokens, (score, ends) in answers.items()), reverse=True)


WAVES = [np.array(x, np.float32) for x in ((1, 6), (2, 5), (3, 1), (4, 2), (5, 6))]
CASES = [
    {},
    {"recombine": "sum"},
    {"length_scale": 0.4},
    {"length_model": "static"},
    {"length_model": "static", "recombine": "sum", "length_scale": 0.5},
    {"length_model": "none"},
    {"length_model": "none", "recombine": "sum"},
]


def test_a_model_of_tables_is_certain_of_everything_together():
    """Otherwise the enumeration below would be incomplete."""
    toy = Toy(5)
    total = sum(np.exp(sum(terms(toy, 7, *path, 5, "neural"))) for path in every_path(5, range(2, 5)))
    assert total == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("max_frames", [9, 2])
@pytest.mark.parametrize("mode", MODES)
def test_an_infinite_beam_finds_the_best_of_all(mode, max_frames, case):
    """Also where a segment is longer than what its token attends to."""
    config = replace(EXACT, **case)
    for wave in WAVES[: 5 if max_frames == 9 else 2]:
        toy = Toy(max_frames=max_frames)
        expected = every_answer(toy, wave, config)[: config.nbest]
        found = decode(toy, mode, [wave], config)[0]
        assert [x.tokens for x in found] == [tokens for _, tokens, _ in expected]
        np.testing.assert_allclose([x.score for x in found], [s for s, _, _ in expected], atol=1e-5)
        for x, (_, tokens, ends) in zip(found, expected, strict=True):
            if config.recombine == "max":
                assert x.frames == tuple(t - 1 for t in ends)
                parts = terms(toy, int(wave[0]), tokens, ends, int(wave[1]), config.length_model)
                assert tuple(x.parts.values()) == pytest.approx(parts, abs=1e-5)
                score = x.parts["attention"] + config.length_scale * x.parts["length"]
                assert x.score == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("mode", ONLINE)
@pytest.mark.parametrize("odds", [-0.5, -2.5])
@pytest.mark.parametrize("config", [SearchConfig(beam=3, nbest=3), SearchConfig(beam=1, min_emit=0.0)])
def test_frames_may_arrive_as_they_like(mode, config, odds):
    """Partial texts are also the same, wherever a chunk ends."""
    wave = np.array((8, 40))
    _, memory = Toy().encode([wave])
    partial, answers = {}, []
    for sizes in ([40], [1] * 40, [7, 0, 1, 2, 13, 17], [39, 1]):
        toy = Toy(6, max_frames=4, odds=odds)
        search, done = start_search(mode, toy, config), 0
        assert search.best().tokens == ()
        for size in sizes:
            done += size
            search.advance(toy.view(memory, 0, done), np.zeros((size, 6), np.float32))
            best = search.best()
            assert best == partial.setdefault(done, best)
        answers.append(search.finish())
    assert all(x == answers[0] for x in answers)
    assert len(answers[0][0].tokens) > (5 if odds > -1 else 0)
    assert len({x.tokens for x in partial.values()}) > (5 if odds > -1 else 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_one_by_one(mode):
    config = SearchConfig(beam=4, nbest=3)
    waves = [*WAVES, np.zeros(0, np.float32), np.array((6, 0), np.float32), np.array((7, 30), np.float32)]
    waves[-3] = np.array((9, 12), np.float32)
    together = decode(Toy(5), mode, waves, config)
    for wave, nbest in zip(waves, together, strict=True):
        assert nbest == decode(Toy(5), mode, [wave], config)[0]
    assert together[-2][0].tokens == ()
    assert together[-1][0].tokens


@pytest.mark.parametrize("mode", MODES)
def test_every_answer_is_complete(mode):
    config = SearchConfig(beam=5, nbest=5)
    for nbest in decode(Toy(6), mode, [np.array((n, 3 + n), np.float32) for n in range(12)], config):
        assert 1 <= len(nbest) <= 5
        assert len({x.tokens for x in nbest}) == len(nbest)
        assert [x.score for x in nbest] == sorted((x.score for x in nbest), reverse=True)
        for x in nbest:
            assert len(x.tokens) == len(x.frames) == len(x.confidence)
            assert all(a < b for a, b in itertools.pairwise(x.frames))
            assert all(0 <= p <= 1 for p in x.confidence)
            assert not set(x.tokens) & {BLANK, SOS_EOS}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("odds", [-30.0, 30.0])
def test_a_length_model_that_is_sure(mode, odds):
    """It never ends a segment, and the result is one token or none; or it ends one in each frame."""
    (nbest,) = decode(Toy(odds=odds), mode, [np.array((3, 20))], SearchConfig(beam=3))
    assert len(nbest[0].tokens) <= 1 if odds < 0 else len(nbest[0].tokens) >= 19


def test_closed_hypotheses_do_not_compete_with_open_ones():
    """At the first of two frames an open segment scores better, as it has not yet paid for its token."""

    class Two(Toy):
        def following(self, seed, tokens, start, end):
            last = [1e-300, 0.9, 0.5, 0.5] if tokens else [1e-300, 0.05, 0.5, 0.5]
            return np.log(last if end == 2 else [1e-300, 0.5, 0.7, 0.3])

        def emit(self, memory, frames, labels, durations):
            return np.zeros(len(frames))

    wave, one = np.array((1, 2)), SearchConfig(beam=1, min_emit=0.0)
    (simple,), (segmental,) = (
        decode(Two(), mode, [wave], one)[0] for mode in ("segmental-simple", "segmental")
    )
    score, *best = every_answer(Two(), wave, one)[0]
    assert best == [segmental.tokens, (1,)] == [(2,), (1,)]
    assert segmental.score == pytest.approx(score)
    assert np.exp([simple.score, segmental.score]) == pytest.approx([0.5 * 0.5 * 0.95, 0.5 * 0.7 * 0.9])


def test_little_is_lost_by_trying_only_likely_ends():
    exact, quick = SearchConfig(beam=4, min_emit=0.0), SearchConfig(beam=4)
    for seed in range(5):
        wave, costs, scores = np.array((seed, 30)), [], []
        for config in (exact, quick):
            toy = Toy(5, odds=-4.0)
            scores.append(decode(toy, "segmental", [wave], config)[0][0].score)
            costs.append(toy.num_rows)
        assert costs[1] < 0.7 * costs[0]
        assert scores[1] > scores[0] - 3


class Pause(Toy):
    """Tokens are likely only at frames 60 and 63; before, an end is always possible but unlikely."""

    def following(self, seed, tokens, start, end):
        units = np.array([-0.1, -2.4]) if end in (60, 63) else np.full(2, -30.0)
        return np.array([-np.inf, -0.1, *units], np.float32)

    def emit(self, memory, frames, labels, durations):
        return np.where(np.isin(frames + 1, (60, 63)), 3.0, -1.0).astype(np.float32)


@pytest.mark.parametrize("mode", ONLINE)
def test_behind_a_long_pause_the_search_goes_on(mode):
    """Although a segment of that length was unlikely when it began."""
    for config in (SearchConfig(beam=4, min_emit=0.0), SearchConfig(beam=4)):
        ((best,),) = decode(Pause(), mode, [np.array((1, 70))], config)
        assert (best.tokens, best.frames) == ((2, 2), (59, 62))


class Steady(Toy):
    """Whatever the history, the next token is 2, and a segment has about six frames."""

    def following(self, seed, tokens, start, end):
        return np.log(np.array([1e-300, 0.1, 0.9, 0.1]))

    def emit(self, memory, frames, labels, durations):
        return np.where(durations % 6 == 0, 3.0, -3.0)


@pytest.mark.parametrize("mode", ONLINE)
def test_the_cost_is_proportional_to_the_frames(mode):
    """Twenty times the frames, twenty times the attention; for global attention it would be 400 times."""
    heard = []
    for num_frames in (30, 600):
        toy = Steady(max_frames=8)
        (nbest,) = decode(toy, mode, [np.array((1, num_frames))], SearchConfig(beam=2))
        assert len(nbest[0].tokens) == num_frames // 6
        heard.append((toy.heard, len(nbest[0].tokens) * num_frames))
    slopes = np.log(np.divide(*heard[::-1])) / np.log(20)
    assert slopes == pytest.approx([1, 2], abs=0.1)


@pytest.mark.parametrize("mode", ONLINE)
def test_what_is_not_needed_is_forgotten(mode):
    """There are as many hypotheses, decoder states and memories after 400 frames as after 40, though some
    wait for long."""

    class Seldom(Steady):
        def emit(self, memory, frames, labels, durations):
            return np.where(durations % 60 == 0, 3.0, -6.0)

    toy = Seldom(max_frames=8)
    search = start_search(mode, toy, SearchConfig(beam=3, min_emit=0.0))
    for done in range(4, 401, 4):
        search.advance(toy.view([(1, 400)], 0, done), np.zeros((4, 4), np.float32))
        if done in (40, 200, 400):
            gc.collect()
            states = [x() for x in toy.states if x() is not None]
            assert len(search._pool) <= 3 * 8 + 3
            assert len(states) <= 3 * 8 * 2
            assert (
                len({id(x.memory) for x in states}) <= 1 + 8 / 4
            )  # what has been dropped is forgotten later
            assert len(search._found) <= 8


def test_silence_is_waited_out():
    """Silence for longer than the attention limit of a segment, then a token: hypotheses wait."""

    class Late(Steady):
        def emit(self, memory, frames, labels, durations):
            return np.where((frames + 1) % 50 == 0, 6.0, -9.0)

        def following(self, seed, tokens, start, end):
            return np.log(np.array([1e-300, 0.9, 0.9, 0.1]))

    for mode in ONLINE:
        (nbest,) = decode(Late(max_frames=4), mode, [np.array((1, 170))], SearchConfig(beam=2))
        assert nbest[0].frames == (49, 99, 149)


def test_modes_and_options_that_do_not_fit_are_errors():
    assert set(MODES) < set(modes_for("segmental"))
    assert not set(MODES) & set(modes_for("transformer"))
    for mode in ("joint", "attention", "rescore"):
        with pytest.raises(
            ConfigError, match=f"mode {mode}: .* segmental, expected transformer; use one of .*{MODES[0]}"
        ):
            decode(Toy(), mode, [np.array((1, 3))], SearchConfig())
    for wrong in ({"length_model": "other"}, {"recombine": "min"}, {"length_scale": -1.0}, {"min_emit": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SearchConfig(**wrong)


def test_equal_texts_are_one():
    segments = Segments(Toy(), replace(EXACT, recombine="sum"))
    keys, scores = np.array([5, 3, 5, 7, 3]), np.log([0.1, 0.3, 0.25, 0.0 + 1e-9, 0.1])
    chosen, totals = segments.recombine(keys, scores, 2)
    assert chosen.tolist() == [1, 2]
    np.testing.assert_allclose(np.exp(totals), [0.4, 0.35])
    chosen, totals = segments.recombine(keys, np.full(5, -np.inf), 2)
    assert not len(chosen)
