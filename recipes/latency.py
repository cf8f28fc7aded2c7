"""`asr bench --latency`: the latency of words, one line per mode and chunk, and a file with all numbers."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr.errors import ConfigError

if TYPE_CHECKING:
    from asr.latency import Delays
    from asr.runtime import Bundle, StreamConfig
    from export.latency import Setting

MANIFESTS = (".jsonl", ".jsonl.gz")


def bench_latency(
    bundle: Bundle,
    aligner: Bundle,
    sound: Path | None,
    limit: int,
    configs: Sequence[StreamConfig],
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure every configuration on the first `limit` utterances of a manifest; all numbers go to `out`.

    aligner: the bundle for the forced alignment of the words.
    """
    from asr.runtime import Stream
    from export.latency import draw, measure, read_spoken

    for config in configs:  # report what is not possible before minutes of measuring
        Stream(bundle, config)
    if out is not None:
        if out.suffix != ".json":
            raise ConfigError(f"-o {out}: expected FILE.json; the plot will be FILE.png")
        out.parent.mkdir(parents=True, exist_ok=True)
    manifest, machine = _manifest(sound), _machine(bundle.threads)
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
        draw([setting.as_dict() for setting in settings], out.with_suffix(".png"))


def _manifest(sound: Path | None) -> Path:
    if sound is None or not (sound.is_dir() or sound.name.endswith(MANIFESTS)):
        raise ConfigError(f"--latency: {sound or 'synthetic sound'} has no text; give a manifest with text")
    return sound


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
    """The processor's model, which Linux only reports in a file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _line(setting: Setting) -> str:
    """One setting; pairs of numbers are by the audio read / by the clock of a listener."""
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
    ahead = f"  look-ahead {setting.look_ahead_ms} ms" if setting.look_ahead_ms else ""
    unaligned = f"  {latency.unaligned} words not aligned" if latency.unaligned else ""
    return (
        f"{setting.config.mode:<12}{setting.chunk_ms:>5} ms{ahead}  WER {100 * latency.errors.rate:.2f} %"
        f"{lags} ms{delays} ms (p50 p95 p99)  retracted {100 * latency.retracted_share:.1f} %"
        f"  RTF {setting.rtf:.3f}{unaligned}"
    )


def _delays(unaware: Delays, aware: Delays) -> str:
    names = ("p50", "p95", "p99")
    return " ".join(f"{_ms(getattr(unaware, name))}/{_ms(getattr(aware, name))}" for name in names)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
