"""`asr bench --against` a model exported for sherpa-onnx."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from asr.errors import ConfigError

if TYPE_CHECKING:
    from asr.decode.scorer import Floats
    from asr.runtime import Bundle, StreamConfig
    from export.peers import Duel

MARKER = "sherpa.json"
"""The file that marks an output folder of `asr export --target sherpa-onnx`."""


def bench_peer(
    bundle: Bundle, folder: Path, sounds: Iterator[Floats], config: StreamConfig, rounds: int, as_json: bool
) -> None:
    """Run both on the same audio in turns, and print ratios."""
    import numpy as np
    from rich.console import Console

    from export.peers import Duel, duel

    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: expected at least 1")
    chunk_ms = config.chunk_ms or bundle.info.stream.chunk_ms
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "sound.npy"
        np.save(path, np.concatenate(list(sounds)))
        with Console(stderr=True).status("starting") as status:
            for news in duel(bundle, folder, path, chunk_ms, rounds):
                if isinstance(news, Duel):
                    found = news
                else:
                    status.update(f"in turns: {news}")
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _print(bundle, found, chunk_ms)


def _print(bundle: Bundle, found: Duel, chunk_ms: int) -> None:
    parameters = bundle.info.parameters / 1e6
    print(f"{bundle.folder}: {bundle.info.target}, {parameters:.1f} M parameters, chunks of {chunk_ms} ms")
    print(
        f"{'processor time per second':<28}{'ours':>9}{'theirs':>9}{'times as fast':>24}{'of the limit':>14}"
    )
    for row in found.rows:
        median, low, high = row.ratios
        ratio = f"{median:.2f} [{low:.2f} .. {high:.2f}]"
        print(f"{row.name:<28}{row.ours:>9.4f}{row.theirs:>9.4f}{ratio:>24}{row.limit_share:>14.0%}")
    for name, values in (("streams that keep up", found.streams), ("peak memory, MB", found.memory_mb)):
        print(f"{name:<28}{values['ours']:>9.0f}{values['theirs']:>9.0f}")
    for i, percent in enumerate((50, 95)):
        values = {who: x[i] for who, x in found.round_ms.items()}
        print(f"{f'chunk, {percent} % below, ms':<28}{values['ours']:>9.1f}{values['theirs']:>9.1f}")
