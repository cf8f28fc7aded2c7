"""`asr bench`: real-time factor and latency of a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.errors import BundleError, ConfigError
from recipes.latency import MANIFESTS, bench_latency
from recipes.options import Modes, Search, stream_config
from recipes.peers import MARKER, bench_peer

if TYPE_CHECKING:
    from asr.decode.scorer import Floats
    from asr.runtime import Bundle, StreamConfig
    from export.bench import Figures

MADE_S, MADE_PARTS = 60.0, 6

ChunkLengths = Annotated[
    list[int] | None, typer.Option(help="chunk length; several with --latency; 0: the bundle's own")
]


def bench(
    bundle: Annotated[Path, typer.Argument(help="folder of the bundle, or of an experiment that has one")],
    sound: Annotated[
        Path | None, typer.Argument(help="sound file or manifest; a minute of synthetic sound if not given")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="another bundle, or what asr export --target sherpa-onnx wrote; timed in turns"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="with --against sherpa-onnx: passes over the audio")] = 7,
    threads: Annotated[int, typer.Option(help="threads of onnxruntime")] = 1,
    mode: Modes = None,
    search: Search = None,
    chunk_ms: ChunkLengths = None,
    left_chunks: Annotated[int, typer.Option(help="chunks of left context; -1: the bundle's own")] = -1,
    look_ahead: Annotated[int, typer.Option(help="chunks of look-ahead in every layer")] = 0,
    limit: Annotated[int, typer.Option(help="how many utterances of a manifest, from the start")] = 50,
    latency: Annotated[
        bool, typer.Option("--latency", help="measure how late words are written, per mode and chunk")
    ] = False,
    alignment: Annotated[
        Path | None, typer.Option(help="bundle that aligns words with the audio; this one if not given")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="with --latency: FILE.json, and FILE.png beside it")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Stream audio through a bundle at full speed, and print speed, latencies and memory.

    With --against graphs for sherpa-onnx, compares both on one core: live, from a file and with many streams.
    With --latency, plays the utterances of a manifest as if they were spoken now, and prints one line per
    mode and chunk: error rate, lagging and word delays, by the audio read / by the clock (docs/latency.md).

    Example: asr bench bundle a.wav --against exp/conformer-m/sherpa

    Example: asr bench bundle test.jsonl.gz --latency --chunk-ms 320 --chunk-ms 640 -o latency.json
    """
    from asr.runtime import Bundle

    if limit < 1:
        raise ConfigError(f"--limit {limit}: expected at least 1")
    loaded = Bundle.load(bundle, threads)
    configs = [
        stream_config(name, ms, left_chunks, look_ahead, search)
        for name in mode or ["ctc-prefix"]
        for ms in chunk_ms or [0]
    ]
    of_latency = len(configs) > 1 or alignment is not None or out is not None
    _check_options(latency, of_latency, against)
    if against is not None and (against / MARKER).exists():
        bench_peer(loaded, against, _sounds(sound, loaded, limit), configs[0], rounds, as_json)
        return
    folder = alignment or against
    other = _load_like(loaded, folder, threads) if folder else None
    if latency:
        bench_latency(loaded, other or loaded, sound, limit, configs, out, as_json)
    else:
        _bench_speed(loaded, other, _sounds(sound, loaded, limit), configs[0], as_json)


def _check_options(latency: bool, of_latency: bool, against: Path | None) -> None:
    """of_latency: whether an option of --latency was given. ConfigError for incompatible options."""
    if of_latency and not latency:
        raise ConfigError("several modes or chunks, --alignment and -o need --latency")
    if latency and against is not None:
        raise ConfigError("--against compares speed; it does not go with --latency")


def _bench_speed(
    bundle: Bundle, other: Bundle | None, sounds: Iterator[Floats], config: StreamConfig, as_json: bool
) -> None:
    from export.bench import bench as measure
    from export.bench import bench_against

    if other is None:
        found = measure(bundle, sounds, config)
        if as_json:
            print(json.dumps(found.as_dict()))
        else:
            _print(bundle, found)
        return
    ours, theirs, ratio = bench_against(bundle, other, sounds, config)
    if as_json:
        print(json.dumps({"bundle": ours.as_dict(), "against": theirs.as_dict(), "times": ratio._asdict()}))
        return
    _print(bundle, ours)
    _print(other, theirs)
    low, high = ratio.quartiles
    print(
        f"{bundle.folder} is {ratio.median:.2f} times as fast as {other.folder} "
        f"(median of {ratio.utterances} utterances in turns, half of them {low:.2f} to {high:.2f})"
    )


def _print(bundle: Bundle, found: Figures) -> None:
    parameters = bundle.info.parameters / 1e6
    print(f"{bundle.folder}: {bundle.info.target}, {parameters:.1f} M parameters, {found.mode}")
    chunks = f"chunks of {found.chunk_ms} ms"
    if found.look_ahead_ms:
        chunks += f", {found.look_ahead_ms} ms of delay by look-ahead"
    print(f"{'audio':<20}{found.audio_s:,.1f} s in {chunks}, {found.threads} thread(s)")
    print(f"{'real-time factor':<20}{found.rtf:.4f}  ({found.cpu_rtf:.4f} in processor time)")
    for name, (median, high) in {
        "chunk": found.chunk_ms_p50_p95,
        "first partial": found.first_partial_ms_p50_p95,
        "final": found.final_ms_p50_p95,
    }.items():
        print(f"{name:<20}{median:,.1f} ms, 95 % below {high:,.1f} ms")
    print(f"{'memory':<20}{found.peak_memory_mb:,.0f} MB, peak of the whole process")


def _sounds(sound: Path | None, bundle: Bundle, limit: int) -> Iterator[Floats]:
    import numpy as np

    from asr.audio import read
    from export.verify import made_sound, read_utterances

    sample_rate = bundle.info.features.sample_rate
    if sound is None:
        yield from np.array_split(made_sound(MADE_S, sample_rate), MADE_PARTS)
    elif sound.name.endswith(MANIFESTS):
        yield from (u.samples for u in read_utterances(sound, limit, sample_rate))
    else:
        yield read(sound, sample_rate)


def _load_like(bundle: Bundle, folder: Path, threads: int) -> Bundle:
    """Load another bundle; BundleError unless it has the same sample rate."""
    from asr.runtime import Bundle

    other = Bundle.load(folder, threads)
    theirs, ours = other.info.features.sample_rate, bundle.info.features.sample_rate
    if theirs != ours:
        raise BundleError(
            f"{folder}: for {theirs} Hz, and {bundle.folder} is for {ours}; "
            "compare bundles of one sample rate"
        )
    return other
