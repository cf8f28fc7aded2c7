"""Search chunk by chunk against enumeration, fed at once and in pieces."""

import itertools
import zlib

import numpy as np
import pytest

from asr.context import WHOLE, Context
from asr.decode.chunked import ChunkedSearch
from asr.decode.config import SearchConfig
from asr.decode.modes import check_mode, decode
from asr.decode.scorer import Chunking, Step
from asr.errors import ConfigError

BLANK, EOC = 0, 1
WAVES = [np.array(x, np.float32) for x in ((1, 6), (2, 5), (3, 1), (4, 4), (5, 3))]
EITHER = pytest.mark.parametrize("hears_eoc", [True, False])


@pytest.fixture
def chunked(toy):
    """A toy whose tables are also keyed by the window. The memory is (seed, number of frames so far)."""

    class Chunked(toy):
        decoder_type = "chunked"

        def __init__(self, chunking, num_tokens=4, table=None):
            super().__init__(num_tokens)
            self.chunking, self.table, self.num_heard = chunking, table, 0

        def heard(self, seed, tokens, start, end):
            """Log-probabilities (V,) of the next token, given tokens that begin with sos and a window."""
            if self.table is not None:
                return self.table
            return self.following(zlib.crc32(np.array([seed, start, end]).tobytes()), tokens[1:])

        def encode(self, samples, context=WHOLE):
            return super().encode(samples)[0], [(int(seed), int(frames)) for seed, frames in samples]

        def view(self, memory, utterance, num_frames):
            return [(memory[utterance][0], num_frames)]

        def start(self, memory, owner):
            return [(memory[n], ()) for n in owner]

        def join(self, states, memory):
            joined = [(memory[0], past) for state in states for _, past in state]
            assert len({len(past) for _, past in joined}) == 1
            return joined

        def step(self, state, tokens, k, window=None):
            self.num_steps += 1
            grown, tables = [], []
            spans = zip(window.start.tolist(), window.end.tolist(), strict=True)
            for ((seed, arrived), past), token, (start, end) in zip(state, tokens, spans, strict=True):
                assert 0 <= start < end <= arrived
                self.num_heard += end - start
                grown.append(((seed, arrived), (*past, int(token))))
                tables.append(self.heard(seed, grown[-1][1], start, end))
            table = np.stack(tables)
            ids = np.argsort(-table, 1)[:, :k]
            return Step(ids, np.take_along_axis(table, ids, 1), np.zeros((len(ids), 0), np.float32), grown)

    return Chunked


def path_score(scorer, seed, num_frames, chunks):
    """Log-probability of the labels of each chunk, and of the EOCs."""
    score, tokens = 0.0, (EOC,)
    for k, labels in enumerate(chunks):
        for symbol in (*labels, EOC):
            score += float(scorer.heard(seed, tokens, *scorer.chunking.span(k, num_frames))[symbol])
            if symbol != EOC or scorer.chunking.hears_eoc:
                tokens = (*tokens, symbol)
    return score


