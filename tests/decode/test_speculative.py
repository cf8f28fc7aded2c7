"""The greedy search that verifies drafts gives the same result as the one token by token, in fewer
calls.
"""

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.joint import search
from asr.decode.modes import decode
from asr.decode.prompt import with_prompt
from asr.decode.speculative import Draft, greedy

GREEDY = SearchConfig(beam=1, ctc_weight=0.0)
SOS_EOS = 1


def peaked(tokens, num_tokens: int) -> np.ndarray:
    """CTC log-probabilities (T, V) whose best path is `tokens`, each once and followed by a blank."""
    path = [unit for token in tokens for unit in (token, 0)] or [0]
    table = np.full((len(path), num_tokens), -9.0, np.float32)
    table[range(len(path)), path] = 0.0
    return table - np.logaddexp.reduce(table, 1, keepdims=True)


def says(text, num_tokens: int):
    """A decoder that is nearly certain of a text, whatever tokens it is given."""

    def log_probs(tokens) -> np.ndarray:
        following = text[len(tokens)] if len(tokens) < len(text) else SOS_EOS
        table = np.random.default_rng(len(tokens)).normal(0, 1, num_tokens)
        table[following] += 9
        return (table - np.logaddexp.reduce(table)).astype(np.float32)

    return log_probs


def both(toy_model, log_probs, memory, config):
    """Results and number of decoder calls: token by token, and with drafts."""
    found = []
    for write in (search, greedy):
        scorer = toy_model()
        found.append((write(scorer, log_probs, memory, with_prompt(scorer, config)), scorer.num_steps))
    return found


def check_same(expected, found):
    for a, b in zip(expected, found, strict=True):
        assert [(x.tokens, x.frames, x.guard) for x in a] == [(x.tokens, x.frames, x.guard) for x in b]
        np.testing.assert_allclose([x.score for x in a], [x.score for x in b], rtol=1e-6)
        for x, y in zip(a, b, strict=True):
            assert x.parts == pytest.approx(y.parts)
            np.testing.assert_allclose(x.confidence, y.confidence, rtol=1e-5)


CONFIGS = {
    "plain": GREEDY,
    "prompt": SearchConfig(beam=1, ctc_weight=0.0, prompt=(3, 2)),
    "smoothed": SearchConfig(beam=1, ctc_weight=0.0, temperature=1.5, eos_scale=0.4),
    "short": SearchConfig(beam=1, ctc_weight=0.0, length_factor=0.5, length_margin=0),
    "no repeats": SearchConfig(beam=1, ctc_weight=0.0, max_repeats=1, max_phrase=2),
    "few tokens": SearchConfig(beam=1, ctc_weight=0.0, max_tokens=3),
    "nbest": SearchConfig(beam=1, ctc_weight=0.0, nbest=3, tokens_per_frame=4),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_decoder_and_any_draft(toy, config):
    """Random ones agree only by chance; one batch has utterances of all lengths, also without frames."""
    lens = [(3 * n) % 41 for n in range(30)]
    scorer = toy(6)
    log_probs = [scorer.log_probs(n, num_frames) for n, num_frames in enumerate(lens)]
    (expected, _), (found, _) = both(lambda: toy(6), log_probs, list(range(30)), config)
    check_same(expected, found)
    assert len({x[0].guard for x in found}) > 1 or config in (CONFIGS["smoothed"], CONFIGS["few tokens"])


TEXT = (3, 4, 4, 5, 2, 6, 3, 7, 8, 2, 5, 9, 4, 6, 7, 3, 8, 2, 9, 5)
DRAFTS = {
    "right": (TEXT, 1),
    "empty": ((), 21),
    "one other": ((*TEXT[:7], 9, *TEXT[8:]), 2),
    "one missing": ((*TEXT[:7], *TEXT[8:]), 4),
    "one more": ((*TEXT[:7], 2, *TEXT[7:]), 2),
    "two others": ((*TEXT[:7], 9, *TEXT[8:12], 3, *TEXT[13:]), 3),
    "the first half": (TEXT[:10], 11),
    "the last half": (TEXT[10:], 17),
    "too long": ((*TEXT, 3, 4), 1),
}


@pytest.mark.parametrize(("draft", "calls"), DRAFTS.values(), ids=DRAFTS)
@pytest.mark.parametrize("prompt", [(), (5, 6)])
def test_calls_that_a_draft_saves(toy, draft, calls, prompt):
    config = SearchConfig(beam=1, ctc_weight=0.0, length_margin=40, extra_tokens=40, prompt=prompt)
    text = (*prompt, *TEXT)
    log_probs = [peaked(draft, 10)]
    (expected, slow), (found, fast) = both(lambda: toy(10, says(text, 10)), log_probs, [0], config)
    check_same(expected, found)
    assert found[0][0].tokens == TEXT
    assert slow == len(TEXT) + 1 + bool(prompt)
    assert fast <= calls


def test_mode_attention_uses_it_with_a_beam_of_one(toy):
    waves = [np.array((n, 25), np.float32) for n in range(6)]
    text = TEXT[:8]
    for beam, most in ((1, 9), (2, 12)):
        scorer = toy(10, says(text, 10))
        config = SearchConfig(beam=beam, length_margin=20)
        assert {x[0].tokens for x in decode(scorer, "attention", waves, config)} == {text}
        assert scorer.num_steps <= most
    scorer = toy(10, says(text, 10))
    scorer.log_probs = lambda seed, num_frames: peaked(text, 10)
    decode(scorer, "attention", waves, GREEDY)
    assert scorer.num_steps == 1


def test_a_draft_is_aligned_by_the_fewest_edits():
    """The rest of the draft, where the written tokens follow it and where they do not."""
    draft = Draft((2, 3, 4, 5, 6))
    assert draft.rest() == [2, 3, 4, 5, 6]
    rests = {2: [3, 4, 5, 6], 9: [4, 5, 6], 3: [4, 5, 6], 5: [6], 6: []}
    for token, rest in rests.items():
        draft.write(token)
        assert draft.rest() == rest
    draft.write(7)
    assert draft.rest() == []
