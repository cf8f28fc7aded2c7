"""HTTP: transcription of a file, as OpenAI's `POST /v1/audio/transcriptions`.

A file goes through the same calls of the model as live streams, a block at a time, and is decoded as a
stream. Fields that this server does not know are ignored, as clients send more and more of them; so are
`prompt` and `temperature`. With `stream=true`, each utterance is sent when it has ended.

Errors of the client are 4xx, as the official client sends the whole file three times on any 5xx.
"""

import asyncio
import json
import logging
import math
import re
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Message, Receive

from asr.audio import blocks
from asr.errors import AsrError
from asr.runtime import Event
from asr.runtime.transcript import to_srt, to_vtt
from asr.serve.engine import BLOCK_S, ServedStream
from asr.serve.hub import Hub, ServeConfig
from asr.serve.refusal import Refusal, broken, gone, leaving, refusal_of

log = logging.getLogger("asr.serve")

MAX_DECODED_BYTES = 4 * 2**30
"""A small file may claim any sample rate and number of channels, so its decoded size is limited, too."""

MAX_FILES, MAX_FIELDS, MAX_FIELD_BYTES = 4, 64, 2**16

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""For proxies, which would collect the messages of an event stream."""

Format = Literal["json", "text", "srt", "vtt", "verbose_json"]


@dataclass(frozen=True)
class _Wish:
    """What a client asked for."""

    file: UploadFile
    format: str
    is_streamed: bool
    granularities: frozenset[str]
    language: str


async def transcriptions(request: Request) -> Response:
    """`POST /v1/audio/transcriptions`."""
    hub: Hub = request.app.state.hub
    hub.check_key(request)
    async with AsyncExitStack() as stack:
        stream = await stack.enter_async_context(hub.stream())
        form = await stack.enter_async_context(_form(request, hub))
        wish = _wish(form, hub.config)
        if wish.language and hub.engine.bundle.info.decoder_type == "whisper":
            search = replace(hub.config.stream.search, language=wish.language)
            await stream.restart(replace(hub.config.stream, search=search))
        end = asyncio.create_task(_end(request))
        stack.callback(end.cancel)
        events = _events(end, stream, wish.file, hub)
        if not wish.is_streamed:
            return _answer(wish, [event async for event in events], stream.duration_s)
        messages = _messages(events, stack.pop_all())
        first = await anext(messages)  # what is wrong with the file shows before the answer begins
    return StreamingResponse(_after(first, messages), headers=UNBUFFERED, media_type="text/event-stream")


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    hub: Hub = request.app.state.hub
    hub.check_key(request)
    return JSONResponse({"object": "list", "data": [_model(hub)]})


async def model(request: Request) -> Response:
    """`GET /v1/models/NAME`."""
    hub: Hub = request.app.state.hub
    hub.check_key(request)
    _check_model(request.path_params["name"], hub.config)
    return JSONResponse(_model(hub))


def _model(hub: Hub) -> dict[str, Any]:
    return {"id": hub.config.name, "object": "model", "created": 0, "owned_by": "local"}


def _check_model(name: str, config: ServeConfig) -> None:
    if name != config.name:
        message = f"model {name!r} is not here; this server has {config.name}"
        raise Refusal(404, message, "model", "model_not_found")


# Reading a request


@asynccontextmanager
async def _form(request: Request, hub: Hub) -> AsyncIterator[FormData]:
    """The fields of a request, read within the limits of size and time."""
    config = hub.config
    _check_size(int(request.headers.get("content-length", 0)), config)
    _check_charset(request.headers.get("content-type"))
    limited = Request(request.scope, _limited(request.receive, config))
    reading = limited.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    try:
        form = await hub.unless_leaving(reading, config.upload_s)
    except TimeoutError:
        message = f"the upload took more than {config.upload_s:g} s"
        raise Refusal(400, message, "file", "upload_timeout") from None
    except ClientDisconnect:
        raise gone() from None
    if form is None:
        raise leaving()
    try:
        yield form
    finally:
        await form.close()


def _check_charset(kind: str | None) -> None:
    """Other charsets may take seconds to decode, or give what is no text."""
    _, options = parse_options_header(kind)
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Refusal(400, f"the form is in {charset[:40]!r}, expected UTF-8", code="invalid_value")


def _limited(receive: Receive, config: ServeConfig) -> Receive:
    """The same, but Refusal once too much has come."""
    num_bytes = 0

    async def count() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        _check_size(num_bytes, config)
        return message

    return count


def _check_size(num_bytes: int, config: ServeConfig) -> None:
    if num_bytes > config.max_upload_mb * 2**20:
        message = f"the request is larger than {config.max_upload_mb:g} MB; send less at a time"
        raise Refusal(413, message, "file", "too_large")


def _wish(form: FormData, config: ServeConfig) -> _Wish:
    """The fields, checked; what is not known here is ignored."""
    files = form.getlist("file")
    if len(files) != 1 or not isinstance(files[0], UploadFile):
        message = f"expected one file in the field file of multipart/form-data, got {len(files)}"
        raise Refusal(400, message, "file", "missing_file")
    _check_model(_text(form, "model", ""), config)
    _number(form, "temperature")
    format_ = _choice(form, "response_format", get_args(Format), "json")
    is_streamed = _choice(form, "stream", ("true", "false", "1", "0"), "false") in ("true", "1")
    return _Wish(files[0], format_, is_streamed, _granularities(form), _text(form, "language", ""))


def _granularities(form: FormData) -> frozenset[str]:
    """OpenAI's clients repeat the field; others leave out the brackets, and some write a list."""
    name = "timestamp_granularities"
    values = [*form.getlist(f"{name}[]"), *form.getlist(name)]
    wanted = frozenset(word for value in values for word in re.findall(r"\w+", str(value)))
    if not wanted <= {"word", "segment"}:
        raise Refusal(400, "expected word, segment or both", f"{name}[]", "invalid_value")
    return wanted


