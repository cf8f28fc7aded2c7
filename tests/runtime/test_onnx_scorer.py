import numpy as np
import pytest
import torch

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.joint import search
from asr.decode.modes import decode, modes_for
from asr.decode.scorer import Floats, Window
from asr.decode.speculative import greedy
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle
from asr.runtime.onnx_scorer import OnnxScorer
from export.verify import at_once, in_chunks

CONTEXTS = [Context(chunk, left) for chunk in (4, 8, 16) for left in (0, 2, 4)]
CONTEXTS += [Context(1, 10, 2), Context(1, 10, 10), Context(4, 2, 1), Context(8, 0, 2)]


@pytest.fixture(scope="module")
def scorers(tiny_model: HybridModel, float32: Bundle) -> tuple[TorchScorer, OnnxScorer]:
    return TorchScorer(tiny_model, "cpu", float32.word_starts), OnnxScorer(float32)


@pytest.mark.parametrize("context", [WHOLE, Context(8), Context(8, -1, 1), *CONTEXTS])
def test_at_once_it_is_the_model(scorers: tuple[TorchScorer, OnnxScorer], sound: Floats, context):
    expected, found = (at_once(scorer, context)(sound) for scorer in scorers)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("num_samples", [7 * 16000 - 333, 4 * 10240, 25000, 1500])
def test_chunk_by_chunk_it_is_the_model(
    scorers: tuple[TorchScorer, OnnxScorer], float32: Bundle, sound: Floats, context, num_samples: int
):
    expected = at_once(scorers[0], context)(sound[:num_samples])
    found = in_chunks(float32, context)(sound[:num_samples])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_real_speech_too(scorers: tuple[TorchScorer, OnnxScorer], float32: Bundle, speech: list[Floats]):
    for samples in speech:
        expected = at_once(scorers[0], Context(8, 4))(samples)
        found = in_chunks(float32, Context(8, 4))(samples)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "field", ["frames", *(f"{x}.1" for x in ("keys", "values", "conv", "pending", "queries")), "offset"]
)
def test_every_field_of_the_state_is_heard(float32: Bundle, sound: Floats, field: str):
    """Otherwise the tests above could pass with an unused state."""
    scorer = OnnxScorer(float32)
    context = Context(8, 2, 1)
    framer, state = scorer.framer(), scorer.init_state(context)
    framer.accept(sound)
    for _ in range(4):
        state = scorer.advance(framer.take(32)[None], np.array([32]), context, state).state
    window, num_frames = framer.take(32)[None], np.array([32])
    whole = scorer.advance(window, num_frames, context, state).log_probs
    other = {**state, field: np.zeros_like(state[field])}
    assert np.abs(scorer.advance(window, num_frames, context, other).log_probs - whole).max() > 1e-3


