"""The routes, and what a load balancer asks: whether the server is alive, and whether it takes clients."""

import logging
import time
import uuid

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from asr.errors import AsrError
from asr.serve import files, realtime, sherpa, vosk
from asr.serve.connection import Talk, serve
from asr.serve.hub import Hub
from asr.serve.refusal import Refusal, broken, refusal_of

log = logging.getLogger("asr.serve")

PROTOCOLS = {"sherpa": sherpa.talk, "vosk": vosk.talk}
"""What clients that know no path may speak."""

STARTS = ("http.response.start", "websocket.http.response.start", "websocket.accept")
"""Messages that begin an answer, with its headers."""


def make_app(hub: Hub) -> ASGIApp:
    """The application of one hub, which must be open."""
    routes = [
        Route("/v1/audio/transcriptions", files.transcriptions, methods=["POST"]),
        Route("/v1/models", files.models),
        Route("/v1/models/{name:path}", files.model),
        *(Route(path, _alive) for path in ("/livez", "/health")),
        Route("/readyz", _ready),
        _socket("/", PROTOCOLS[hub.config.compat]),
        *(_socket(f"/{name}", talk) for name, talk in PROTOCOLS.items()),
        _socket("/v1/realtime", realtime.talk),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={Exception: _broken, AsrError: _unusable, Refusal: _refused, HTTPException: _http},
    )
    app.state.hub = hub
    return _Log(app)


def _socket(path: str, talk: Talk) -> WebSocketRoute:
    async def endpoint(websocket: WebSocket) -> None:
        await serve(websocket, talk)

    return WebSocketRoute(path, endpoint)


async def _alive(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    """Whether it takes clients, and how many it has."""
    hub: Hub = request.app.state.hub
    engine = hub.engine
    body = {"ready": hub.is_ready, "streams": engine.num_streams, "max_streams": hub.config.max_streams}
    return JSONResponse({**body, "audio_s": round(engine.audio_s, 3)}, 200 if hub.is_ready else 503)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def _unusable(_: Request, error: Exception) -> Response:
    assert isinstance(error, AsrError)
    return refusal_of(error).response()


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, error.detail).response()


async def _broken(_: Request, __: Exception) -> Response:
    return broken().response()


class _Log:
    """Gives each request an id, and says in the log what became of it; neither its query nor its text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request_id, started, status = uuid.uuid4().hex, time.monotonic(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] in STARTS:
                MutableHeaders(scope=message)["x-request-id"] = request_id
                status = message.get("status", 0)
            elif message["type"] == "websocket.close":
                status = message.get("code", 1000)
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            seconds = time.monotonic() - started
            what = scope.get("method", "WEBSOCKET")
            path = scope["raw_path"].decode()[:200]  # still encoded: it may hold line breaks
            log.info("%s %s %s %s, %.3f s", request_id, what, path, status or "gone", seconds)
