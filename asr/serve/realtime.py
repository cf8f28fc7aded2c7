"""OpenAI's Realtime websocket, for transcription: `GET /v1/realtime?intent=transcription`.

Audio comes as `input_audio_buffer.append` in base64, int16 little-endian, at 24 kHz or the rate that
`session.update` sets. With `turn_detection` (the default), an item is an utterance, as the model's endpoints
cut them; without it, what was appended up to `input_audio_buffer.commit`. A text is sent once it is final, as
clients may only append deltas. Messages that cannot be served are answered by an `error`, and the session
goes on.
"""

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from asr.audio import Resampler
from asr.containers import check_format
from asr.errors import AsrError
from asr.runtime import Event
from asr.serve.connection import Connection, parse
from asr.serve.engine import ServedStream
from asr.serve.refusal import Refusal

RATE = 24000


async def talk(connection: Connection, stream: ServedStream) -> None:
    """Until either side leaves."""
    session = _Session(connection, stream)
    await session.tell("session.created", session=session.describe())
    while (message := await connection.receive()) is not None:
        await session.take(message)
    await session.end()


class _Session:
    """What one client has said and been told."""

    def __init__(self, connection: Connection, stream: ServedStream) -> None:
        self._connection, self._stream = connection, stream
        self._rate = RATE
        self._resampler = Resampler(RATE, stream.sample_rate)
        self._has_turns = True
        self._num_told = self._num_items = 0
        self._texts: list[str] = []
        """Final texts of the item that is not yet committed."""
        self._is_speaking = False
        self._new_s = 0.0
        """Seconds of audio since the last item."""
        self._takes: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "session.update": self._update,
            "transcription_session.update": self._update_beta,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }

    async def tell(self, kind: str, **content: Any) -> None:
        """Send one event."""
        self._num_told += 1
        await self._connection.send({"type": kind, "event_id": f"event_{self._num_told}", **content})

    def describe(self) -> dict[str, Any]:
        """The session as it is."""
        audio = {"format": {"type": "audio/pcm", "rate": self._rate}, "transcription": self._model()}
        return {
            "type": "transcription",
            "id": "sess_1",
            "object": "realtime.transcription_session",
            "audio": {"input": {**audio, "turn_detection": self._turns()}},
        }

    async def take(self, message: str | bytes) -> None:
        """Do what a message asks for, or say what is wrong with it."""
        content = parse(message)
        try:
            await self._take(content)
        except Refusal as refusal:
            await self._complain(refusal, content)
        except AsrError as error:
            await self._complain(Refusal(400, str(error), "audio", "invalid_audio"), content)

    async def end(self) -> None:
        """The last item."""
        await self._hear(await self._stream.accept(self._resampler.finish()))
        await self._hear(await self._stream.finish())
        if self._texts:
            await self._complete()

    def _model(self) -> dict[str, Any]:
        return {"model": self._connection.hub.config.name}

    def _turns(self) -> dict[str, Any] | None:
        return {"type": "server_vad"} if self._has_turns else None

    async def _take(self, content: dict[str, Any]) -> None:
        kind = content.get("type")
        if not isinstance(kind, str) or kind not in self._takes:
            problem = f"expected an object whose type is one of {', '.join(self._takes)}"
            raise Refusal(400, problem, "type", "unknown_type")
        await self._takes[kind](content)

    async def _complain(self, refusal: Refusal, content: dict[str, Any]) -> None:
        """Say what is wrong with a message, and with which."""
        given = content.get("event_id")
        event_id = given if isinstance(given, str) and given.isascii() else None
        await self.tell("error", error={**refusal.body(), "event_id": event_id})

    async def _update(self, content: dict[str, Any]) -> None:
        wanted = _inside(content, "session", "audio", "input")
        self._configure(_inside(wanted, "format"), wanted)
        await self.tell("session.updated", session=self.describe())

    async def _update_beta(self, content: dict[str, Any]) -> None:
        """As in the interface's beta, which many clients still speak."""
        wanted = _inside(content, "session")
        kind = wanted.get("input_audio_format", "pcm16")
        self._configure({"type": "audio/pcm" if kind == "pcm16" else kind, "rate": RATE}, wanted)
        audio = {"input_audio_format": "pcm16", "input_audio_transcription": self._model()}
        await self.tell("transcription_session.updated", session={**audio, "turn_detection": self._turns()})

    def _configure(self, format_: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Take a format of audio, and settings of which only turn_detection matters, or change nothing."""
        rate = format_.get("rate", self._rate)
        if format_.get("type", "audio/pcm") != "audio/pcm" or not isinstance(rate, int):
            message = "expected audio/pcm with a rate in Hz"
            raise Refusal(400, message, "session.audio.input.format", "invalid_value")
        check_format("session.audio.input.format", rate, 1)
        turns = wanted.get("turn_detection", self._turns())
        kind = turns.get("type", "server_vad") if isinstance(turns, dict) else turns
        if kind not in ("server_vad", "semantic_vad", None):
            message = "expected an object whose type is server_vad or semantic_vad, or null"
            raise Refusal(400, message, "turn_detection", "invalid_value")
        self._has_turns = turns is not None
        if rate != self._rate:
            self._rate, self._resampler = rate, Resampler(rate, self._stream.sample_rate)

    async def _append(self, content: dict[str, Any]) -> None:
        try:
            data = base64.b64decode(content.get("audio", ""), validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise Refusal(400, "audio: expected base64", "audio", "invalid_value") from None
        if len(data) % 2:
            raise Refusal(400, f"audio: {len(data)} bytes, expected int16 samples", "audio", "invalid_value")
        self._connection.heard()
        samples = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
        self._new_s += len(samples) / self._rate
        await self._hear(await self._stream.accept(self._resampler.accept(samples)))

    async def _commit(self, _: dict[str, Any]) -> None:
        if not self._stream.duration_s:
            raise Refusal(400, "there is no audio to commit", code="input_audio_buffer_commit_empty")
        num_items = self._num_items
        await self._hear(await self._restart())
        if self._num_items == num_items:  # with turns, too, if nothing was said: the client waits for an item
            self._is_speaking = False
            await self._complete()

    async def _clear(self, _: dict[str, Any]) -> None:
        await self._restart()
        self._texts.clear()
        self._is_speaking, self._new_s = False, 0.0
        await self.tell("input_audio_buffer.cleared")

    async def _restart(self) -> list[Event]:
        """End the stream and begin another -> the last events."""
        events = await self._stream.accept(self._resampler.finish())
        self._resampler = Resampler(self._rate, self._stream.sample_rate)
        return events + await self._stream.restart()

    async def _hear(self, events: list[Event]) -> None:
        """Take what the model heard; with turns, each final text is an item."""
        for event in events:
            if not event.text:
                continue
            if self._has_turns and not self._is_speaking:
                await self._tell_edge("speech_started", audio_start_ms=round(1000 * event.start_s))
            self._is_speaking = True
            if event.final:
                self._is_speaking = False
                self._texts.append(event.text)
                if self._has_turns:
                    await self._tell_edge("speech_stopped", audio_end_ms=round(1000 * event.end_s))
                    await self._complete()

    async def _tell_edge(self, edge: str, **when: int) -> None:
        await self.tell(f"input_audio_buffer.{edge}", item_id=f"item_{self._num_items + 1}", **when)

    async def _complete(self) -> None:
        """Tell the text of an item."""
        previous = f"item_{self._num_items}" if self._num_items else None
        self._num_items += 1
        item, text = f"item_{self._num_items}", " ".join(self._texts)
        self._texts.clear()
        await self.tell("input_audio_buffer.committed", previous_item_id=previous, item_id=item)
        await self.tell("conversation.item.added", previous_item_id=previous, item=_item(item))
        kind, of_item = "conversation.item.input_audio_transcription", {"item_id": item, "content_index": 0}
        if text:
            await self.tell(f"{kind}.delta", **of_item, delta=text)
        usage = {"type": "duration", "seconds": round(self._new_s, 3)}
        self._new_s = 0.0
        await self.tell(f"{kind}.completed", **of_item, transcript=text, usage=usage)


def _item(name: str) -> dict[str, Any]:
    """An item before its transcript is known."""
    kinds = {"object": "realtime.item", "type": "message", "status": "completed", "role": "user"}
    return {"id": name, **kinds, "content": [{"type": "input_audio", "transcript": None}]}


def _inside(content: dict[str, Any], *names: str) -> dict[str, Any]:
    """An object within objects, empty where it is missing. Refusal if something else is there."""
    for name in names:
        content = content.get(name, {})
        if not isinstance(content, dict):
            raise Refusal(400, f"{name}: expected an object", name, "invalid_value")
    return content
