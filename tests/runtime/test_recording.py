"""Long recordings, on the tiny model, with a loudness detector in place of silero-vad."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asr.context import Context
from asr.decode.config import SearchConfig
from asr.decode.modes import decode, modes_for
from asr.decode.scorer import Floats, Hypothesis
from asr.errors import AudioError, ConfigError
from asr.runtime import Bundle, Event, recording
from asr.runtime.cutter import CutConfig
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.recording import Batch, Recording, RecordingConfig
from export.verify import made_sound


@pytest.fixture(autouse=True)
def voice(loud_voice: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "VoiceActivity", loud_voice)


def start(bundle: Bundle, **options: object) -> Recording:
    return Recording(bundle, RecordingConfig(**options))  # type: ignore[arg-type]


def blocks(samples: Floats, size: int = 16000) -> Iterator[Floats]:
    return (samples[i : i + size] for i in range(0, len(samples), size))


def events(batches: Sequence[Batch] | Iterator[Batch]) -> list[Event]:
    return [event for batch in batches for event in batch.events]


@pytest.fixture(scope="module")
def utterances() -> list[Floats]:
    whole = made_sound(24.0, 16000)
    return [whole[n * 60000 : n * 60000 + size] + 0.02 for n, size in enumerate((64000, 90000, 30000, 48000))]


@pytest.fixture(scope="module")
def joined(utterances: list[Floats]) -> Floats:
    """The utterances, each followed by three seconds of silence."""
    return np.concatenate([part for x in utterances for part in (x, np.zeros(48000, np.float32))])


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_every_mode_says_of_a_piece_what_it_says_of_an_utterance(float32: Bundle, joined: Floats, mode: str):
    found = events(start(float32, mode=mode, search=SearchConfig(beam=3)).batches(blocks(joined)))
    scorer, expected = OnnxScorer(float32), []
    for piece in start(float32)._pieces(blocks(joined)):
        (alone,) = decode(scorer, mode, [piece.samples], SearchConfig(beam=3))[0]
        words = float32.tokenizer.words(alone.tokens)
        starts = [piece.start / 16000 + 0.04 * alone.frames[first] for _, first, _ in words]
        expected.append((float32.tokenizer.decode(alone.tokens), starts))
    told = [(event.text, [word.start_s for word in event.words]) for event in found]
    assert [text for text, _ in told] == [text for text, _ in expected if text]
    assert len(told) > 2
    for (_, a), (_, b) in zip(told, [x for x in expected if x[0]], strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_attention_may_be_limited_to_chunks(float32: Bundle, joined: Floats):
    texts = {
        context: [x.text for x in events(start(float32, context=context).batches(blocks(joined)))]
        for context in (Context(), Context(4, 1))
    }
    assert texts[Context()] != texts[Context(4, 1)]


@pytest.mark.parametrize("size", [160, 7777, 10**9])
def test_how_samples_arrive_changes_nothing(float32: Bundle, joined: Floats, size: int):
    expected = list(start(float32).batches(blocks(joined)))
    assert list(start(float32).batches(blocks(joined, size))) == expected


def test_batches_that_are_known_are_not_decoded_again(
    float32: Bundle, joined: Floats, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recording, "BATCH_S", 3.0)
    expected = list(start(float32, mode="rescore").batches(blocks(joined)))
    assert len(expected) == 3
    calls = []
    monkeypatch.setattr(recording, "decode", lambda *a, **k: calls.append(1) or decode(*a, **k))
    assert list(start(float32, mode="rescore").batches(blocks(joined), 2)) == expected[2:]
    assert len(calls) == 1
    assert [batch.end_s for batch in expected] == sorted(batch.end_s for batch in expected)
    assert list(start(float32).batches(blocks(joined), 3)) == []


def test_pieces_are_decoded_together_and_batches_are_bounded(
    float32: Bundle, joined: Floats, monkeypatch: pytest.MonkeyPatch
):
    sizes = []

    def counted(scorer: OnnxScorer, mode: str, samples: Sequence[Floats], *rest: object) -> object:
        sizes.append(sum(map(len, samples)))
        return decode(scorer, mode, samples, *rest)

    monkeypatch.setattr(recording, "decode", counted)
    made = start(float32)
    list(made.batches(block for _ in range(8) for block in blocks(joined)))
    assert len(sizes) == 3
    assert max(sizes) < (recording.BATCH_S + 20) * 16000
    assert made.duration_s == 8 * len(joined) / 16000


WORD_S = 0.37


class Oracle:
    """Replaces `decode`: finds a word in every WORD_S of a recording that is whole in the piece, with its
    frame; where the piece cuts it, another word."""

    def __init__(self, joined: Floats) -> None:
        self.joined = joined

    def __call__(
        self, scorer: OnnxScorer, mode: str, samples: Sequence[Floats], *_: object
    ) -> list[list[Hypothesis]]:
        return [[self.hear(x)] for x in samples]

    def hear(self, samples: Floats) -> Hypothesis:
        starts = np.flatnonzero(self.joined == samples[0])
        start = next(i for i in starts if np.array_equal(self.joined[i : i + len(samples)], samples))
        first_s, last_s = start / 16000, (start + len(samples)) / 16000
        tokens, frames = [], []
        for number in range(int(first_s / WORD_S), int(last_s / WORD_S) + 1):
            begin, end = max(number * WORD_S, first_s), min((number + 1) * WORD_S, last_s)
            if end - begin < 0.08 or not np.abs(self.joined[round(begin * 16000) : round(end * 16000)]).any():
                continue
            is_whole = end - begin > 0.8 * WORD_S
            middle = int((((number + 0.5) * WORD_S if is_whole else begin) - first_s) / 0.04)
            tokens += [3, 4 + number % 14 if is_whole else 19]
            frames += [middle, middle]
        return Hypothesis(tuple(tokens), 0.0, frames=tuple(frames), confidence=(0.5,) * len(tokens))


@pytest.mark.parametrize("max_s", [5.0, 7.3, 20.0])
def test_words_at_a_cut_in_speech_are_told_once_and_whole(
    float32: Bundle, max_s: float, monkeypatch: pytest.MonkeyPatch
):
    sound = np.random.default_rng(0).normal(0, 0.1, 16000 * 60).astype(np.float32)
    monkeypatch.setattr(recording, "decode", Oracle(sound))
    found = events(start(float32, cut=CutConfig(max_s=max_s)).batches(blocks(sound)))
    assert len(found) >= 60 / max_s
    words = [word for event in found for word in event.words]
    numbers = [round((word.start_s + word.end_s) / 2 / WORD_S - 0.5) for word in words]
    assert numbers[:-1] == list(range(len(numbers) - 1))
    assert len(numbers) >= 162
    names = "abcdefghijklmnop"
    assert [word.word for word in words[:-1]] == [names[n % 14] for n in numbers[:-1]]
    assert " ".join(event.text for event in found).split() == [word.word for word in words]


def test_silence_and_nothing_have_no_events(float32: Bundle):
    for samples in (np.zeros(160000, np.float32), np.zeros(0, np.float32)):
        assert list(start(float32).batches(blocks(samples))) == []


def test_what_cannot_be_is_refused(float32: Bundle, joined: Floats):
    with pytest.raises(ConfigError, match="no such mode"):
        RecordingConfig(mode="magic")
    with pytest.raises(ConfigError, match="mode segmental"):
        start(float32, mode="segmental")
    bad = joined.copy()
    bad[20000] = np.nan
    with pytest.raises(AudioError, match="the first is sample 20,000 of the stream"):
        list(start(float32).batches(blocks(bad)))


def test_a_model_with_a_limit_hears_pieces_within_it(
    whole_bundle: Path, joined: Floats, monkeypatch: pytest.MonkeyPatch
):
    bundle = Bundle.load(whole_bundle)
    features = replace(bundle.info.features, max_samples=6 * 16000)
    bundle = replace(bundle, info=replace(bundle.info, features=features))
    lengths = []
    monkeypatch.setattr(
        recording, "decode", lambda s, m, x, *_: lengths.extend(map(len, x)) or decode(s, m, x, *_)
    )
    long = np.random.default_rng(0).normal(0, 0.1, 16000 * 30).astype(np.float32)
    assert events(start(bundle, search=SearchConfig(beam=2, max_tokens=5)).batches(blocks(long)))
    assert len(lengths) > 5
    assert max(lengths) <= 6 * 16000
