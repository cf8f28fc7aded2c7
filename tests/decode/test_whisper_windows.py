"""A recording of any length is transcribed by Whisper's windows, and their results are checked."""

import itertools

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Step
from asr.decode.whisper import SOS_EOS, Specials, WhisperOptions
from asr.decode.whisper_search import Draw, search_window
from asr.decode.whisper_windows import TEMPERATURES, Recording

WINDOW = 10
NAMES = ["startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
TIMES = [f"{i * 0.02:.2f}" for i in range(WINDOW + 1)]
MARKS = [f"<|{x}|>" for x in (*NAMES, "notimestamps", *TIMES)]
LETTERS = list("abcdefgh")
SYMBOLS = ["<blk>", "<sos/eos>", "<unk>", *(f"▁{x}" for x in LETTERS), *MARKS]
SPECIALS = Specials.of(SYMBOLS)
V = len(SYMBOLS)
A, TIME = 3, SPECIALS.timestamps


class Told:
    """A Whisper that knows the text: a frame is one sample, whose value is the unit spoken in it, 0 for none.
    A word is a run of the same unit."""

    symbols, num_tokens, sos_eos, frame_s = SYMBOLS, V, SOS_EOS, 0.02
    decoder_type, has_ctc, max_tokens, max_samples, prompt = "whisper", False, 40, WINDOW, ()
    no_speech = 1e-6

    def __init__(self):
        self.windows, self.shown, self.languages = [], [], 0

    def encode(self, samples, context=None):
        self.windows += [x.tolist() for x in samples]
        return [np.zeros((WINDOW, 0), np.float32) for _ in samples], [x.tolist() for x in samples]

    def start(self, memory, owner):
        return [(tuple(memory[n]), ()) for n in owner]

    def select(self, state, index):
        return [state[b] for b in index]

    def answer(self, window):
        """Each word between its times; one that may continue after the window has no end."""
        tokens, changes = [], [0, *(np.flatnonzero(np.diff(window)) + 1).tolist(), len(window)]
        for first, end in itertools.pairwise(changes):
            if window[first] == 0:
                continue
            tokens += [TIME + first, int(window[first])]
            if end < WINDOW or first == 0:
                tokens.append(TIME + end)
        return tokens

    def following(self, window, tokens):
        """After the tokens: the next one of the answer, with near certainty."""
        table = np.full(V, -40.0)
        table[SOS_EOS] = -80.0
        start = len(tokens) - 1 - tokens[::-1].index(SOS_EOS)
        behind = list(tokens[start + 1 :])
        if not behind:
            self.languages += 1
            table[SPECIALS.languages["de"]] = 0
            table[SPECIALS.no_speech] = np.log(self.no_speech)
            return table
        answer = [*self.answer(window), SOS_EOS]
        written = behind[2:]
        table[answer[len(written)] if len(written) < len(answer) else SOS_EOS] = 0
        return table

    def step(self, state, tokens, k, window=None):
        rows = tokens.reshape(len(tokens), -1).tolist()
        grown = [(heard, (*past, *row)) for (heard, past), row in zip(state, rows, strict=True)]
        self.shown += [past for _, past in grown]
        table = np.stack([self.following(heard, past) for heard, past in grown]).astype(np.float32)
        ids = np.argsort(-table, 1)[:, :k]
        return Step(ids, np.take_along_axis(table, ids, 1), np.zeros((len(ids), 0), np.float32), grown)

    def listen(self, memory, utterance, tokens):
        """Two heads that attend to the frames of the next token, and after the last one to later frames."""
        window = np.array(memory[utterance])
        found = np.full((2, len(tokens), WINDOW), 0.01, np.float32)
        end = 0
        for u, token in enumerate([*tokens[1:], None]):
            places = np.flatnonzero(window == token) if token in range(A, A + len(LETTERS)) else []
            if len(places):
                found[:, u, places] = 1
                end = int(places[-1]) + 1
            elif token is None:
                found[:, u, end:] = 1
        return found


def spoken(*words):
    """(unit, first, end) of each word -> samples."""
    samples = np.zeros(max(end for _, _, end in words), np.float32)
    for unit, first, end in words:
        samples[first:end] = unit
    return samples


WORDS = [(A, 1, 4), (A + 1, 5, 7), (A + 2, 8, 13), (A + 3, 14, 17), (A + 4, 26, 29), (A + 5, 30, 33)]


def test_every_word_is_heard_once_and_whole_and_in_its_place():
    told = Told()
    ((found,),) = decode(told, "whisper", [spoken(*WORDS)], SearchConfig(beam=2))
    assert found.tokens == tuple(unit for unit, _, _ in WORDS)
    # of a single text in a window the first time does not count
    assert np.abs(np.array(found.frames) - [first for _, first, _ in WORDS]).max() <= 1
    # the third word does not fit into the first window, so the next one starts after the second word
    assert len(told.windows[0]) == WINDOW
    assert told.windows[1] == spoken(*WORDS)[7:17].tolist()
    assert np.abs(np.array(found.ends) - [end for _, _, end in WORDS]).max() <= 2
    assert (np.array(found.ends) > found.frames).all()
    assert len(found.confidence) == len(WORDS)


def test_the_language_of_the_first_window_is_that_of_the_recording():
    told = Told()
    decode(told, "whisper", [spoken(*WORDS)], SearchConfig(beam=1))
    asked = [x for x in told.shown if x[-1] == SOS_EOS]
    assert len(told.windows) > 2
    # the first window is asked for it, and every window is begun once
    assert len(asked) == len(told.windows) + 1
    shown = [x for x in told.shown if SPECIALS.languages["de"] in x]
    assert shown
    assert not any(SPECIALS.languages["en"] in x for x in told.shown)


def test_what_was_said_is_shown_to_the_next_window():
    told = Told()
    decode(told, "whisper", [spoken(*WORDS)], SearchConfig(beam=1))
    prompts = {x[: x.index(SOS_EOS)] for x in told.shown}
    assert () in prompts
    first = (SPECIALS.start_previous, TIME + 1, A, TIME + 4, TIME + 5, A + 1, TIME + 7)
    assert first in prompts
    # the end of it, in half of the room
    assert max(map(len, prompts)) <= told.max_tokens // 2


@pytest.mark.parametrize(("no_speech", "expected"), [(0.1, 1.0), (0.9, None)])
def test_improbable_answers_are_drawn_again_or_are_silence(no_speech, expected):
    told = Told()
    told.no_speech = no_speech
    recording, drawn = Recording(told, SearchConfig(beam=2)), []
    answer = recording._answer

    def remember(memory):
        drawn.append(answer(memory))
        return drawn[-1]

    recording._answer = remember
    told.following = lambda window, tokens, known=told.following: flattened(known(window, tokens))
    found, used = recording.hear(spoken(*WORDS)[:WINDOW])
    if expected is None:
        assert (found, used) == ([], WINDOW)
        assert drawn[0].temperature == 0
    else:
        assert drawn[0].temperature == TEMPERATURES[-1]
        assert recording._options.prompt == ()  # nothing to build on


def flattened(table):
    """A uniform distribution, as if it knew nothing of the text."""
    if table.argmax() in SPECIALS.languages.values():
        return table
    return np.where(np.arange(V) > 2, -np.log(V), table)


def test_an_answer_that_repeats_itself_is_drawn_again():
    told = Told()
    told.max_tokens = 200
    told.following = lambda window, tokens: endless(window, tokens, Told().following)
    recording = Recording(told, SearchConfig(beam=2))
    recording.hear(spoken(*WORDS)[:WINDOW])
    draws = [x for x in told.shown if x.count(A) > 50]
    assert len(draws) > 2 * (1 + len(TEMPERATURES))


def endless(window, tokens, known):
    table = known(window, tokens)
    if tokens[-1] >= A and SPECIALS.transcribe in tokens:
        behind = tokens[list(tokens).index(SPECIALS.transcribe) + 1 :]
        table = np.full(V, -40.0)
        table[A if behind else TIME] = 0.0
    return table


def test_what_is_drawn_follows_the_probabilities():
    """Sampling at a low temperature gives the result of a search with a beam of one."""
    given = WhisperOptions(language="de", beam=1, max_first_time=5)
    window = spoken(*WORDS)[:WINDOW].tolist()
    searched = search_window(Told(), [window], 0, SPECIALS, given, 40)
    cold = Draw(1e-3, np.random.default_rng(0))
    drawn = search_window(Told(), [window], 0, SPECIALS, given, 40, cold)
    assert drawn.tokens == searched.tokens
    assert drawn.temperature == pytest.approx(1e-3)


def test_what_fits_into_a_window_is_asked_about_once():
    told = Told()
    answers = decode(
        told, "whisper", [spoken(*WORDS[:2]), np.zeros(0)], SearchConfig(beam=2, timestamps=True)
    )
    ((found,), (nothing,)) = answers
    assert found.tokens == (TIME + 1, A, TIME + 4, TIME + 5, A + 1, TIME + 7)
    assert nothing.tokens == ()
    assert len(told.windows) == 1
    assert sorted(found.frames) == list(found.frames)
    assert found.frames[1] < found.frames[4]
