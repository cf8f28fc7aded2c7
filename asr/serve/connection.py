"""What the websockets have in common: who is admitted, how long silence may last, and how they end."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from asr.errors import AsrError
from asr.serve.engine import ServedStream
from asr.serve.hub import Hub
from asr.serve.refusal import Refusal

log = logging.getLogger("asr.serve")

DONE, LEAVING, WRONG_TYPE, WRONG_DATA, IDLE, BROKEN = 1000, 1001, 1003, 1007, 1008, 1011
"""Codes with which a websocket is closed (RFC 6455, section 7.4.1)."""

PROTOCOL = "realtime"
"""What OpenAI's JavaScript calls the protocol."""


class UnknownMessage(Exception):
    """The client sent something that the protocol does not know; the connection ends."""


class Connection:
    """One client's websocket, once it is admitted."""

    def __init__(self, websocket: WebSocket, hub: Hub) -> None:
        self.hub = hub
        self._websocket = websocket
        self._has_heard = False

    async def receive(self) -> str | bytes | None:
        """The next message; None if the server is leaving.

        Raises TimeoutError if nothing comes, WebSocketDisconnect if the client has gone.
        """
        if self.hub.leaving.is_set():
            return None
        timeout_s = self.hub.config.idle_s if self._has_heard else self.hub.config.first_audio_s
        try:
            message = await self.hub.unless_leaving(self._websocket.receive(), timeout_s)
        except TimeoutError:
            raise TimeoutError(f"nothing was heard for {timeout_s:g} s") from None
        if message is None:
            return None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"])
        content: str | bytes = message["bytes" if message.get("text") is None else "text"]
        self._has_heard |= isinstance(content, bytes)
        return content

    async def send(self, message: dict[str, Any] | str) -> None:
        """Send a text, or an object as JSON. TimeoutError if the client does not read."""
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        try:
            await asyncio.wait_for(self._websocket.send_text(text), self.hub.config.send_s)
        except TimeoutError:
            raise TimeoutError(f"nothing was read for {self.hub.config.send_s:g} s") from None

    def heard(self) -> None:
        """Audio came in some other form than binary messages."""
        self._has_heard = True


def parse(message: str | bytes) -> dict[str, Any]:
    """A JSON object; empty if the message is anything else."""
    try:
        content = json.loads(message)
    except (ValueError, RecursionError):  # nested too deeply
        return {}
    return content if isinstance(content, dict) else {}


Talk = Callable[[Connection, ServedStream], Awaitable[None]]
"""A protocol: what is said to a client from its first message to its last."""


async def serve(websocket: WebSocket, talk: Talk) -> None:
    """Admit a client, talk to it, and close the connection whatever happens."""
    hub: Hub = websocket.app.state.hub
    try:
        hub.check_key(websocket)
        async with hub.stream() as stream:
            # a browser that offers protocols wants one of them
            await websocket.accept(PROTOCOL if PROTOCOL in websocket.scope["subprotocols"] else None)
            code, reason = await _end_of(talk(Connection(websocket, hub), stream), hub)
            if websocket.client_state is WebSocketState.CONNECTED:
                await _close(websocket, code, reason, hub.config.send_s)
    except Refusal as refusal:
        await websocket.send_denial_response(refusal.response())


async def _close(websocket: WebSocket, code: int, reason: str, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(websocket.close(code, reason[:120]), timeout_s)
    except (TimeoutError, WebSocketDisconnect, RuntimeError):  # it is gone
        log.info("websocket %s: gone before it was closed", websocket.url.path)


async def _end_of(talking: Awaitable[None], hub: Hub) -> tuple[int, str]:
    """How to close the connection after a talk: (code, reason)."""
    try:
        await talking
    except WebSocketDisconnect:
        return DONE, ""
    except TimeoutError as error:
        return IDLE, str(error)
    except UnknownMessage as error:
        return WRONG_TYPE, str(error)
    except AsrError as error:
        return WRONG_DATA, str(error)
    except Exception:
        log.exception("a stream failed")
        return BROKEN, "internal error"
    return (LEAVING, "the server is leaving") if hub.leaving.is_set() else (DONE, "")