def every_answer(scorer, seed, num_frames, max_labels):
    """Label sequence -> the scores of all its alignments."""
    units = range(2, scorer.num_tokens)
    parts = [x for n in range(max_labels + 1) for x in itertools.product(units, repeat=n)]
    found: dict = {}
    for chunks in itertools.product(parts, repeat=-(-num_frames // scorer.chunking.step)):
        score = path_score(scorer, seed, num_frames, chunks)
        found.setdefault(tuple(itertools.chain(*chunks)), []).append(score)
    return found


@pytest.mark.parametrize("recombine", ["max", "sum"])
@pytest.mark.parametrize("chunking", [Chunking(2, 3, 1, False), Chunking(3, 3, 0, False)], ids=str)
@pytest.mark.parametrize("wave", WAVES, ids=str)
def test_wide_search_finds_the_exact_nbest_list(chunked, chunking, wave, recombine):
    scorer, (seed, num_frames) = chunked(chunking), map(int, wave)
    together = np.max if recombine == "max" else np.logaddexp.reduce
    answers = every_answer(scorer, seed, num_frames, max_labels=2)
    expected = sorted(((float(together(x)), text) for text, x in answers.items()), reverse=True)[:9]
    config = SearchConfig(beam=400, nbest=9, max_labels_per_chunk=2, recombine=recombine)
    found = decode(scorer, "chunked", [wave], config)[0]
    assert [x.tokens for x in found] == [text for _, text in expected]
    np.testing.assert_allclose([x.score for x in found], [s for s, _ in expected], rtol=0, atol=1e-5)


def plainly(scorer, seed, num_frames, beam, max_labels):
    """The search by its definition, one hypothesis and one symbol at a time, without a threshold."""
    hypotheses = [((), (EOC,), 0.0)]
    for k in range(-(-num_frames // scorer.chunking.step)):
        paths, closed = hypotheses, {}
        for n in range(max_labels + 1):
            grown = []
            for text, read, score in paths:
                table = scorer.heard(seed, read, *scorer.chunking.span(k, num_frames)).astype(np.float64)
                behind = (*read, EOC) if scorer.chunking.hears_eoc else read
                closed.setdefault(text, []).append((text, behind, score + table[EOC]))
                units = range(2, scorer.num_tokens) if n < max_labels else ()
                grown += [((*text, c), (*read, c), score + table[c]) for c in units]
            paths = sorted(grown, key=lambda x: -x[2])[:beam]
        best = [max(same, key=lambda x: x[2]) for same in closed.values()]
        hypotheses = sorted(best, key=lambda x: -x[2])[:beam]
    return hypotheses


@EITHER
@pytest.mark.parametrize("beam", [3, 4, 7])
def test_a_narrow_search_keeps_the_best_of_each_step(chunked, hears_eoc, beam):
    config = SearchConfig(beam=beam, nbest=beam, max_labels_per_chunk=3)
    for seed in range(8):
        scorer = chunked(Chunking(4, 6, 2, hears_eoc), num_tokens=6)
        expected = plainly(scorer, seed, 15, beam, 3)
        found = decode(scorer, "chunked", [np.array((seed, 15), np.float32)], config)[0]
        assert [x.tokens for x in found] == [text for text, _, _ in expected]
        np.testing.assert_allclose([x.score for x in found], [x[2] for x in expected], rtol=0, atol=1e-5)


def by_chunks(hypothesis, step, num_frames):
    places = np.array(hypothesis.frames, int) // step
    return [np.array(hypothesis.tokens)[places == k].tolist() for k in range(-(-num_frames // step))]


@EITHER
@pytest.mark.parametrize("beam", [1, 2, 6])
def test_each_answer_is_a_path_with_its_score(chunked, hears_eoc, beam):
    """Frames tell the chunk of each token; no chunk has more tokens than allowed."""
    scorer = chunked(Chunking(4, 6, 2, hears_eoc), num_tokens=6)
    waves = [np.array((seed, frames), np.float32) for seed, frames in enumerate((1, 4, 5, 17, 30, 8))]
    config = SearchConfig(beam=beam, nbest=4, max_labels_per_chunk=3)
    for (seed, num_frames), nbest in zip(waves, decode(scorer, "chunked", waves, config), strict=True):
        assert 1 <= len(nbest) <= min(beam, 4)
        assert len({x.tokens for x in nbest}) == len(nbest)
        assert [x.score for x in nbest] == sorted((x.score for x in nbest), reverse=True)
        for x in nbest:
            chunks = by_chunks(x, 4, int(num_frames))
            assert tuple(itertools.chain(*chunks)) == x.tokens
            assert max(map(len, chunks)) <= 3
            assert list(x.frames) == sorted(x.frames)
            assert all(0 <= frame < num_frames for frame in x.frames)
            assert x.score == pytest.approx(path_score(scorer, int(seed), int(num_frames), chunks), abs=1e-5)
            assert x.parts == {"attention": x.score}
            assert len(x.confidence) == len(x.tokens)
            assert all(0 < p <= 1 for p in x.confidence)


def feed(scorer, wave, config, sizes):
    (log_probs,), memory = scorer.encode([wave])
    search, done = ChunkedSearch(scorer, config), 0
    for size in itertools.chain(sizes, itertools.repeat(len(log_probs))):
        if done >= len(log_probs):
            return search.finish()
        part = log_probs[done : done + size]
        done += len(part)
        search.advance(scorer.view(memory, 0, done), part)
    raise AssertionError


@EITHER
@pytest.mark.parametrize("recombine", ["max", "sum"])
@pytest.mark.parametrize(("step", "window", "left"), [(3, 3, 0), (3, 8, 2), (5, 6, 0), (40, 50, 0)])
def test_how_frames_arrive_changes_nothing(chunked, step, window, left, recombine, hears_eoc):
    config = SearchConfig(beam=4, nbest=4, max_labels_per_chunk=3, recombine=recombine)
    rng = np.random.default_rng(0)
    for seed in range(2):
        wave = np.array((seed, 14 + 3 * seed), np.float32)
        scorer = chunked(Chunking(step, window, left, hears_eoc), num_tokens=6)
        expected = decode(scorer, "chunked", [wave], config)[0]
        for sizes in ([], [1] * 20, [0, 2, 0, 5], rng.integers(0, 6, 30).tolist()):
            assert feed(scorer, wave, config, sizes) == expected
        assert decode(scorer, "chunked", [wave], config, Context(4))[0] == expected


def test_a_chunk_is_written_as_soon_as_its_window_is_there(chunked):
    scorer = chunked(Chunking(4, 6, 1, True), num_tokens=6)
    (log_probs,), memory = scorer.encode([np.array((3, 20), np.float32)])
    search, config = ChunkedSearch(scorer, SearchConfig(beam=3)), SearchConfig(beam=3)
    calls = []
    for t in range(20):
        before = scorer.num_steps
        search.advance(scorer.view(memory, 0, t + 1), log_probs[t : t + 1])
        calls.append(scorer.num_steps > before)
        assert search.best().frames == tuple(sorted(search.best().frames))
        assert all(frame < max(t - 1, 0) for frame in search.best().frames)
    assert [t + 1 for t in range(20) if calls[t]] == [6, 10, 14, 18]
    assert search.finish() == decode(scorer, "chunked", [np.array((3, 20), np.float32)], config)[0]


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_a_decoder_that_never_ends_is_ended(chunked, cap):
    """Its EOC is not among the candidates until the chunk is full; 0: one label per frame."""
    table = np.log(np.full(40, 0.025, np.float32))
    table[EOC] = -20.0
    scorer = chunked(Chunking(5, 5, 0, True), 40, table)
    config = SearchConfig(beam=2, max_labels_per_chunk=cap)
    (best,) = decode(scorer, "chunked", [np.array((1, 12), np.float32)], config)[0]
    assert [len(labels) for labels in by_chunks(best, 5, 12)] == [cap or 5] * 3


@EITHER
def test_the_cost_grows_with_the_length_and_not_faster(chunked, hears_eoc):
    heard = []
    for num_frames in (50, 100, 200):
        scorer = chunked(Chunking(5, 7, 0, hears_eoc), num_tokens=6)
        decode(scorer, "chunked", [np.array((2, num_frames), np.float32)], SearchConfig(beam=4))
        heard.append(scorer.num_heard)
    slopes = np.diff(np.log2(heard))
    assert (np.abs(slopes - 1) < 0.1).all()


def test_a_batch_equals_one_by_one(chunked):
    scorer = chunked(Chunking(2, 3, 0, True), num_tokens=6)
    waves = [*WAVES, np.zeros(0, np.float32), np.array((6, 0), np.float32), np.array((7, 30), np.float32)]
    config = SearchConfig(beam=4, nbest=3)
    together = decode(scorer, "chunked", waves, config)
    assert [decode(scorer, "chunked", [wave], config)[0] for wave in waves] == together
    assert [(x.tokens, x.score) for x in together[5] + together[6]] == [((), 0.0)] * 2
    search = ChunkedSearch(scorer, config)
    assert search.best().tokens == search.finish()[0].tokens == ()


def test_a_mode_for_another_decoder_is_refused():
    check_mode("chunked", "chunked")
    check_mode("ctc-prefix", "chunked")
    with pytest.raises(ConfigError, match="this model's decoder is of type transformer, expected chunked"):
        check_mode("chunked", "transformer")
    with pytest.raises(
        ConfigError, match=r"expected transformer; use one of ctc-greedy, ctc-prefix, chunked$"
    ):
        check_mode("joint", "chunked")


@pytest.mark.parametrize("wrong", [{"max_labels_per_chunk": -1}, {"recombine": "mean"}])
def test_a_config_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SearchConfig(**wrong)
