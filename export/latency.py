"""The latency of a bundle's texts: every utterance is played to it as a live stream.

Audio comes in blocks, each available at its end. A block is processed once it is available and the previous
one is done; computing time is measured, waiting is only simulated. The times at which words were spoken come
from a forced CTC alignment of the reference by a bundle that encodes the whole utterance at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from asr import wer
from asr.decode.align import align
from asr.decode.scorer import Floats
from asr.errors import ManifestError
from asr.latency import Latency, Told, Trace, make_trace, summarise
from asr.microphone import Block, microphone_blocks
from asr.runtime.bundle import Bundle
from asr.runtime.events import Event
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import Stream
from asr.runtime.utterance import StreamConfig
from asr.runtime.whole import open_stream
from asr.tokens import UNK, normalise
from asr.virtual_microphone import VirtualMicrophone
from export.bench import BLOCK_S
from export.verify import read_utterances

SILENT_S = 3.0
"""Silence after the speech at a microphone: longer than any endpoint waits."""


class Spoken(NamedTuple):
    """An utterance, its words, and where each ends in the audio; None if the alignment failed."""

    samples: Floats
    words: tuple[str, ...]
    ends_ms: tuple[float | None, ...]


@dataclass(frozen=True)
class Setting:
    """The measurements for one configuration."""

    config: StreamConfig
    chunk_ms: int
    left_chunks: int
    look_ahead_ms: int
    """Summed over all layers: the text is this much later."""
    rtf: float
    """Computing time per second of audio; above 1, a stream falls further and further behind."""
    latency: Latency

    def as_dict(self) -> dict[str, Any]:
        latency = asdict(self.latency) | {"wer": 100 * self.latency.errors.rate}
        context = {"chunk_ms": self.chunk_ms, "left_chunks": self.left_chunks}
        return {
            "config": asdict(self.config) | context,
            "look_ahead_ms": self.look_ahead_ms,
            "rtf": self.rtf,
            **latency,
        }


def read_spoken(manifest: Path, limit: int, aligner: Bundle) -> list[Spoken]:
    """The first `limit` utterances of a manifest, aligned. ManifestError if none of them has words."""
    scorer = OnnxScorer(aligner)
    found = []
    for utterance in read_utterances(manifest, limit, aligner.info.features.sample_rate):
        text = normalise(utterance.text)
        ends_ms = word_ends(scorer, utterance.samples, text)
        found.append(Spoken(utterance.samples, tuple(wer.words(text)), tuple(ends_ms)))
    if not any(x.words for x in found):
        what = f"none of its first {len(found)} utterances has text" if found else "no utterances in it"
        raise ManifestError(f"{manifest}: {what}; latency is measured on words, give a manifest with text")
    return found


def word_ends(aligner: OnnxScorer, samples: Floats, text: str) -> list[float | None]:
    """Where each space-separated word of `text` ends in samples (S,), in ms.

    None for a word that the aligner's units cannot spell; for all if there are too few frames for them, or if
    the aligner's words are not separated by spaces, as with ideographs.
    """
    tokenizer, info = aligner.bundle.tokenizer, aligner.bundle.info
    words = wer.words(text)
    if not words:
        return []
    tokens = tokenizer.encode(text)
    spelt = tokenizer.words(tokens)
    (log_probs,), _ = aligner.encode([samples])
    alignment = align(log_probs, tokens)
    if alignment is None or len(spelt) != len(words):
        return [None] * len(words)
    source_ms = 1000 * len(samples) / info.features.sample_rate
    frame_ms = 1000 * info.frame_s
    return [
        None if UNK in tokens[first:end] else min(float(alignment.end[end - 1]) * frame_ms, source_ms)
        for _, first, end in spelt
    ]


def measure(bundle: Bundle, utterances: Sequence[Spoken], config: StreamConfig) -> Setting:
    """Play every utterance once; the first one twice, since the first pass is a warm-up."""
    for utterance in utterances[:1]:
        play(bundle, utterance.samples, config)
    rate = bundle.info.features.sample_rate
    traces: list[Trace] = []
    computing_ms = 0.0
    for samples, words, ends_ms in utterances:
        told, spent_ms = play(bundle, samples, config)
        traces.append(make_trace(told, 1000 * len(samples) / rate, words, ends_ms))
        computing_ms += spent_ms
    streaming = bundle.info.stream
    chunk_ms = streaming.chunk_ms if config.chunk_ms is None else config.chunk_ms
    return Setting(
        config,
        chunk_ms=chunk_ms,
        left_chunks=streaming.left_chunks if config.left_chunks is None else config.left_chunks,
        look_ahead_ms=bundle.info.stream.look_ahead_layers * config.look_ahead * chunk_ms,
        rtf=computing_ms / max(sum(trace.source_ms for trace in traces), 1e-9),
        latency=summarise(traces),
    )


def play(bundle: Bundle, samples: Floats, config: StreamConfig) -> tuple[list[Told], float]:
    """The events of a stream for samples (S,) that arrive in real time, and the computing time in ms."""
    rate = bundle.info.features.sample_rate
    size = max(int(BLOCK_S * rate), 1)
    stream, listener = Stream(bundle, config), Listener()
    for start in range(0, len(samples), size):
        block = samples[start : start + size]
        listener.hear(1000 * (start + len(block)) / rate, partial(stream.accept, block))
    listener.hear(1000 * len(samples) / rate, stream.finish)
    return listener.told, listener.computing_ms


def play_to_microphone(
    bundle: Bundle, samples: Floats, config: StreamConfig, block_ms: int, **device: Any
) -> tuple[list[Told], list[Block]]:
    """Like `play`, through a virtual microphone with the blocks and the queue of `asr transcribe --mic`.

    The times are when a text is shown. Silence follows samples (S,) until the last text has come, since
    nothing tells a microphone that the speech is over.  device: options of VirtualMicrophone.
    """
    rate = bundle.info.features.sample_rate
    microphone = VirtualMicrophone(samples, rate, **device)
    stream = open_stream(bundle, config)
    told: list[Told] = []
    blocks: list[Block] = []
    last_s = len(samples) / rate + SILENT_S
    for block in microphone_blocks(None, rate, block_ms, microphone):
        blocks.append(replace(block, samples=block.samples[:0]))
        for event in stream.accept(block.samples):
            told.append(Told(1000 * stream.duration_s, 1000 * microphone.now(), event.text, event.final))
        if stream.duration_s >= last_s:
            break
    return told, blocks


class Listener:
    """A clock that starts with the audio: no block is processed before its end, or before the last one."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.computing_ms = 0.0
        self._done_ms = 0.0

    def hear(self, available_ms: float, compute: Callable[[], list[Event]]) -> None:
        before_s = perf_counter()
        events = compute()
        spent_ms = 1000 * (perf_counter() - before_s)
        self.computing_ms += spent_ms
        self._done_ms = max(self._done_ms, available_ms) + spent_ms
        self.told += [Told(available_ms, self._done_ms, event.text, event.final) for event in events]


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot word error rate against latency, a line per mode; points are labelled with chunk and look-ahead.

    rows: settings as from `Setting.as_dict`, possibly of several reports.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for mode in dict.fromkeys(row["config"]["mode"] for row in rows):
        points = sorted(
            (row["unaware"]["laal"], row["wer"], _label(row))
            for row in rows
            if row["config"]["mode"] == mode and row["unaware"]["laal"] is not None
        )
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=mode)
        for x, y, label in points:
            axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points")
    axes.margins(0.12)  # for the labels
    axes.set(xlabel="LAAL, computation-unaware (ms)", ylabel="word error rate (%)")
    figure.legend(title="mode", loc="outside right upper")
    figure.savefig(file, dpi=100)


def _label(row: Mapping[str, Any]) -> str:
    ahead = f" + {row['look_ahead_ms']} ms" if row["look_ahead_ms"] else ""
    return f"{row['config']['chunk_ms']} ms{ahead}"
