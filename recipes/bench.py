"""`asr bench`: real-time factor and latency of a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.errors import BundleError

if TYPE_CHECKING:
    from asr.decode.scorer import Floats
    from asr.runtime import Bundle
    from export.bench import Figures

MADE_S, MADE_PARTS = 60.0, 6
MANIFEST_UTTERANCES = 50


def bench(
    bundle: Annotated[Path, typer.Argument(help="folder of the bundle")],
    sound: Annotated[
        Path | None, typer.Argument(help="sound file or manifest; a minute of made sound if not given")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="another bundle, timed by turns with this one")] = None,
    threads: Annotated[int, typer.Option(help="of onnxruntime")] = 1,
    mode: Annotated[str, typer.Option(help="as of asr decode")] = "ctc-prefix",
    chunk_ms: Annotated[int, typer.Option(help="0: the bundle's own")] = 0,
    left_chunks: Annotated[int, typer.Option(help="-1: the bundle's own")] = -1,
    look_ahead: Annotated[int, typer.Option(help="chunks that every layer looks ahead")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Stream sound through a bundle as fast as it goes, and print speed, latencies and memory.

    Example: asr bench bundle data/manifests/corpus_test.jsonl.gz --against bundle-fp32
    """
    from asr.runtime import Bundle, StreamConfig
    from export.bench import bench as measure
    from export.bench import bench_against

    loaded = Bundle.load(bundle, threads)
    left = left_chunks if left_chunks >= 0 else None
    config = StreamConfig(mode=mode, chunk_ms=chunk_ms or None, left_chunks=left, look_ahead=look_ahead)
    sounds = _sounds(sound, loaded.info.features.sample_rate)
    if against is None:
        found = measure(loaded, sounds, config)
        if as_json:
            print(json.dumps(found.as_dict()))
        else:
            _print(loaded, found)
        return
    other = Bundle.load(against, threads)
    if other.info.features.sample_rate != loaded.info.features.sample_rate:
        raise BundleError(
            f"{against}: for {other.info.features.sample_rate} Hz, and {bundle} is for "
            f"{loaded.info.features.sample_rate}; compare bundles of one sample rate"
        )
    ours, theirs, ratio = bench_against(loaded, other, sounds, config)
    if as_json:
        print(json.dumps({"bundle": ours.as_dict(), "against": theirs.as_dict(), "times": ratio._asdict()}))
        return
    _print(loaded, ours)
    _print(other, theirs)
    low, high = ratio.quartiles
    print(
        f"{bundle} is {ratio.median:.2f} times as fast as {against} "
        f"(median of {ratio.utterances} utterances by turns, half of them {low:.2f} to {high:.2f})"
    )


def _print(bundle: Bundle, found: Figures) -> None:
    parameters = bundle.info.parameters / 1e6
    print(f"{bundle.folder}: {bundle.info.target}, {parameters:.1f} M parameters, {found.mode}")
    chunks = f"chunks of {found.chunk_ms} ms"
    if found.look_ahead_ms:
        chunks += f", {found.look_ahead_ms} ms behind the sound for look-ahead"
    print(f"{'sound':<20}{found.audio_s:,.1f} s in {chunks}, {found.threads} thread(s)")
    print(f"{'real-time factor':<20}{found.rtf:.4f}  ({found.cpu_rtf:.4f} in computing time)")
    for name, (median, high) in {
        "chunk": found.chunk_ms_p50_p95,
        "first partial": found.first_partial_ms_p50_p95,
        "final": found.final_ms_p50_p95,
    }.items():
        print(f"{name:<20}{median:,.1f} ms, 95 % below {high:,.1f} ms")
    print(f"{'memory':<20}{found.peak_memory_mb:,.0f} MB at most, of the whole process")


def _sounds(sound: Path | None, sample_rate: int) -> Iterator[Floats]:
    import numpy as np

    from asr.audio import read
    from export.verify import made_sound, read_utterances

    if sound is None:
        yield from np.array_split(made_sound(MADE_S, sample_rate), MADE_PARTS)
    elif sound.name.endswith((".jsonl", ".jsonl.gz")):
        yield from (u.samples for u in read_utterances(sound, MANIFEST_UTTERANCES, sample_rate))
    else:
        yield read(sound, sample_rate)
