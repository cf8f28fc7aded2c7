"""Vosk's websocket.

The client may first send `{"config": {"sample_rate": 16000, "words": true}}`; then binary messages of int16
samples, little-endian, mono, at 8 kHz if it did not say otherwise. Each is answered by exactly one message,
as stock clients wait for it: `{"partial": ...}` within an utterance, `{"text": ...}` at its end.
`{"reset": 1}` ends the utterance, and `{"eof": 1}` the conversation.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from asr.audio import Floats, Resampler
from asr.containers import check_format
from asr.runtime import Event
from asr.serve.connection import Connection, UnknownMessage, parse
from asr.serve.engine import ServedStream


@dataclass
class _Settings:
    """What a client asked for."""

    sample_rate: int = 8000
    words: bool = False
    max_alternatives: int = 0


async def talk(connection: Connection, stream: ServedStream) -> None:
    """Until `{"eof": 1}`."""
    settings = _Settings()
    resampler = Resampler(settings.sample_rate, stream.sample_rate)
    partial = ""
    while (message := await connection.receive()) is not None:
        if isinstance(message, bytes):
            events = await stream.accept(resampler.accept(_samples(message)))
            finals = [event for event in events if event.final]
            if events:
                partial = "" if events[-1].final else events[-1].text
            await connection.send(_final(finals, settings) if finals else {"partial": partial})
            continue
        command = parse(message)
        if "config" in command:
            settings = _configured(command["config"])
            resampler = Resampler(settings.sample_rate, stream.sample_rate)
        elif command.get("reset"):
            events = await stream.accept(resampler.finish())
            finals = [event for event in events + await stream.restart() if event.final]
            resampler, partial = Resampler(settings.sample_rate, stream.sample_rate), ""
            await connection.send(_final(finals, settings))
        elif command.get("eof"):
            break
        elif not command:
            raise UnknownMessage("expected binary messages of int16 samples, or a JSON object")
    events = await stream.accept(resampler.finish())
    finals = [event for event in events + await stream.finish() if event.final]
    await connection.send(_final(finals, settings))


def _samples(message: bytes) -> Floats:
    if len(message) % 2:
        raise UnknownMessage(f"a message of {len(message)} bytes, expected int16 samples of 2 bytes each")
    return np.frombuffer(message, "<i2").astype(np.float32) / np.float32(32768)


def _configured(config: Any) -> _Settings:
    """Settings from the first message; those that are not ours are ignored, above all paths of models."""
    given = config if isinstance(config, dict) else {}
    known = {name: value for name, value in given.items() if value is not None}
    try:
        settings = _Settings(
            int(known.get("sample_rate", _Settings.sample_rate)),
            bool(known.get("words", False)),
            int(known.get("max_alternatives", 0)),
        )
    except (TypeError, ValueError, OverflowError):
        raise UnknownMessage("config: expected numbers for sample_rate and max_alternatives") from None
    check_format("config", settings.sample_rate, 1)
    return settings


def _final(events: list[Event], settings: _Settings) -> dict[str, Any]:
    """The result of utterances that ended within one message, mostly one."""
    text = " ".join(event.text for event in events if event.text)
    words = [word for event in events for word in event.words]
    timed = [{"start": round(x.start_s, 3), "end": round(x.end_s, 3), "word": x.word} for x in words]
    if settings.max_alternatives > 0:
        confidence = min((word.confidence for word in words), default=1.0)
        found = {"text": text, "confidence": round(confidence, 4)}
        return {"alternatives": [found | ({"result": timed} if settings.words and words else {})]}
    if not settings.words or not words:
        return {"text": text}
    result = [{"conf": round(x.confidence, 4)} | word for x, word in zip(words, timed, strict=True)]
    return {"result": result, "text": text}
