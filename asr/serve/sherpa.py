"""sherpa-onnx's streaming websocket.

The client sends binary messages of float32 samples, little-endian, mono, at the model's rate, and at the end
the text `Done`. It gets a JSON object for each new text of the present utterance, `is_final` at its end; the
last one is `is_eof`, and the text `Done!` follows. `tokens` and `timestamps` are words and their starts here.
"""

from typing import Any

import numpy as np

from asr.runtime import Event
from asr.serve.connection import Connection, UnknownMessage
from asr.serve.engine import ServedStream

NOTHING = Event("", True, 0.0, 0.0, ())


async def talk(connection: Connection, stream: ServedStream) -> None:
    """Until `Done`."""
    segment, last = 0, _result(NOTHING, 0)
    while (message := await connection.receive()) is not None:
        if message == "Done":
            break
        for event in _latest(await stream.accept(_samples(message))):
            last = _result(event, segment)
            await connection.send(last)
            segment += event.final
    finals = [x for x in await stream.finish() if x.final and (x.text or not last["is_final"])]
    results = [_result(event, segment + n) for n, event in enumerate(finals)] or [last]
    for result in results[:-1]:
        await connection.send(result)
    await connection.send({**results[-1], "is_final": True, "is_eof": True})
    await connection.send("Done!")


def _samples(message: str | bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    if isinstance(message, str):
        raise UnknownMessage("expected binary messages of float32 samples, or Done")
    if len(message) % 4:
        raise UnknownMessage(f"a message of {len(message)} bytes, expected float32 samples of 4 bytes each")
    return np.frombuffer(message, "<f4").astype(np.float32)


def _latest(events: list[Event]) -> list[Event]:
    """The final ones, and the last if it is not: what it replaces need not be sent."""
    return [event for event in events[:-1] if event.final] + events[-1:]


def _result(event: Event, segment: int) -> dict[str, Any]:
    return {
        "text": event.text,
        "tokens": [word.word for word in event.words],
        "timestamps": [round(word.start_s, 3) for word in event.words],
        "ys_probs": [],
        "lm_probs": [],
        "context_scores": [],
        "segment": segment,
        "words": [],
        "start_time": round(event.start_s, 3),
        "is_final": event.final,
        "is_eof": False,
    }
