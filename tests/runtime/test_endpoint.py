import pytest

from asr.errors import ConfigError
from asr.runtime.endpoint import Ending, EndpointConfig, Endpointer

CONFIG = EndpointConfig(trailing_s=0.4, silence_s=1.0, max_s=2.0)
SILENCE, SPEECH = True, False


def ending(*runs: tuple[bool, int], config: EndpointConfig = CONFIG) -> tuple[int, Ending] | None:
    """Runs of frames, 0.1 s each -> the first endpoint."""
    return Endpointer(config, 0.1).advance([blank for blank, count in runs for _ in range(count)])


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([(SPEECH, 3), (SILENCE, 9)], (7, Ending.PAUSE)),
        ([(SILENCE, 5), (SPEECH, 1), (SILENCE, 4)], (10, Ending.PAUSE)),
        ([(SPEECH, 3), (SILENCE, 3), (SPEECH, 1), (SILENCE, 3)], None),
        ([(SILENCE, 9)], None),
        ([(SILENCE, 12)], (10, Ending.SILENCE)),
        ([(SPEECH, 30)], (25, Ending.LENGTH)),
        ([(SPEECH, 19), (SILENCE, 1), (SPEECH, 4)], (20, Ending.LENGTH)),
        ([(SPEECH, 22), (SILENCE, 1), (SPEECH, 4)], (23, Ending.LENGTH)),
        ([(SILENCE, 9), (SPEECH, 12), (SILENCE, 1)], (22, Ending.LENGTH)),
        ([], None),
    ],
)
def test_rules(runs, expected):
    assert ending(*runs) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_chunks_do_not_matter(size: int):
    frames = ([SPEECH] * 3 + [SILENCE] * 6 + [SPEECH] * 25 + [SILENCE] * 14) * 3

    def endings(step: int) -> list[int]:
        endpointer, found, start = Endpointer(CONFIG, 0.1), [], 0
        while start < len(frames):
            ended = endpointer.advance(frames[start : min(start + step - start % step, len(frames))])
            if ended:
                start += ended[0]
                found.append(start)
                endpointer.reset()
            else:
                start += step - start % step
        return found

    assert endings(size) == endings(len(frames)) != []


def test_speech_is_forgotten_with_the_utterance():
    endpointer = Endpointer(CONFIG, 0.1)
    endpointer.advance([SPEECH])
    assert endpointer.has_speech
    endpointer.reset()
    assert not endpointer.has_speech
    assert endpointer.advance([SILENCE] * 4) is None


@pytest.mark.parametrize("field", ["trailing_s", "silence_s", "max_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_times_must_be_positive(field: str, value: float):
    with pytest.raises(ConfigError, match=field):
        EndpointConfig(**{field: value})