def test_streams_in_a_batch_are_what_they_are_alone(float32: Bundle, sound: Floats):
    """Also where one ends with fewer frames, or with none at all."""
    scorer, rng, context = OnnxScorer(float32), np.random.default_rng(1), Context(8, 2)
    windows = rng.normal(0, 0.1, (4, 31 * 160 + 400)).astype(np.float32)
    num_frames = np.array([32, 17, 0, 32])
    fresh = scorer.init_state(context).items()
    state = {name: rng.normal(0, 1, (4, *x.shape[1:])).astype(x.dtype) for name, x in fresh}
    state["offset"] = np.array([40, 8, 0, 2**40])
    together = scorer.advance(windows, num_frames, context, state)
    assert together.y_lens.tolist() == [8, 5, 0, 8]
    for n in range(4):
        one = {name: x[n : n + 1] for name, x in state.items()}
        alone = scorer.advance(windows[n : n + 1], num_frames[n : n + 1], context, one)
        num = together.y_lens[n]
        np.testing.assert_allclose(together.log_probs[n, :num], alone.log_probs[0, :num], rtol=0, atol=1e-4)
        for name, x in alone.state.items() if num == 8 else ():
            np.testing.assert_allclose(together.state[name][n], x[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_every_mode_gives_the_same_from_torch_and_from_onnx(
    scorers: tuple[TorchScorer, OnnxScorer], speech: list[Floats], mode: str
):
    config = SearchConfig(beam=4, nbest=2)
    samples = [x[:48000] for x in speech] + [np.zeros(0, np.float32), speech[0][:320]]
    expected, found = (decode(scorer, mode, samples, config, Context(8, 4)) for scorer in scorers)
    for a, b in zip(expected, found, strict=True):
        assert [x.tokens for x in a] == [x.tokens for x in b]
        np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=1e-4, atol=1e-3)
        assert [x.frames for x in a] == [x.frames for x in b]
    assert any(x[0].tokens for x in found)


def test_scores_do_not_depend_on_other_hypotheses(scorers: tuple[TorchScorer, OnnxScorer], sound: Floats):
    _, scorer = scorers
    _, memory = scorer.encode([sound, sound[:20000]])
    hypotheses = [(5, 6, 7), (), (9,)]
    together = scorer.score(memory, np.array([0, 1, 1]), hypotheses)
    for n, (owner, tokens) in enumerate(zip((0, 1, 1), hypotheses, strict=True)):
        (alone,) = scorer.score(memory, np.array([owner]), [tokens])
        assert len(alone) == len(tokens) + 1
        np.testing.assert_allclose(together[n], alone, rtol=0, atol=1e-5)


def test_steps_give_what_a_whole_sequence_gives(scorers: tuple[TorchScorer, OnnxScorer], sound: Floats):
    _, scorer = scorers
    _, memory = scorer.encode([sound, sound[:20000]])
    tokens = [5, 9, 9]
    (expected,) = scorer.score(memory, np.array([1]), [tokens])
    state = scorer.start(memory, np.array([0, 1]))
    state = scorer.select(state, np.array([1, 1, 0]))
    found = []
    for last, following in zip([scorer.sos_eos, *tokens], [*tokens, scorer.sos_eos], strict=True):
        ids, log_probs, _, state = scorer.step(state, np.full(3, last), scorer.num_tokens)
        assert (np.diff(log_probs) <= 0).all()
        found.append(log_probs[1, ids[1].tolist().index(following)])
        state = scorer.select(state, np.array([1, 0, 2]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_eight_bits_are_near_but_not_the_same(float32: Bundle, int8: Bundle, sound: Floats):
    a, b = (np.exp(in_chunks(bundle, Context(16, 4))(sound)) for bundle in (float32, int8))
    assert 1e-4 < np.abs(a - b).mean() < 0.03


def test_torch_and_onnx_agree_on_no_frames(scorers: tuple[TorchScorer, OnnxScorer]):
    for scorer in scorers:
        log_probs, memory = scorer.encode([np.zeros(0, np.float32), np.zeros(16000, np.float32)])
        assert [x.shape for x in log_probs] == [(0, 22), (25, 22)]
        assert len(scorer.score(memory, np.array([1]), [(4, 5)])[0]) == 3
    assert torch.get_num_threads() == 1


def test_both_directions_score_the_same_in_torch_and_onnx(
    scorers: tuple[TorchScorer, OnnxScorer], sound: Floats
):
    """Several utterances, lengths, common beginnings and ends; scores come in the order of the tokens."""
    hypotheses = [(5, 6, 7), (), (9,), (4, 4, 8, 6), (9, 3), (5,), (), (5, 6, 8, 7), (5, 6, 7), (3, 8, 6)]
    owner = np.array([0, 1, 1, 0, 1, 2, 2, 0, 0, 0])
    answers = []
    for scorer in scorers:
        _, memory = scorer.encode([sound, sound[:20000], sound[:60]])  # the last has no frame
        answers.append([scorer.score(memory, owner, hypotheses, reverse=r) for r in (False, True)])
    for torch_scores, onnx_scores in zip(*answers, strict=True):
        for tokens, a, b in zip(hypotheses, torch_scores, onnx_scores, strict=True):
            assert len(a) == len(tokens) + 1
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_a_window_is_all_that_a_step_hears(scorers: tuple[TorchScorer, OnnxScorer], sound: Floats):
    window = Window(np.array([3, 0, 10]), np.array([9, 1, 33]))
    answers = []
    for scorer in scorers:
        _, memory = scorer.encode([sound, sound[:20000]])
        owner = np.array([0, 1, 0])
        state = scorer.step(scorer.start(memory, owner), np.full(3, scorer.sos_eos), 3).state
        found = scorer.step(state, np.array([4, 5, 6]), scorer.num_tokens, window)
        answers.append(found)
        assert found.attention.shape == (3, 23)
        np.testing.assert_allclose(found.attention.sum(1), 1, atol=1e-5)
        assert (found.attention[0, 6:] == 0).all()
        everything = scorer.step(state, np.array([4, 5, 6]), scorer.num_tokens)
        assert np.abs(everything.log_probs - found.log_probs).max() > 1e-3
    np.testing.assert_array_equal(answers[0].ids, answers[1].ids)
    np.testing.assert_allclose(answers[0].log_probs, answers[1].log_probs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(answers[0].attention, answers[1].attention, rtol=0, atol=1e-5)


def test_memory_grows_as_frames_arrive_and_can_be_seen_as_it_was(
    scorers: tuple[TorchScorer, OnnxScorer], sound: Floats
):
    for scorer in scorers:
        _, memory = scorer.encode([sound[:20000], sound])
        ys = memory.ys[1] if isinstance(scorer, OnnxScorer) else memory.y[1].numpy()
        grown = None
        for part in (ys[:0], ys[:7], ys[7:8], ys[8:20]):
            grown = scorer.grow(grown, part)
            if grown is not None and len(part) == 1:  # evaluated on the way
                scorer.step(scorer.start(grown, np.array([0])), np.array([1]), 3)
        seen, tokens = scorer.view(memory, 1, 20), np.array([[1, 5, 6]])
        expected, found = (scorer.step(scorer.start(m, np.array([0])), tokens, 5) for m in (seen, grown))
        np.testing.assert_array_equal(expected.ids, found.ids)
        np.testing.assert_allclose(expected.log_probs, found.log_probs, rtol=0, atol=1e-5)
        whole = scorer.step(scorer.start(memory, np.array([1])), tokens, 5)
        assert np.abs(whole.log_probs - found.log_probs).max() > 1e-4


def test_hypotheses_of_several_utterances_share_what_they_hear(
    scorers: tuple[TorchScorer, OnnxScorer], sound: Floats
):
    """In any order and number: each gives the same as alone, and states stay separate."""
    _, scorer = scorers
    _, memory = scorer.encode([sound, sound[:20000], sound[:60], sound[30000:60000]])
    for owners in ([0, 0, 0], [0, 0, 3, 3], [3, 0, 1], [1, 0, 0, 3, 1, 0], [2, 0, 2, 1], [3, 3, 1]):
        state = scorer.start(memory, np.array(owners))
        alone = [scorer.start(memory, np.array([n])) for n in owners]
        for step in range(3):
            tokens = np.array(
                [scorer.sos_eos if step == 0 else 4 + (b + step) % 5 for b in range(len(owners))]
            )
            said = scorer.step(state, tokens, 7)
            for b, token in enumerate(tokens):
                one = scorer.step(alone[b], np.array([token]), 7)
                np.testing.assert_allclose(said.log_probs[b], one.log_probs[0], rtol=0, atol=1e-4)
                frames = one.attention.shape[1]
                np.testing.assert_allclose(said.attention[b, :frames], one.attention[0], rtol=0, atol=1e-4)
                alone[b] = one.state
            order = np.roll(np.arange(len(owners)), 1) if step else np.arange(len(owners))
            state = scorer.select(said.state, order)
            owners, alone = [owners[b] for b in order], [alone[b] for b in order]


def test_what_one_utterance_hears_is_not_copied(scorers: tuple[TorchScorer, OnnxScorer], sound: Floats):
    _, scorer = scorers
    _, memory = scorer.encode([sound])
    state = scorer.start(memory, np.zeros(5, np.int64))
    heard = scorer.step(state, np.full(5, scorer.sos_eos), 1).state.cross
    assert all(np.shares_memory(heard[name], x) for name, x in memory.cross(0).items())


@pytest.mark.parametrize("count", [1, 5])
def test_drafts_are_checked_as_steps_are(scorers: tuple[TorchScorer, OnnxScorer], speech, count: int):
    """In torch and in ONNX: several tokens at once, a truncated state, and the greedy search."""
    samples = [*speech, speech[0][:30000], speech[1][:8000]][:count]
    config = SearchConfig(beam=1, ctc_weight=0.0)
    for scorer in scorers:
        log_probs, memory = scorer.encode(samples)
        tokens = np.random.default_rng(1).integers(3, scorer.num_tokens, (count, 6))
        tokens[:, 0] = scorer.sos_eos
        state = scorer.start(memory, np.arange(count))
        said = scorer.steps(state, tokens, 4)
        for u in range(6):
            one = scorer.step(state, tokens[:, u], 4)
            np.testing.assert_allclose(said.log_probs[:, u], one.log_probs, rtol=0, atol=1e-4)
            again = scorer.step(scorer.rewind(said.state, u), tokens[:, u], 4)
            np.testing.assert_allclose(again.log_probs, one.log_probs, rtol=0, atol=1e-4)
            state = one.state
        expected = search(scorer, log_probs, memory, config)
        for a, b in zip(expected, greedy(scorer, log_probs, memory, config), strict=True):
            assert [x.tokens for x in a] == [x.tokens for x in b]
            np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=0, atol=1e-3)
        assert any(x[0].tokens for x in expected)
