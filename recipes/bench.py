"""`asr bench`: real-time factor and latency of a bundle."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asr.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from asr.decode.scorer import Floats
    from asr.latency import Delays
    from asr.runtime import Bundle, StreamConfig
    from export.bench import Figures
    from export.latency import Setting

MADE_S, MADE_PARTS = 60.0, 6
MANIFESTS = (".jsonl", ".jsonl.gz")


def bench(
    bundle: Annotated[Path, typer.Argument(help="folder of the bundle")],
    sound: Annotated[
        Path | None, typer.Argument(help="sound file or manifest; a minute of made sound if not given")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="another bundle, timed by turns with this one")] = None,
    threads: Annotated[int, typer.Option(help="of onnxruntime")] = 1,
    mode: Annotated[
        list[str] | None, typer.Option(help="as of asr decode; several with --latency  [default: ctc-prefix]")
    ] = None,
    chunk_ms: Annotated[
        list[int] | None, typer.Option(help="several with --latency; 0: the bundle's own  [default: 0]")
    ] = None,
    left_chunks: Annotated[int, typer.Option(help="-1: the bundle's own")] = -1,
    limit: Annotated[int, typer.Option(help="utterances of a manifest, from the first on")] = 50,
    latency: Annotated[
        bool, typer.Option("--latency", help="how late words are written, in every mode with every chunk")
    ] = False,
    alignment: Annotated[
        Path | None, typer.Option(help="bundle that says when words were spoken; this one if not given")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="with --latency: FILE.json, and FILE.png beside it")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Stream sound through a bundle as fast as it goes, and print speed, latencies and memory.

    With --latency, play the utterances of a manifest as if they were spoken now, and print one line a mode
    and chunk: error rate, lagging and delays of words, by the sound read / by the clock (docs/latency.md).

    Example: asr bench bundle data/manifests/corpus_test.jsonl.gz --against bundle-fp32

    Example: asr bench bundle test.jsonl.gz --latency --chunk-ms 320 --chunk-ms 640 -o latency.json
    """
    from asr.runtime import Bundle, StreamConfig
    from export.bench import bench as measure
    from export.bench import bench_against

    if limit < 1:
        raise ConfigError(f"--limit {limit}: expected at least 1")
    loaded = Bundle.load(bundle, threads)
    configs = [
        StreamConfig(mode=m, chunk_ms=ms or None, left_chunks=left_chunks if left_chunks >= 0 else None)
        for m in mode or ["ctc-prefix"]
        for ms in chunk_ms or [0]
    ]
    if latency:
        if against is not None:
            raise ConfigError("--against compares speed; it does not go with --latency")
        aligner = loaded if alignment is None else _load_like(loaded, alignment, threads)
        _bench_latency(loaded, aligner, _manifest(sound), limit, configs, out, as_json)
        return
    if len(configs) > 1 or alignment is not None or out is not None:
        raise ConfigError("several modes or chunks, --alignment and -o need --latency")
    (config,) = configs
    sounds = _sounds(sound, loaded.info.features.sample_rate, limit)
    if against is None:
        found = measure(loaded, sounds, config)
        if as_json:
            print(json.dumps(found.as_dict()))
        else:
            _print(loaded, found)
        return
    other = _load_like(loaded, against, threads)
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
    print(f"{'sound':<20}{found.audio_s:,.1f} s in chunks of {found.chunk_ms} ms, {found.threads} thread(s)")
    print(f"{'real-time factor':<20}{found.rtf:.4f}  ({found.cpu_rtf:.4f} in computing time)")
    for name, (median, high) in {
        "chunk": found.chunk_ms_p50_p95,
        "first partial": found.first_partial_ms_p50_p95,
        "final": found.final_ms_p50_p95,
    }.items():
        print(f"{name:<20}{median:,.1f} ms, 95 % below {high:,.1f} ms")
    print(f"{'memory':<20}{found.peak_memory_mb:,.0f} MB at most, of the whole process")


