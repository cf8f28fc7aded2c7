"""What all requests share: the engine, the limits, the keys, and whether the server is about to leave."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import HTTPConnection

from asr.errors import ConfigError
from asr.runtime import Bundle, StreamConfig
from asr.serve.engine import Engine, ServedStream
from asr.serve.refusal import Refusal

T = TypeVar("T")

COMPAT = ("sherpa", "vosk")

KEY_PROTOCOL = "openai-insecure-api-key."
"""OpenAI's JavaScript gives the key as a subprotocol, since browsers let it set no header."""

GRACE_S = 5.0
"""How long clients have to read their last results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """What the server grants its clients."""

    name: str
    """The model's name for clients."""

    stream: StreamConfig = field(default_factory=StreamConfig)
    keys: tuple[str, ...] = ()
    """Clients need one of them, if there are any."""

    compat: str = "sherpa"
    """One of COMPAT: what the websocket at / speaks, for clients that know no path."""

    max_streams: int = 32
    """Clients at the same time; others are told to come back."""

    max_upload_mb: float = 25.0
    max_audio_s: float = 7200.0
    """The longest file."""

    upload_s: float = 120.0
    """The longest time that an upload may take."""

    first_audio_s: float = 10.0
    """A connection is closed if it brings no request for so long, or no audio, ..."""

    idle_s: float = 60.0
    """... a websocket later if nothing comes for so long, ..."""

    send_s: float = 30.0
    """... or if the client reads nothing for so long."""

    drain_s: float = 30.0
    """After SIGTERM, clients have this long to finish."""

    def __post_init__(self) -> None:
        if self.compat not in COMPAT:
            raise ConfigError(f"compat is {self.compat}, expected one of {', '.join(COMPAT)}")
        for name in ("max_upload_mb", "max_audio_s", "upload_s", "first_audio_s", "idle_s", "send_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.max_streams < 1:
            raise ConfigError(f"max_streams is {self.max_streams}, expected 1 or more")
        if not self.drain_s >= 0:
            raise ConfigError(f"drain_s is {self.drain_s}, expected 0 or more")


class Hub:
    """One server."""

    def __init__(self, bundle: Bundle, config: ServeConfig) -> None:
        self.config = config
        self.engine = Engine(bundle, config.stream)
        self.is_ready = False
        """Whether it takes new clients."""
        self.leaving = asyncio.Event()
        """Set when clients must finish now."""
        self.is_overdue = False
        """Whether they have had the time for that, too."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Run the engine until the block is left. BundleError or ConfigError if the model cannot stream."""
        running = asyncio.create_task(self.engine.run())
        try:
            await self.engine.warm_up()
            self.is_ready = True
            yield
        finally:
            running.cancel()
            self.engine.close()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[ServedStream]:
        """A stream for a client. Raises Refusal if there are too many, or the server is about to leave."""
        if not self.is_ready:
            raise Refusal(503, "the server does not take clients now", code="unavailable")
        if self.engine.num_streams >= self.config.max_streams:
            raise Refusal(503, f"{self.config.max_streams} clients are being served", code="overloaded")
        async with self.engine.stream() as stream:
            yield stream

    async def unless_leaving(self, arrival: Awaitable[T], timeout_s: float) -> T | None:
        """What arrives; None if clients must finish before. TimeoutError if it takes longer."""
        arriving = asyncio.ensure_future(arrival)
        leaving = asyncio.create_task(self.leaving.wait())
        try:
            await asyncio.wait({arriving, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if arriving.done():
                return arriving.result()
            if leaving.done():
                return None
            raise TimeoutError
        finally:
            arriving.cancel()
            leaving.cancel()

    def drain(self) -> None:
        """Take no more clients, and leave the others some time."""
        if self.is_ready:
            self.is_ready = False
            loop = asyncio.get_running_loop()
            loop.call_later(self.config.drain_s, self.leaving.set)
            loop.call_later(self.config.drain_s + GRACE_S, setattr, self, "is_overdue", True)

    def check_key(self, client: HTTPConnection) -> None:
        """Refusal unless the client has a key, if any is needed: in the header Authorization, or for a
        browser's websocket as api_key in the URL, or as OpenAI's JavaScript has it."""
        given = _key_of(client)
        matches = [hmac.compare_digest(given, key.encode()) for key in self.config.keys]
        if matches and not any(matches):
            message = "a key is missing or wrong; send the header Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key")


def _key_of(client: HTTPConnection) -> bytes:
    scheme, _, key = client.headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token"):
        return key.encode("latin-1")  # as headers are decoded
    if scheme or client.scope["type"] != "websocket":
        return b""
    offered = [
        x.removeprefix(KEY_PROTOCOL) for x in client.scope["subprotocols"] if x.startswith(KEY_PROTOCOL)
    ]
    return (offered or [client.query_params.get("api_key", "")])[0].encode()