def _text(form: FormData, name: str, default: str) -> str:
    value = form.get(name) or default  # many clients send what is not set as an empty field
    if not isinstance(value, str):
        raise Refusal(400, f"{name}: expected text, not a file", name, "invalid_value")
    return value


def _choice(form: FormData, name: str, choices: Sequence[str], default: str) -> str:
    value = _text(form, name, default)
    if value.lower() not in choices:
        raise Refusal(400, f"{name}: expected one of {', '.join(choices)}", name, "invalid_value")
    return value.lower()


def _number(form: FormData, name: str) -> None:
    try:
        is_number = math.isfinite(float(_text(form, name, "0")))
    except ValueError:
        is_number = False
    if not is_number:
        raise Refusal(400, f"{name}: expected a number", name, "invalid_value")


# Answering it


async def _end(request: Request) -> None:
    """Wait until the client has gone. To ask again and again would let it send on, into our memory."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    end: asyncio.Task[None], stream: ServedStream, file: UploadFile, hub: Hub
) -> AsyncIterator[Event]:
    """The final events of a file. AudioError if it cannot be used, Refusal if either side leaves."""
    config = hub.config
    found = blocks(
        file.file, BLOCK_S, stream.sample_rate, max_s=config.max_audio_s, max_bytes=MAX_DECODED_BYTES
    )
    while (block := await asyncio.to_thread(next, found, None)) is not None:
        if end.done():
            raise gone()
        if hub.leaving.is_set():
            raise leaving()
        for event in _finals(await stream.accept(block)):
            yield event
    for event in _finals(await stream.finish()):
        yield event


def _finals(events: list[Event]) -> list[Event]:
    return [event for event in events if event.final and event.text]


def _answer(wish: _Wish, events: list[Event], duration_s: float) -> Response:
    text = " ".join(event.text for event in events)
    if wish.format == "text":
        return PlainTextResponse(text + "\n")
    if wish.format == "srt":
        return PlainTextResponse("\n".join(to_srt(events)) + "\n", media_type="application/x-subrip")
    if wish.format == "vtt":
        return PlainTextResponse("\n".join(to_vtt(events)) + "\n", media_type="text/vtt")
    seconds = round(duration_s, 3)
    if wish.format == "json":
        return JSONResponse({"text": text, "usage": {"type": "duration", "seconds": seconds}})
    body: dict[str, Any] = {"task": "transcribe", "language": wish.language or "unknown"}
    body |= {"duration": seconds, "text": text}
    if "word" in wish.granularities:
        body["words"] = [
            {"word": word.word, "start": round(word.start_s, 3), "end": round(word.end_s, 3)}
            for event in events
            for word in event.words
        ]
    if "segment" in wish.granularities or not wish.granularities:
        body["segments"] = [_segment(number, event) for number, event in enumerate(events)]
    return JSONResponse(body)


def _segment(number: int, event: Event) -> dict[str, Any]:
    """All that clients expect of a segment. The ids of its units and the probability that nobody spoke are
    not known here; its log-probability is that of its least certain units, a mean over its words."""
    logs = [math.log(max(word.confidence, 1e-9)) for word in event.words]
    data = event.text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": round(event.start_s, 3),
        "end": round(event.end_s, 3),
        "text": f" {event.text}",
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": sum(logs) / max(len(logs), 1),
        "compression_ratio": len(data) / len(zlib.compress(data)),
        "no_speech_prob": 0.0,
    }


async def _messages(events: AsyncIterator[Event], stack: AsyncExitStack) -> AsyncIterator[str]:
    """The lines of an event stream; the first is empty, and comes once the file has been opened."""
    async with stack:
        text = ""
        upcoming = await anext(events, None)
        yield ":\n\n"
        try:
            while upcoming:
                delta = f" {upcoming.text}" if text else upcoming.text
                text += delta
                yield _message({"type": "transcript.text.delta", "delta": delta})
                upcoming = await anext(events, None)
        except AsrError as error:
            yield _message({"error": refusal_of(error).body()})
            return
        except Refusal as refusal:
            yield _message({"error": refusal.body()})
            return
        except Exception:  # to end the answer early would look like success
            log.exception("a stream failed")
            yield _message({"error": broken().body()})
            return
        yield _message({"type": "transcript.text.done", "text": text})
        yield "data: [DONE]\n\n"


def _message(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _after(first: str, messages: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for message in messages:
        yield message
