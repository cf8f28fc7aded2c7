"""`asr serve`: transcription over HTTP and websockets."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.errors import ConfigError
from recipes.options import Mode, Search, stream_config

if TYPE_CHECKING:
    from asr.serve.hub import Hub


def serve(
    bundle: Annotated[Path, typer.Argument(help="folder of the bundle, or of an experiment that has one")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0: any")] = 6006,
    name: Annotated[str, typer.Option(help="the model's name for clients; default: the folder's")] = "",
    keys: Annotated[Path | None, typer.Option(help="file of keys, one per line; clients need one")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="let anyone in who can reach the address")
    ] = False,
    compat: Annotated[str, typer.Option(help="what the websocket at / speaks: sherpa or vosk")] = "sherpa",
    mode: Mode = "",
    search: Search = None,
    chunk_ms: Annotated[int, typer.Option(help="chunk length, sets the latency; 0: the bundle's own")] = 0,
    left_chunks: Annotated[int, typer.Option(help="chunks of left context; -1: the bundle's own")] = -1,
    look_ahead: Annotated[int, typer.Option(help="chunks of look-ahead in every layer; delays add up")] = 0,
    max_streams: Annotated[int, typer.Option(help="clients at the same time; asr bench tells how many")] = 32,
    max_upload_mb: Annotated[float, typer.Option(help="largest file, in MB")] = 25.0,
    max_audio_s: Annotated[float, typer.Option(help="longest file, in seconds")] = 7200.0,
    idle_s: Annotated[float, typer.Option(help="close a websocket that is silent for so long")] = 60.0,
    drain_s: Annotated[float, typer.Option(help="after SIGTERM, clients have so long to finish")] = 30.0,
    threads: Annotated[int, typer.Option(help="threads of onnxruntime")] = 1,
) -> None:
    """Transcribe for clients, in protocols that their programs know already, all on one port.

    POST /v1/audio/transcriptions and GET /v1/models, as OpenAI's; websockets /v1/realtime, as OpenAI's for
    transcription, /sherpa, as sherpa-onnx's, and /vosk, as Vosk's. GET /livez and /readyz are for load
    balancers. docs/serving.md has a client for each.

    Streams share the calls of the model, as they come and go. Ctrl-C or SIGTERM lets clients finish.

    Example: asr serve bundle

    Example: curl -F model=bundle -F file=@a.wav http://127.0.0.1:6006/v1/audio/transcriptions
    """
    from asr.runtime import Bundle
    from asr.serve.hub import Hub, ServeConfig
    from asr.serve.server import listen

    if not (keys or insecure or _is_loopback(host)):
        raise ConfigError(f"--host {host}: reachable from elsewhere; pass --keys FILE, or --insecure")
    config = ServeConfig(
        name=name or bundle.resolve().name,
        stream=stream_config(mode, chunk_ms, left_chunks, look_ahead, search),
        keys=_keys(keys) if keys else (),
        compat=compat,
        max_streams=max_streams,
        max_upload_mb=max_upload_mb,
        max_audio_s=max_audio_s,
        idle_s=idle_s,
        drain_s=drain_s,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", stream=sys.stderr)
    model = Bundle.load(bundle, threads)
    with listen(host, port, config.send_s) as listener:
        asyncio.run(_serve(Hub(model, config), listener))


async def _serve(hub: Hub, listener: socket.socket) -> None:
    """Serve until told to leave."""
    from asr.serve.server import Server

    async with hub.open():
        address, number = listener.getsockname()[:2]
        where = f"[{address}]:{number}" if listener.family == socket.AF_INET6 else f"{address}:{number}"
        clients = f"for {hub.config.max_streams} clients at a time"
        print(f"{hub.config.name} at http://{where}, {clients}", file=sys.stderr)
        await Server(hub).serve(sockets=[listener])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _keys(path: Path) -> tuple[str, ...]:
    """The lines of a file; ConfigError if there are none, or some that no client could send."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {(getattr(error, 'strerror', None) or 'not UTF-8').lower()}") from None
    keys = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not keys:
        raise ConfigError(f"{path}: holds no keys; write one per line")
    for number, key in keys.items():
        if len(key.split()) > 1 or key.startswith("#"):
            raise ConfigError(f"{path}:{number}: expected a key without spaces, and no comments")
    return tuple(keys.values())