def _sounds(sound: Path | None, sample_rate: int, limit: int) -> Iterator[Floats]:
    import numpy as np

    from asr.audio import read
    from export.verify import made_sound, read_utterances

    if sound is None:
        yield from np.array_split(made_sound(MADE_S, sample_rate), MADE_PARTS)
    elif sound.name.endswith(MANIFESTS):
        yield from (u.samples for u in read_utterances(sound, limit, sample_rate))
    else:
        yield read(sound, sample_rate)


def _load_like(bundle: Bundle, folder: Path, threads: int) -> Bundle:
    """Another bundle; BundleError unless it is for the same sample rate."""
    from asr.runtime import Bundle

    other = Bundle.load(folder, threads)
    theirs, ours = other.info.features.sample_rate, bundle.info.features.sample_rate
    if theirs != ours:
        raise BundleError(
            f"{folder}: for {theirs} Hz, and {bundle.folder} is for {ours}; "
            "compare bundles of one sample rate"
        )
    return other


# Latency


def _manifest(sound: Path | None) -> Path:
    if sound is None or not (sound.is_dir() or sound.name.endswith(MANIFESTS)):
        raise ConfigError(f"--latency: {sound or 'made sound'} has no text; give a manifest with text")
    return sound


def _bench_latency(
    bundle: Bundle,
    aligner: Bundle,
    manifest: Path,
    limit: int,
    configs: Sequence[StreamConfig],
    out: Path | None,
    as_json: bool,
) -> None:
    from asr.runtime import Stream
    from export.latency import draw, measure, read_spoken

    for config in configs:  # what is not possible is said before minutes of measuring
        Stream(bundle, config)
    if out is not None:
        if out.suffix != ".json":
            raise ConfigError(f"-o {out}: expected FILE.json; the plot will be FILE.png")
        out.parent.mkdir(parents=True, exist_ok=True)
    machine = _machine(bundle.threads)
    utterances = read_spoken(manifest, limit, aligner)
    settings = []
    for config in configs:
        settings.append(measure(bundle, utterances, config))
        if not as_json:
            print(_line(settings[-1]), flush=True)
    report = {
        "command": shlex.join(["asr", *sys.argv[1:]]),
        "bundle": str(bundle.folder),
        "alignment": str(aligner.folder),
        "manifest": str(manifest),
        "utterances": len(utterances),
        "words": sum(len(utterance.words) for utterance in utterances),
        "audio_s": sum(len(utterance.samples) for utterance in utterances) / bundle.info.features.sample_rate,
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "settings": [setting.as_dict() for setting in settings],
    }
    if as_json:
        print(json.dumps(report))
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draw(settings, out.with_suffix(".png"))


def _machine(threads: int) -> dict[str, Any]:
    """What the computation-aware figures depend on."""
    import onnxruntime

    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    """Its model; Linux says it in a file alone."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _line(setting: Setting) -> str:
    """One setting; where there are two numbers, by the sound read / by the clock of a listener."""
    latency = setting.latency
    unaware, aware = latency.unaware, latency.aware
    lags = "".join(
        f"  {name.upper()} {_ms(getattr(unaware, name))}/{_ms(getattr(aware, name))}"
        for name in ("al", "laal", "dal")
    )
    delays = "".join(
        f"  {name} {_delays(getattr(unaware, field), getattr(aware, field))}"
        for name, field in (("first", "first_word"), ("word", "word"), ("last", "last_word"))
    )
    unaligned = f"  {latency.unaligned} words not aligned" if latency.unaligned else ""
    return (
        f"{setting.config.mode:<12}{setting.chunk_ms:>5} ms  WER {100 * latency.errors.rate:.2f} %{lags} ms"
        f"{delays} ms (p50 p95 p99)  retracted {100 * latency.retracted_share:.1f} %  RTF {setting.rtf:.3f}"
        f"{unaligned}"
    )


def _delays(unaware: Delays, aware: Delays) -> str:
    names = ("p50", "p95", "p99")
    return " ".join(f"{_ms(getattr(unaware, name))}/{_ms(getattr(aware, name))}" for name in names)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
