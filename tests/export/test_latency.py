from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from asr.decode.modes import modes_for
from asr.decode.scorer import Floats
from asr.errors import ManifestError
from asr.latency import Told
from asr.runtime import Bundle, EndpointConfig, Event, Stream, StreamConfig
from asr.tokens import Characters
from export import latency
from export.latency import Listener, Spoken, draw, measure, play, read_spoken, word_ends
from export.verify import Utterance, made_sound

PAUSES = EndpointConfig(trailing_s=0.12, silence_s=0.4)
"""The tiny model has no longer pauses."""


@pytest.fixture(scope="module")
def bundle(tiny_bundles: Path) -> Bundle:
    return Bundle.load(tiny_bundles / "cpu-fp32")


@pytest.fixture(scope="module")
def sound() -> Floats:
    return made_sound(5.0, 16000)[: 5 * 16000 - 333]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock on which every block takes `step_ms` to compute."""
    times = SimpleNamespace(now_s=0.0, step_ms=0.0)

    def perf_counter() -> float:
        times.now_s += times.step_ms / 1000
        return times.now_s

    monkeypatch.setattr(latency, "perf_counter", perf_counter)
    return times


def texts(told: list[Told]) -> list[str]:
    return [text.text for text in told if text.final]


# A listener in real time


@pytest.mark.parametrize(
    ("step_ms", "expected"),
    [
        (0, [20, 40, 60, 60]),
        (5, [25, 45, 65, 70]),  # only the end waits, for the last block
        (30, [50, 80, 110, 140]),  # slower than real time: each waits for all before it
    ],
)
def test_a_block_waits_for_its_sound_and_for_the_one_before(
    clock: SimpleNamespace, step_ms: float, expected: list[float]
):
    clock.step_ms = step_ms
    event = Event("a", False, 0.0, 0.0, ())
    listener = Listener()
    for available_ms in (20, 40, 60, 60):
        listener.hear(available_ms, lambda: [event])
    assert [text.read_ms for text in listener.told] == [20, 40, 60, 60]
    assert [text.elapsed_ms for text in listener.told] == pytest.approx(expected)
    assert listener.computing_ms == pytest.approx(4 * step_ms)


@pytest.mark.parametrize(("chunk_ms", "look_ahead"), [(160, 0), (640, 0), (160, 2)])
def test_nothing_is_told_before_its_sound(
    bundle: Bundle, sound: Floats, clock: SimpleNamespace, chunk_ms: int, look_ahead: int
):
    config = StreamConfig(mode="ctc-greedy", chunk_ms=chunk_ms, look_ahead=look_ahead, endpoint=PAUSES)
    late_ms = chunk_ms * look_ahead * bundle.info.stream.look_ahead_layers
    source_ms = 1000 * len(sound) / 16000
    stream, ends_ms = Stream(bundle, config), []
    for event in (*stream.accept(sound), *stream.finish()):
        ends_ms.append(1000 * event.end_s)
    told, _ = play(bundle, sound, config)
    assert len(told) == len(ends_ms) > 5
    for text, end_ms in zip(told, ends_ms, strict=True):
        assert text.elapsed_ms == text.read_ms <= source_ms
        if text.read_ms < source_ms:
            assert end_ms <= text.read_ms - late_ms
        assert end_ms <= text.read_ms + 20  # the last frame may reach beyond the end
        # a chunk is complete only with the 7.5 ms after it that its last frame covers, so in the next block
        assert text.read_ms == source_ms or text.read_ms % chunk_ms == 20


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_a_trace_has_the_words_of_the_stream(bundle: Bundle, sound: Floats, mode: str):
    config = StreamConfig(mode=mode, endpoint=PAUSES)
    stream = Stream(bundle, config)
    finals = [event.text for event in stream.accept(sound) + stream.finish() if event.final]
    words = tuple(" ".join(finals).split())
    assert len(finals) > 2, "or it does not show that texts are put together"
    ends_ms = tuple(100.0 * n for n in range(len(words)))
    found = measure(bundle, [Spoken(sound, words, ends_ms), Spoken(sound, (), ())], config)
    latency = found.latency
    assert (latency.errors.ref, latency.errors.total) == (len(words), len(words))
    assert (latency.errors.ins, latency.without_words) == (len(words), 1)
    assert latency.unaware.word.count == len(words)
    assert found.rtf > 0
    assert (found.chunk_ms, found.left_chunks) == (640, 4)
    for name in ("al", "laal", "dal"):
        assert getattr(latency.aware, name) > getattr(latency.unaware, name)
    assert latency.unaware.dal > 0


def test_a_stream_that_is_too_slow_falls_behind(bundle: Bundle, sound: Floats, clock: SimpleNamespace):
    utterances = [Spoken(sound, ("a",), (100.0,))]
    config = StreamConfig(mode="ctc-greedy", endpoint=PAUSES)
    lags = []
    for clock.step_ms in (0, 10, 40):
        found = measure(bundle, utterances, config)
        lags.append(found.latency.aware.dal - found.latency.unaware.dal)
        assert found.rtf == pytest.approx(clock.step_ms / 20, rel=0.02)
    assert lags[0] == 0
    assert lags[1] < 21  # its own block, and one more at the end
    assert lags[2] > 1000


# Where words end


class Aligner:
    """A scorer whose CTC output is a given path of symbols, 40 ms each."""

    def __init__(self, path: str) -> None:
        symbols = ["<blk>", "<sos/eos>", "<unk>", "▁", "a", "b"]
        info = SimpleNamespace(features=SimpleNamespace(sample_rate=16000), frame_s=0.04)
        self.bundle = SimpleNamespace(tokenizer=Characters(symbols, Path()), info=info)
        self.log_probs = np.full((len(path), len(symbols)), -9.0, np.float32)
        ids = [symbols.index({"-": "<blk>", " ": "▁"}.get(letter, letter)) for letter in path]
        self.log_probs[range(len(ids)), ids] = -0.1

    def encode(self, samples: list[Floats]) -> tuple[list[Floats], None]:
        return [self.log_probs], None


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("-a-bb- -a", "ab a", [200, 360]),
        ("-ab--", "ab", [120]),
        ("-a b-", "a xb", [80, None]),  # x is not a unit
        ("ab", "a b a", [None, None, None]),  # too few frames
        ("-a-", "", []),
    ],
)
def test_a_word_ends_behind_its_last_unit(path: str, text: str, expected: list[float | None]):
    samples = np.zeros(640 * len(path), np.float32)
    assert word_ends(Aligner(path), samples, text) == expected  # type: ignore[arg-type]


def test_a_word_ends_before_the_sound_does():
    assert word_ends(Aligner("--a"), np.zeros(1600, np.float32), "a") == [100]  # type: ignore[arg-type]


def test_words_of_a_manifest_are_aligned(tiny_bundles: Path, sound: Floats, monkeypatch: pytest.MonkeyPatch):
    loaded = Bundle.load(tiny_bundles / "cpu-fp32")
    letters = [*loaded.tokenizer.symbols[:20], "q", "r"]
    aligner = replace(loaded, tokenizer=Characters(letters, loaded.folder))
    made = [Utterance("u", sound, " ab \u00a0 ca"), Utterance("v", sound, "")]
    monkeypatch.setattr(latency, "read_utterances", lambda path, count, rate: made[:count])
    first, second = read_spoken(Path("m.jsonl"), 2, aligner)
    assert (first.words, second.words, second.ends_ms) == (("ab", "ca"), (), ())
    before, after = first.ends_ms
    assert before is not None
    assert after is not None
    assert 0 < before < after <= 5000


@pytest.mark.parametrize(
    ("made", "what"), [(["", " "], "none of its first 2 utterances has text"), ([], "no utterances in it")]
)
def test_a_manifest_without_words_is_named(
    bundle: Bundle, sound: Floats, monkeypatch: pytest.MonkeyPatch, made: list[str], what: str
):
    heard = [Utterance("u", sound, text) for text in made]
    monkeypatch.setattr(latency, "read_utterances", lambda *_: heard)
    with pytest.raises(ManifestError, match=rf"^m\.jsonl: {what}; .*with text$"):
        read_spoken(Path("m.jsonl"), 5, bundle)


# What is shown


def test_the_plot_has_a_line_for_each_mode(
    bundle: Bundle, sound: Floats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig

    def remember(figure: Figure, *args: object, **rest: object) -> None:
        drawn.append(figure)
        savefig(figure, *args, **rest)

    monkeypatch.setattr(Figure, "savefig", remember)
    settings = [
        measure(bundle, [Spoken(sound, ("a",), (None,))], StreamConfig(mode=mode, **context))
        for mode, context in (
            ("ctc-greedy", {"chunk_ms": 640}),
            ("ctc-greedy", {"chunk_ms": 160}),
            ("rescore", {"chunk_ms": 320, "look_ahead": 3}),
        )
    ]
    draw([setting.as_dict() for setting in settings], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert {mode: len(line.get_xdata()) for mode, line in lines.items()} == {"ctc-greedy": 2, "rescore": 1}
    assert list(lines["ctc-greedy"].get_xdata()) == sorted(x.latency.unaware.laal for x in settings[:2])
    assert set(lines["ctc-greedy"].get_ydata()) == {100 * x.latency.errors.rate for x in settings[:2]}
    late_ms = 320 * 3 * bundle.info.stream.look_ahead_layers
    assert sorted(text.get_text() for text in axes.texts) == ["160 ms", f"320 ms + {late_ms} ms", "640 ms"]
