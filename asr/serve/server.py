"""Listening, and leaving: on SIGTERM or Ctrl-C clients may finish; a second signal ends it at once."""

import asyncio
import math
import socket
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from asr.errors import ConfigError
from asr.serve.app import make_app
from asr.serve.hub import GRACE_S, Hub

MAX_MESSAGE_BYTES = 2**20

MAX_FRAMES = 2**12
"""Pings, pongs and parts of a message that a client may send before the message is complete."""

READ_BYTES = 2**14
"""What is read of a connection at once; to parse tiny frames takes long, and meanwhile the others wait."""


class _InSips(asyncio.Protocol, asyncio.BufferedProtocol):
    """Reads READ_BYTES at a time, instead of asyncio's 256 KiB."""

    def get_buffer(self, sizehint: int) -> bytearray:
        self._buffer = bytearray(READ_BYTES)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))


class _Http(_InSips, H11Protocol):
    """A connection on which no request arrives is closed; uvicorn would wait for it for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self) -> None:
        last = self.cycle

        def close() -> None:
            if self.cycle is last and self.transport.get_protocol() is self:
                self.transport.close()

        self.loop.call_later(self.config.timeout_keep_alive, close)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        super().handle_websocket_upgrade(event)
        protocol = self.transport.get_protocol()
        assert isinstance(protocol, _WebSocket)
        if not protocol.handshake_initiated:  # websockets is silent about headers that are too long for it
            self.send_400_response("Invalid WebSocket request received.")


class _WebSocket(_InSips, WebSocketsSansIOProtocol):
    """Has limits for what is no message: pings, and parts of messages."""

    _num_frames = 0
    """Since the last message."""

    def handle_ping(self) -> None:
        self._count()
        answers = self.conn.data_to_send()
        if self.writable.is_set() and not self.transport.is_closing():  # or they would fill the memory
            self.transport.write(b"".join(answers))

    def handle_pong(self, event: Frame) -> None:
        self._count()
        super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        self._count()
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._num_frames = 0
        super().send_receive_event_to_app()

    def _count(self) -> None:
        self._num_frames += 1
        if self._num_frames == MAX_FRAMES:
            self.transport.abort()


class Server(uvicorn.Server):
    """Serves an open hub until it is told to leave."""

    def __init__(self, hub: Hub) -> None:
        config = uvicorn.Config(
            make_app(hub),
            lifespan="off",
            http=_Http,
            ws=_WebSocket,
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_ping_interval=None,  # an answer may wait behind minutes of audio; the hub has its own limits
            ws_per_message_deflate=False,  # a megabyte of it can hold a gigabyte
            timeout_keep_alive=math.ceil(hub.config.first_audio_s),
            timeout_graceful_shutdown=round(GRACE_S),
            log_config=None,
            log_level="warning",  # below that, it shows URLs, which may hold keys
            access_log=False,
            server_header=False,
        )
        super().__init__(config)
        self._hub = hub
        self._num_signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does."""
        self._num_signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to exit."""
        if self._num_signals:
            self._hub.drain()
            self.should_exit |= self._hub.is_overdue or not self._hub.engine.num_streams
        if self._num_signals > 1:
            self._hub.leaving.set()
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int, send_s: float) -> socket.socket:
    """A listening socket; port 0 takes any. ConfigError if that is not possible.

    A connection ends if the client takes nothing of what is sent for send_s seconds, or has vanished.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"{host}:{port}: {reason}; choose another with --host and --port") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; asyncio waits for ever for what it closes to be read
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * send_s))
    return listener
