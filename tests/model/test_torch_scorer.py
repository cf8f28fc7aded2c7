"""The model as the searches see it: steps agree with scoring, alone and in any batch."""

import copy

import numpy as np
import pytest
import torch

from asr.context import WHOLE, Context
from asr.decode import trie
from asr.decode.config import SearchConfig
from asr.decode.modes import decode, modes_for
from asr.model import torch_scorer
from asr.model.torch_scorer import TorchScorer

LENGTHS = (16000, 5000, 0, 60, 11111)


@pytest.fixture
def scorer(tiny_model):
    with torch.no_grad():  # peaked enough for searches to differ, and likely to end
        tiny_model.ctc.weight.mul_(8)
        tiny_model.decoder.out.weight.mul_(4)
        tiny_model.decoder.out.bias[1] -= 3
    return TorchScorer(tiny_model, "cpu")


@pytest.fixture
def waves():
    return [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in LENGTHS]


@pytest.mark.parametrize("context", [WHOLE, Context(4, 1), Context(4, 1, 1)])
def test_a_padded_batch_changes_nothing(scorer, waves, context):
    log_probs, memory = scorer.encode(waves, context)
    assert [len(x) for x in log_probs] == [25, 8, 0, 0, 18]
    texts = [[3, 4], [5], [], [2, 2, 2], [9]]
    scores = scorer.score(memory, np.arange(5), texts)
    for n, wave in enumerate(waves):
        (alone,), memory = scorer.encode([wave], context)
        np.testing.assert_allclose(alone, log_probs[n], atol=1e-5)
        np.testing.assert_allclose(np.exp(alone).sum(1), 1, atol=1e-5)
        (score,) = scorer.score(memory, np.array([0]), texts[n : n + 1])
        assert score.shape == (len(texts[n]) + 1,)
        np.testing.assert_allclose(score, scores[n], atol=1e-5)


def test_steps_equal_scoring(scorer, waves):
    """Hypotheses repeated, dropped and reordered on the way keep their own tokens and utterance."""
    _, memory = scorer.encode(waves)
    state, last = scorer.start(memory, np.array([0, 1, 4])), np.array([1, 1, 1])
    texts, values = [[], [], []], [[], [], []]
    for index, tokens in (([0, 0, 2], [3, 4, 5]), ([2, 1, 1], [6, 7, 3]), ([0, 1, 2], [2, 2, 8])):
        ids, log_probs, _, state = scorer.step(state, last, scorer.num_tokens)
        assert (np.diff(log_probs, axis=1) <= 0).all()
        state, last = scorer.select(state, np.array(index)), np.array(tokens)
        values = [
            [*values[b], log_probs[b][ids[b] == token].item()] for b, token in zip(index, tokens, strict=True)
        ]
        texts = [[*texts[b], token] for b, token in zip(index, tokens, strict=True)]
    assert state.owner.tolist() == [4, 0, 0]
    for expected, found in zip(scorer.score(memory, state.owner, texts), values, strict=True):
        np.testing.assert_allclose(found, expected[:-1], atol=1e-5)


def test_from_right_to_left_equals_the_mirror_from_left_to_right(scorer, waves):
    """With shared weights; the scores come back in the order of the tokens, eos last."""
    scorer.model.reverse_decoder = copy.deepcopy(scorer.model.decoder)
    _, memory = scorer.encode(waves)
    owner, texts = np.array([0, 1, 1, 4]), [[3, 4, 5], [], [7], [2, 8, 8, 3, 9]]
    mirrored = scorer.score(memory, owner, texts, reverse=True)
    forwards = scorer.score(memory, owner, [x[::-1] for x in texts])
    for a, b in zip(mirrored, forwards, strict=True):
        np.testing.assert_allclose(a, [*b[:-1][::-1], b[-1]], atol=1e-6)


def test_only_the_best_k_are_returned(scorer, waves):
    _, memory = scorer.encode(waves)
    start = scorer.start(memory, np.array([0, 4]))
    all_ids, all_values, _, _ = scorer.step(start, np.array([1, 1]), scorer.num_tokens)
    ids, values, _, _ = scorer.step(start, np.array([1, 1]), 3)
    np.testing.assert_array_equal(ids, all_ids[:, :3])
    np.testing.assert_array_equal(values, all_values[:, :3])


def test_scoring_in_parts_equals_at_once(scorer, waves, monkeypatch):
    _, memory = scorer.encode(waves)
    owner = np.array([0, 0, 1, 4, 1, 0, 0])
    texts = [[3, 4, 6], [3, 4, 5], [], [6] * 7, [7, 8], [3, 4, 5, 5], [3]]
    at_once = scorer.score(memory, owner, texts)
    alone = [scorer.score(memory, owner[[b]], [texts[b]])[0] for b in range(len(texts))]
    monkeypatch.setattr(torch_scorer, "ROWS", 2)
    monkeypatch.setattr(trie, "MOST", 6)
    for scores in (alone, scorer.score(memory, owner, texts)):
        for a, b in zip(at_once, scores, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_every_mode_runs_and_does_not_depend_on_the_batch(scorer, waves, mode):
    config = SearchConfig(beam=4, nbest=2)
    together = decode(scorer, mode, waves, config)
    assert len(together[0][0].tokens) > 0
    for wave, nbest in zip(waves, together, strict=True):
        alone = decode(scorer, mode, [wave], config)[0]
        assert [x.tokens for x in alone] == [x.tokens for x in nbest]
        np.testing.assert_allclose([x.score for x in alone], [x.score for x in nbest], atol=1e-4)


def test_the_model_keeps_its_mode_and_trains_on(scorer, waves):
    scorer.model.train()
    dropped = [decode(scorer, "joint", waves[:1], SearchConfig(beam=2)) for _ in range(2)]
    assert dropped[0] == dropped[1]  # no dropout while decoding
    assert scorer.model.training
    x, x_lens = scorer.model.features(torch.randn(1, 8000), torch.tensor([8000]))
    loss = scorer.model(x, x_lens, torch.tensor([[2, 3]]), torch.tensor([2]))
    loss.total.backward()
    assert all(p.grad is not None for p in scorer.model.parameters())
    scorer.model.eval()
    scorer.encode(waves)
    assert not scorer.model.training


def test_frames_are_as_long_as_the_encoder_says(scorer):
    assert scorer.frame_s == pytest.approx(0.04)
    assert scorer.num_tokens == 11
