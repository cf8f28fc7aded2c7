"""A stream that cannot go on, among others that can."""

from typing import Any

import pytest

from asr.decode.scorer import Floats
from asr.runtime import Bundle, Stream, StreamBatch
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import accept_all, finish_all
from asr.runtime.utterance import Utterance


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[Utterance]:
    """Utterances whose search raises an error."""
    found: list[Utterance] = []
    for name in ("advance", "end"):
        monkeypatch.setattr(Utterance, name, _unless_broken(getattr(Utterance, name), found))
    return found


def _unless_broken(method: Any, broken: list[Utterance]) -> Any:
    def call(utterance: Utterance, *args: Any) -> Any:
        if utterance in broken:
            raise RuntimeError("broken")
        return method(utterance, *args)

    return call


@pytest.mark.parametrize("at_the_end", [False, True])
def test_the_others_say_what_they_say_alone(
    float32: Bundle, sound: Floats, broken: list[Utterance], at_the_end: bool
):
    alone = Stream(float32)
    expected = [alone.accept(sound), alone.finish()]
    streams = [Stream(float32) for _ in range(3)]
    if not at_the_end:
        broken.append(streams[1]._utterance)
    events = [accept_all(streams, [sound] * 3)]
    broken.append(streams[1]._utterance)
    events.append(finish_all(streams))
    for n in (0, 2):
        assert [told[n] for told in events] == expected
        assert streams[n].failure is None
    assert isinstance(streams[1].failure, RuntimeError)
    assert bool(events[0][1]) == at_the_end


def test_an_error_of_the_model_is_that_of_all(
    float32: Bundle, sound: Floats, monkeypatch: pytest.MonkeyPatch
):
    def advance(*_: Any) -> Any:
        raise MemoryError

    streams = [Stream(float32) for _ in range(2)]
    monkeypatch.setattr(OnnxScorer, "advance", advance)
    assert accept_all(streams, [sound] * 2) == [[], []]
    assert [type(stream.failure) for stream in streams] == [MemoryError] * 2


def test_who_does_not_look_is_told(float32: Bundle, sound: Floats, broken: list[Utterance]):
    batch = StreamBatch(float32)
    one, other = batch.join(), batch.join()
    broken.append(one._utterance)
    with pytest.raises(RuntimeError, match="broken"):
        batch.accept({one: sound, other: sound})
    with pytest.raises(RuntimeError, match="broken"):
        one.accept(sound)
    with pytest.raises(RuntimeError, match="broken"):
        batch.finish([other, one])
