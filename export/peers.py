"""A bundle against sherpa-onnx with the same weights: live, from a file, and with many streams at once.

Each runs in its own process, pinned to the same core with one thread, and they take turns: the load of a
machine varies over time, so only ratios of adjacent runs mean something. Figures are CPU times of the process
and cover everything from samples to text, with greedy CTC.

    python -m export.peers ours BUNDLE SOUND.npy CHUNK_MS LEFT_CHUNKS CORE        reads tasks, writes times
"""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort

from asr.decode.scorer import Floats
from asr.errors import BundleError, MissingExtra
from asr.runtime.bundle import Bundle, session_options
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import StreamBatch, stream_context
from asr.runtime.utterance import StreamConfig

FRAME_MS, SAMPLE_RATE = 40, 16000
"""Frame length and sample rate of the contract."""
MAX_STREAMS = 256
ROUNDS_S = 8.0
"""Seconds of audio for finding out how many streams keep up."""


@dataclasses.dataclass(frozen=True)
class Task:
    """How to process the audio."""

    streams: int = 1
    chunks_per_call: int = 1
    seconds: float = 0.0
    """Seconds of audio to use, 0 for all."""


BACKLOG = 4
"""Chunks per call if all audio is available."""

STREAMS = (4, 16)
TOGETHER_S = 80.0
"""Seconds of audio in all streams of a pass together."""

USES = {
    "live": {"ours": Task(), "theirs": Task()},
    "file": {"ours": Task(chunks_per_call=BACKLOG), "theirs": Task()},
} | {f"{n} streams": dict.fromkeys(("ours", "theirs"), Task(n, 1, TOGETHER_S / n)) for n in STREAMS}
"""sherpa-onnx runs such models chunk by chunk; it batches streams in one call only for a Zipformer."""


class Run(NamedTuple):
    """One pass."""

    audio_s: float
    """Summed over all streams."""
    cpu_s: float
    rounds_s: list[float]
    """Wall time from the audio of a chunk of each stream to its text."""
    memory_mb: float
    """Peak memory of the process so far."""


class Row(NamedTuple):
    """How many times as fast the bundle is, in one kind of use."""

    name: str
    ours: float
    """CPU time per second of audio, the median."""
    theirs: float
    ratios: tuple[float, float, float]
    """Ratios of adjacent runs: the median, the smallest, the largest."""
    limit_share: float
    """The share of a core's peak arithmetic throughput that ours reaches."""


@dataclasses.dataclass(frozen=True)
class Duel:
    """All results that are printed."""

    rows: list[Row]
    round_ms: dict[str, tuple[float, float]]
    """p50 and p95 of one live stream, in wall time."""
    streams: dict[str, int]
    """How many streams keep up: 95 % of their rounds end before the next begins."""
    memory_mb: dict[str, float]


def duel(bundle: Bundle, folder: Path, sound: Path, chunk_ms: int, rounds: int) -> Iterator[str | Duel]:
    """Compare the two, yielding descriptions of each step, and finally the result.

    sound: samples at the bundle's rate as .npy. BundleError if `folder` has no such model, MissingExtra
    without sherpa-onnx.
    """
    check(bundle, folder, chunk_ms)
    left = bundle.info.stream.left_chunks
    arguments = [str(sound), str(chunk_ms), str(left)]
    models = {"ours": bundle.folder, "theirs": peer_model(bundle, folder)}
    with ExitStack() as stack:
        both = {who: stack.enter_context(worker(who, str(x), *arguments)) for who, x in models.items()}
        found = {}
        for name, tasks in USES.items():
            yield name
            runs = [{who: run(tasks[who]) for who, run in both.items()} for _ in range(rounds + 1)]
            found[name] = runs[1:]  # the first one warms up
        yield "streams that keep up"
        streams = {who: keep_up(run, chunk_ms / 1000) for who, run in both.items()}
    yield "the limit of the core"
    limit = multiply_adds(bundle) / peak(bundle.info.target)
    rows = [_row(name, runs, limit) for name, runs in found.items()]
    rounds_ms = {who: _percentiles([x[who] for x in found["live"]]) for who in both}
    memory = {who: found["live"][-1][who].memory_mb for who in both}
    yield Duel(rows, rounds_ms, streams, memory)


