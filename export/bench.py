"""How fast a bundle streams: real-time factor, latency, memory. One thread and one stream by default.

Audio is fed in blocks as a microphone delivers them, but as fast as the stream accepts it. Latencies are what
a speaker would notice if the blocks came in real time:

    chunk           computing time of a block that completes a chunk
    first partial   from the start of the first word to its appearance: waiting for audio, then computing
    final           from the last sample to the final text: encoding the rest, and the last search

Two bundles are compared in turns, utterance by utterance, because the load of a machine varies over time.
"""

import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np

from asr.decode.scorer import Floats
from asr.runtime.bundle import Bundle
from asr.runtime.stream import Stream
from asr.runtime.utterance import StreamConfig

BLOCK_S = 0.02


@dataclass
class Timings:
    """Raw measurements, in seconds."""

    audio_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: list[float] = field(default_factory=list)
    """One per utterance."""
    chunk_s: list[float] = field(default_factory=list)
    first_partial_s: list[float] = field(default_factory=list)
    final_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """The figures that are printed and kept in model.json."""

    audio_s: float
    threads: int
    chunk_ms: int
    look_ahead_ms: int
    """Summed over all layers: the text is this much later."""
    mode: str
    rtf: float
    """Wall time per second of audio."""
    cpu_rtf: float
    """CPU time of all threads per second of audio."""
    chunk_ms_p50_p95: tuple[float, float]
    first_partial_ms_p50_p95: tuple[float, float]
    final_ms_p50_p95: tuple[float, float]
    peak_memory_mb: float
    """Of the whole process."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Ratio(NamedTuple):
    """CPU time of another bundle relative to this one, utterance by utterance."""

    median: float
    quartiles: tuple[float, float]
    utterances: int


def bench(bundle: Bundle, utterances: Iterable[Floats], config: StreamConfig) -> Figures:
    """Stream each utterance once; the first one twice, since the first pass is a warm-up."""
    (timings,) = _by_turns([bundle], utterances, config)
    return _figures(bundle, config, timings)


def bench_against(
    bundle: Bundle, other: Bundle, utterances: Iterable[Floats], config: StreamConfig
) -> tuple[Figures, Figures, Ratio]:
    """The figures of both, and how many times the CPU time of the first the other one needs."""
    ours, theirs = _by_turns([bundle, other], utterances, config)
    ratios = [b / max(a, 1e-9) for a, b in zip(ours.cpu_s, theirs.cpu_s, strict=True)]
    median, low, high = np.percentile(ratios, [50, 25, 75]) if ratios else (0.0, 0.0, 0.0)
    ratio = Ratio(round(float(median), 2), (round(float(low), 2), round(float(high), 2)), len(ratios))
    return _figures(bundle, config, ours), _figures(other, config, theirs), ratio


def _by_turns(
    bundles: Sequence[Bundle], utterances: Iterable[Floats], config: StreamConfig
) -> tuple[Timings, ...]:
    found = tuple(Timings() for _ in bundles)
    for number, samples in enumerate(utterances):
        if number == 0:
            for bundle in bundles:
                _run(bundle, samples, config, Timings())
        for bundle, timings in zip(bundles, found, strict=True):
            _run(bundle, samples, config, timings)
    return found


def _figures(bundle: Bundle, config: StreamConfig, timings: Timings) -> Figures:
    chunk_ms = config.chunk_ms or bundle.info.stream.chunk_ms
    return Figures(
        audio_s=round(timings.audio_s, 1),
        threads=bundle.threads,
        chunk_ms=chunk_ms,
        look_ahead_ms=bundle.info.stream.look_ahead_layers * config.look_ahead * chunk_ms,
        mode=config.mode,
        rtf=round(timings.wall_s / max(timings.audio_s, 1e-9), 4),
        cpu_rtf=round(sum(timings.cpu_s) / max(timings.audio_s, 1e-9), 4),
        chunk_ms_p50_p95=_percentiles(timings.chunk_s),
        first_partial_ms_p50_p95=_percentiles(timings.first_partial_s),
        final_ms_p50_p95=_percentiles(timings.final_s),
        peak_memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )


def _run(bundle: Bundle, samples: Floats, config: StreamConfig, timings: Timings) -> None:
    rate = bundle.info.features.sample_rate
    block = max(int(BLOCK_S * rate), 1)
    stream = Stream(bundle, config)
    started, cpu_started = time.perf_counter(), time.process_time()
    has_partial = False
    for start in range(0, len(samples), block):
        before, encoded_s = time.perf_counter(), stream.encoded_s
        events = stream.accept(samples[start : start + block])
        spent_s = time.perf_counter() - before
        if events and not has_partial:
            has_partial = True
            timings.first_partial_s.append(stream.duration_s - events[0].start_s + spent_s)
        if stream.encoded_s > encoded_s:
            timings.chunk_s.append(spent_s)
    before = time.perf_counter()
    stream.finish()
    timings.final_s.append(time.perf_counter() - before)
    timings.wall_s += time.perf_counter() - started
    timings.cpu_s.append(time.process_time() - cpu_started)
    timings.audio_s += len(samples) / rate


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile, in milliseconds; 0 if nothing was measured."""
    if not seconds:
        return 0.0, 0.0
    low, high = np.percentile(seconds, [50, 95])
    return round(1000 * float(low), 1), round(1000 * float(high), 1)
