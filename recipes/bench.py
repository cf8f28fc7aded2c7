"""`asr bench`: real-time factor and latency of a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from asr.decode.scorer import Floats

MADE_S = 60.0
MANIFEST_UTTERANCES = 50


def bench(
    bundle: Annotated[Path, typer.Argument(help="folder of the bundle")],
    sound: Annotated[
        Path | None, typer.Argument(help="sound file or manifest; a minute of made sound if not given")
    ] = None,
    threads: Annotated[int, typer.Option(help="of onnxruntime")] = 1,
    mode: Annotated[str, typer.Option(help="as of asr decode")] = "ctc-prefix",
    chunk_ms: Annotated[int, typer.Option(help="0: the bundle's own")] = 0,
    left_chunks: Annotated[int, typer.Option(help="-1: the bundle's own")] = -1,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Stream sound through a bundle as fast as it goes, and print speed, latencies and memory.

    Example: asr bench bundle data/manifests/corpus_test.jsonl.gz
    """
    from asr.runtime import Bundle, StreamConfig
    from export.bench import bench as measure

    loaded = Bundle.load(bundle, threads)
    config = StreamConfig(
        mode=mode,
        chunk_ms=chunk_ms or None,
        left_chunks=left_chunks if left_chunks >= 0 else None,
    )
    found = measure(loaded, _sounds(sound, loaded.info.features.sample_rate), config)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    print(f"{bundle}: {loaded.info.target}, {loaded.info.parameters / 1e6:.1f} M parameters, {mode}")
    print(f"{'sound':<20}{found.audio_s:,.1f} s in chunks of {found.chunk_ms} ms, {found.threads} thread(s)")
    print(f"{'real-time factor':<20}{found.rtf:.4f}  ({found.cpu_rtf:.4f} in computing time)")
    for name, (median, high) in {
        "chunk": found.chunk_ms_p50_p95,
        "first partial": found.first_partial_ms_p50_p95,
        "final": found.final_ms_p50_p95,
    }.items():
        print(f"{name:<20}{median:,.1f} ms, 95 % below {high:,.1f} ms")
    print(f"{'memory':<20}{found.peak_memory_mb:,.0f} MB at most")


def _sounds(sound: Path | None, sample_rate: int) -> Iterator[Floats]:
    from asr.audio import read
    from export.verify import made_sound, read_utterances

    if sound is None:
        yield made_sound(MADE_S, sample_rate)
    elif sound.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (u.samples for u in read_utterances(sound, MANIFEST_UTTERANCES, sample_rate))
    else:
        yield read(sound, sample_rate)