def _row(name: str, runs: Sequence[dict[str, Run]], limit: float) -> Row:
    ours, theirs = (np.array([x[who].cpu_s / x[who].audio_s for x in runs]) for who in ("ours", "theirs"))
    ratios = theirs / ours
    spread = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
    ours_s, theirs_s = float(np.median(ours)), float(np.median(theirs))
    return Row(name, round(ours_s, 5), round(theirs_s, 5), spread, round(limit / ours_s, 3))


def _percentiles(runs: Sequence[Run]) -> tuple[float, float]:
    times_ms = 1000 * np.concatenate([x.rounds_s for x in runs])
    median, high = np.percentile(times_ms, [50, 95])
    return round(float(median), 1), round(float(high), 1)


def keep_up(run: Callable[[Task], Run], chunk_s: float) -> int:
    """The most streams with 95 % of the rounds in time, to within an eighth."""

    def is_in_time(streams: int) -> bool:
        return float(np.percentile(run(Task(streams, 1, ROUNDS_S)).rounds_s, 95)) <= chunk_s

    good, bad = 0, 1
    while bad <= MAX_STREAMS and is_in_time(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(good // 8, 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_in_time(middle) else (good, middle)
    return good


def check(bundle: Bundle, folder: Path, chunk_ms: int) -> None:
    """Raise an error unless the two can be compared."""
    path = peer_model(bundle, folder)
    if chunk_ms % FRAME_MS:
        raise BundleError(f"a chunk of {chunk_ms} ms is not a multiple of {FRAME_MS} ms, its encoder frame")
    if path.parent.name == "zipformer" and (fixed_ms := fixed_chunk_ms(path)) != chunk_ms:
        raise BundleError(f"{path}: its chunk is {fixed_ms} ms, not {chunk_ms}; pass --chunk-ms {fixed_ms}")
    try:
        import sherpa_onnx  # noqa: F401
    except ImportError:
        raise MissingExtra("sherpa-onnx", "bench") from None


def peer_model(bundle: Bundle, folder: Path) -> Path:
    """The model file that is quantized like the bundle."""
    end = ".onnx" if bundle.info.target == "cpu-fp32" else ".int8.onnx"
    for name in RECOGNIZERS:
        if (path := folder / name / f"model{end}").exists():
            return path
    raise BundleError(f"{folder}: has no streaming model; write one with asr export --target sherpa-onnx")


def fixed_chunk_ms(path: Path) -> int:
    """The chunk of a `zipformer2_ctc` model."""
    metadata = {x.key: x.value for x in onnx.load(path).metadata_props}
    return 10 * int(metadata["decode_chunk_len"])


@contextmanager
def worker(*arguments: str) -> Iterator[Callable[[Task], Run]]:
    """A process that runs tasks. BundleError, with its last output, if it exits by itself."""
    core = min(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "export.peers", *arguments, str(core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
        )

        def run(task: Task) -> Run:
            assert process.stdin
            assert process.stdout
            try:
                process.stdin.write(json.dumps(dataclasses.asdict(task)) + "\n")
                process.stdin.flush()
                return Run(**json.loads(process.stdout.readline()))
            except (BrokenPipeError, ValueError):
                process.wait()
                said.seek(0)
                lines = said.read().strip().splitlines() or ["nothing said"]
                raise BundleError(f"{arguments[1]}: {arguments[0]} ended: {lines[-1]}") from None

        try:
            yield run
        finally:
            if process.stdin:
                process.stdin.close()
            process.wait()


def multiply_adds(bundle: Bundle) -> float:
    """Multiply-adds of the encoder's matrices per second of audio, from onnxruntime's profile of a stream."""
    info, scorer = bundle.info, OnnxScorer(bundle)
    context = stream_context(info, StreamConfig())
    num_frames = context.chunk * info.subsampling + info.overlap_frames
    shift, length = info.features.shift_samples, info.features.frame_samples
    inputs: dict[str, Any] = {name: np.array(getattr(context, name)) for name in info.context_inputs}
    inputs |= scorer.init_state(context)
    inputs |= {"window": np.zeros((1, (num_frames - 1) * shift + length), np.float32)}
    inputs |= {"num_frames": np.array([num_frames])}
    options = session_options(1)
    options.enable_profiling = True
    options.add_session_config_entry("session.disable_prepacking", "1")  # otherwise weights have no shape
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(bundle.folder / "encoder.onnx", options)
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    total = sum(_multiply_adds(event["args"]) for event in events if "args" in event)
    return total / (context.chunk * info.frame_s)


def _multiply_adds(event: dict[str, Any]) -> int:
    """Multiply-adds of a node: rows of its input, times the size of a two-dimensional matrix."""
    shapes = [next(iter(x.values())) for x in event.get("input_type_shape", ())]
    is_product = any(kind in event.get("op_name", "") for kind in ("MatMul", "Gemm"))
    if not is_product or len(shapes) < 2 or len(shapes[1]) != 2:
        return 0
    return math.prod(shapes[0][:-1]) * math.prod(shapes[1])


def peak(target: str, size: int = 1024, rounds: int = 12) -> float:
    """Multiply-adds per second of one core with one large matrix that stays in the cache: the best round."""
    rng = np.random.default_rng(0)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (size, size))
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (size, size))
    weight = onnx.numpy_helper.from_array(rng.standard_normal((size, size)).astype(np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "peak", [x], [y], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    if target != "cpu-fp32":
        from export.quantize import quantize

        model = quantize(model)
    session = ort.InferenceSession(model.SerializeToString(), session_options(1))
    inputs = {"x": rng.standard_normal((size, size)).astype(np.float32)}
    times = []
    for _ in range(rounds):
        started = time.process_time()
        session.run(None, inputs)
        times.append(time.process_time() - started)
    return size**3 / min(times)


def ours(folder: str, chunk_ms: int, left: int) -> Callable[[Floats, Task], list[float]]:
    bundle = Bundle.load(folder)

    def run(samples: Floats, task: Task) -> list[float]:
        config = StreamConfig(
            mode="ctc-greedy", chunk_ms=chunk_ms, left_chunks=left, chunks_per_call=task.chunks_per_call
        )
        batch = StreamBatch(bundle, config)
        streams = [batch.join() for _ in range(task.streams)]
        times = []
        for block in _blocks(
            samples, bundle.info.features.sample_rate * chunk_ms // 1000 * task.chunks_per_call
        ):
            started = time.perf_counter()
            batch.accept(dict.fromkeys(streams, block))
            times.append(time.perf_counter() - started)
        batch.finish(streams)
        return times

    return run


def wenet(path: str, tokens: str, chunk_ms: int, left: int) -> Any:
    import sherpa_onnx

    sizes = {"chunk_size": chunk_ms // FRAME_MS, "num_left_chunks": left}
    return sherpa_onnx.OnlineRecognizer.from_wenet_ctc(model=path, tokens=tokens, num_threads=1, **sizes)


def zipformer(path: str, tokens: str, chunk_ms: int, left: int) -> Any:
    """A recognizer whose chunk and left context are fixed in the graph."""
    import sherpa_onnx

    return sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(model=path, tokens=tokens, num_threads=1)


RECOGNIZERS: dict[str, Callable[[str, str, int, int], Any]] = {"streaming": wenet, "zipformer": zipformer}
"""Artefact of `export/sherpa.py` -> what loads it."""


def theirs(path: str, chunk_ms: int, left: int) -> Callable[[Floats, Task], list[float]]:
    make = RECOGNIZERS[Path(path).parent.name]
    recognizer = make(path, str(Path(path).parent / "tokens.txt"), chunk_ms, left)

    def run(samples: Floats, task: Task) -> list[float]:
        streams = [recognizer.create_stream() for _ in range(task.streams)]
        times = []
        for block in _blocks(samples, SAMPLE_RATE * chunk_ms // 1000):
            started = time.perf_counter()
            for stream in streams:
                stream.accept_waveform(SAMPLE_RATE, block)
            while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
                recognizer.decode_streams(ready)
            for stream in streams:
                recognizer.get_result(stream)
            times.append(time.perf_counter() - started)
        return times

    return run


def _blocks(samples: Floats, size: int) -> Iterator[Floats]:
    return (samples[start : start + size] for start in range(0, len(samples), size))


def main(arguments: Sequence[str]) -> None:
    kind, path, sound, chunk_ms, left, core = arguments
    os.sched_setaffinity(0, {int(core)})
    run = {"ours": ours, "theirs": theirs}[kind](path, int(chunk_ms), int(left))
    samples = np.load(sound)
    for line in sys.stdin:
        task = Task(**json.loads(line))
        part = samples[: int(task.seconds * SAMPLE_RATE) or None]
        started = time.process_time()
        times = run(part, task)
        spent = time.process_time() - started
        memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer: dict[str, Any] = Run(
            task.streams * len(part) / SAMPLE_RATE, spent, times, memory_mb
        )._asdict()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
