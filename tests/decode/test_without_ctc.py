"""Models without CTC, and the prompt that every text of theirs begins with."""

import itertools

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.modes import WITHOUT_CTC, check_mode, decode, mode_of, modes_for, start_search
from asr.decode.prompt import with_prompt
from asr.decode.scorer import Step
from asr.errors import ConfigError

WAVE = np.array((3, 5), np.float32)


@pytest.fixture
def alone(toy):
    """A toy without a CTC head, whose attention advances by one frame per token."""

    class Alone(toy):
        has_ctc = False

        def encode(self, samples, context=None):
            found, memory = super().encode(samples)
            return [x[:, :0] for x in found], memory

        def step(self, state, tokens, k, window=None):
            step = super().step(state, tokens, k, window)
            listening = np.zeros((len(step.ids), 5), np.float32)
            for row, (_, past) in zip(listening, step.state, strict=True):
                row[min(len(past) - 1, 4)] = 1
            return Step(step.ids, step.log_probs, listening, step.state)

    return Alone


def every_text(scorer, units, longest, prompt=()):
    """Texts with their log-probabilities by the decoder, best first."""
    texts = [t for n in range(longest + 1) for t in itertools.product(units, repeat=n)]
    scores = scorer.score([int(WAVE[0])], np.zeros(len(texts), int), texts, prompt)
    return sorted(
        ((float(s.sum(dtype=np.float64)), t) for s, t in zip(scores, texts, strict=True)), reverse=True
    )


@pytest.mark.parametrize("prompt", [(), (3,), (2, 4, 4)])
@pytest.mark.parametrize("mode", WITHOUT_CTC)
def test_the_best_texts_are_found_and_the_prompt_is_no_part_of_them(alone, mode, prompt):
    scorer = alone(5)
    count = 4 if mode == "attention" else 2  # the other mode also gives texts that have not ended
    config = SearchConfig(beam=400, nbest=count, prompt=prompt, max_repeats=9)
    expected = every_text(scorer, range(2, 5), 5, prompt)[:count]
    found = decode(scorer, mode, [WAVE], config)[0]
    assert [x.tokens for x in found] == [t for _, t in expected]
    np.testing.assert_allclose([x.score for x in found], [s for s, _ in expected], rtol=0, atol=1e-5)
    for x in found:
        assert list(x.parts) == ["attention"]
        where = [min(len(prompt) + i, 4) for i in range(len(x.tokens))]  # where the toy attends
        assert list(x.frames) == where
        assert all(0 < p <= 1 for p in x.confidence)


@pytest.mark.parametrize("mode", ["joint", "rescore", "attention"])
def test_a_prompt_conditions_what_is_scored_with_ctc_too(toy, mode):
    scorer, config = toy(5), SearchConfig(beam=200, nbest=3, prompt=(4, 2))
    found = decode(scorer, mode, [WAVE], config)[0]
    for x in found:
        (expected,) = scorer.score([int(WAVE[0])], np.zeros(1, int), [x.tokens], (4, 2))
        assert x.parts["attention"] == pytest.approx(float(expected.sum()), abs=1e-5)
    other = decode(scorer, mode, [WAVE], SearchConfig(beam=200, nbest=3))[0]
    assert [x.parts["attention"] for x in other] != [x.parts["attention"] for x in found]


def test_the_prompt_of_the_model_is_taken_unless_another_is_given(alone):
    scorer = alone(5)
    scorer.symbols, scorer.prompt = ["<blk>", "<sos/eos>", "<unk>", "<en>", "<de>"], ("<de>", "<en>")
    assert with_prompt(scorer, SearchConfig()).prompt == (4, 3)
    assert with_prompt(scorer, SearchConfig(prompt=())).prompt == ()
    assert with_prompt(scorer, SearchConfig(prompt=("<en>", 2))).prompt == (3, 2)
    found, said = (decode(scorer, "attention", [WAVE], SearchConfig(prompt=p))[0] for p in (None, (4, 3)))
    assert found == said
    for unit in ("<fr>", 5, -1):
        with pytest.raises(ConfigError, match=f"prompt: no unit {unit} among the 5 of the model"):
            with_prompt(scorer, SearchConfig(prompt=(unit,)))


def test_a_decoder_of_so_many_tokens_is_given_no_more(alone):
    scorer = alone(5)
    scorer.max_tokens = 4
    assert with_prompt(scorer, SearchConfig(prompt=(3,))).max_tokens == 2
    assert with_prompt(scorer, SearchConfig(prompt=(3,), max_tokens=1)).max_tokens == 1
    for mode in WITHOUT_CTC:
        found = decode(scorer, mode, [WAVE], SearchConfig(beam=50, nbest=9, prompt=(3,)))[0]
        assert max(len(x.tokens) for x in found) <= 2
    with pytest.raises(ConfigError, match="prompt: 3 units, and the decoder takes 4 tokens in all"):
        with_prompt(scorer, SearchConfig(prompt=(3, 3, 3)))


def writes(*tokens):
    """A decoder that repeats `tokens` forever; the end gets a little less likely each time."""

    def follow(past):
        table = np.full(6, -30.0, np.float32)
        table[tokens[len(past) % len(tokens)]] = -1e-3
        table[1] = -9 - 0.1 * len(past)
        return table

    return follow


@pytest.mark.parametrize(
    ("loop", "guard", "num_tokens"), [((2,), "repetition", 5), ((2, 3, 4, 5), "length", 12)]
)
def test_a_decoder_that_runs_away_is_stopped(alone, loop, guard, num_tokens):
    config = SearchConfig(beam=1, max_tokens=12)
    scorer = alone(6, writes(*loop))
    (found,) = decode(scorer, "attention", [np.array((1, 50), np.float32)], config)[0]
    assert (found.guard, len(found.tokens)) == (guard, num_tokens + (guard == "length"))


def test_what_is_cut_gives_way_to_what_ends(alone):
    scorer = alone(6, writes(2))
    (found,) = decode(scorer, "attention", [np.array((1, 50), np.float32)], SearchConfig(beam=3))[0]
    assert found.guard == ""
    assert found.tokens == ()


def test_silence_of_length_nothing_has_no_text(alone):
    for mode in WITHOUT_CTC:
        assert decode(alone(5), mode, [np.array((3, 0), np.float32)], SearchConfig())[0][0].tokens == ()


def test_modes_that_need_ctc_are_refused(alone, toy):
    assert modes_for("transformer", has_ctc=False) == list(WITHOUT_CTC)
    assert (mode_of(alone(4)), mode_of(toy(4)), mode_of(toy(4), "joint")) == (
        "attention",
        "ctc-prefix",
        "joint",
    )
    for mode in set(modes_for("transformer")) - set(WITHOUT_CTC):
        with pytest.raises(
            ConfigError, match=f"mode {mode}: this model has no CTC head, .* attention, unbounded"
        ):
            check_mode(mode, "transformer", has_ctc=False)
    with pytest.raises(ConfigError, match="no such mode: nonsense; expected one of ctc-greedy"):
        mode_of(alone(4), "nonsense")


def test_a_search_that_is_fed_answers_at_the_end_alone(alone):
    scorer = alone(5)
    frames, memory = scorer.encode([WAVE])
    search = start_search("", scorer, SearchConfig())
    search.advance(memory, frames[0])
    assert search.best().tokens == ()
    assert search.finish() == decode(scorer, "attention", [WAVE], SearchConfig())[0]
