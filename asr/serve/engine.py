"""The model, shared by all clients: one thread runs it, in calls that streams share as their audio comes in.

A client waits for the text of what it sent before it sends more. So nothing queues up in here, a client that
sends too fast is slowed down by its own connection, and no client gets more than a block per call.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np

from asr.audio import Floats
from asr.runtime import Bundle, Event, Stream, StreamConfig, WholeStream, WindowStream, open_stream
from asr.runtime.stream import accept_all, check_samples, finish_all

BLOCK_S = 1.0
"""Audio of one stream per call at most, so that a backlog does not hold up those who speak."""

AnyStream = Stream | WholeStream | WindowStream


@dataclass(frozen=True)
class _Job:
    """The next samples of a stream, or none after the last; and who waits for the events."""

    stream: AnyStream
    samples: Floats | None
    events: asyncio.Future[list[Event] | Exception]


class Engine:
    """Streams of one bundle. All methods belong to one event loop; `run` must be running."""

    def __init__(self, bundle: Bundle, config: StreamConfig) -> None:
        self.bundle, self.config = bundle, config
        self.num_streams = 0
        self.audio_s = 0.0
        """Seconds of audio of all streams so far."""
        self._thread = ThreadPoolExecutor(1, "model")
        self._jobs: list[_Job] = []
        self._is_due = asyncio.Event()

    async def run(self) -> None:
        """Serve streams until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            jobs, self._jobs = self._jobs, []
            results: Sequence[list[Event] | Exception]
            try:
                results = await loop.run_in_executor(self._thread, _do, jobs)
            except Exception as error:  # else all clients would wait for ever
                results = [error] * len(jobs)
            for job, result in zip(jobs, results, strict=True):
                if not job.events.done():  # else the client has gone
                    job.events.set_result(result)

    async def warm_up(self) -> None:
        """Run the model once, so that no client waits for its graphs. Raises BundleError or ConfigError."""
        async with self.stream() as stream:
            await stream.accept(np.zeros(stream.sample_rate, np.float32))
            await stream.finish()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator["ServedStream"]:
        """A new stream, until the block is left."""
        self.num_streams += 1
        try:
            yield ServedStream(self, self.config, await self.open(self.config))
        finally:
            self.num_streams -= 1

    async def open(self, config: StreamConfig) -> AnyStream:
        """A new stream of the bundle. Raises ConfigError or BundleError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, open_stream, self.bundle, config)

    async def do(self, stream: AnyStream, samples: Floats | None) -> list[Event]:
        """The events of a stream's next samples, or of its end."""
        events: asyncio.Future[list[Event] | Exception] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(stream, samples, events))
        self._is_due.set()
        result = await events
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=True)


class ServedStream:
    """`asr.runtime.Stream` for a client: the same, but it waits its turn, and may begin anew.

    Times count from its first sample, also after that.
    """

    def __init__(self, engine: Engine, config: StreamConfig, stream: AnyStream) -> None:
        self._engine, self._config, self._stream = engine, config, stream
        self._num_samples = self._num_before = 0
        """Of the present stream, and of those that have ended."""
        self.sample_rate = engine.bundle.info.features.sample_rate

    @property
    def duration_s(self) -> float:
        """Seconds of audio accepted since the start, or since `restart`."""
        return self._num_samples / self.sample_rate

    async def accept(self, samples: Floats) -> list[Event]:
        """Take samples (S,), float32 in [-1, 1] at the bundle's sample rate. AudioError for NaN, infinity."""
        samples = check_samples(samples, self._num_samples, finished=False)
        self._num_samples += len(samples)
        self._engine.audio_s += len(samples) / self.sample_rate
        size = round(BLOCK_S * self.sample_rate)
        events: list[Event] = []
        for start in range(0, len(samples), size):
            events += await self._do(samples[start : start + size])
        return events

    async def finish(self) -> list[Event]:
        """End the stream: the events of the audio not yet encoded, and the last final one."""
        return await self._do(None)

    async def restart(self, config: StreamConfig | None = None) -> list[Event]:
        """`finish`, and begin another; with another configuration only if streams do not share calls."""
        events = await self.finish()
        self._config = config or self._config
        self._stream = await self._engine.open(self._config)
        self._num_before, self._num_samples = self._num_before + self._num_samples, 0
        return events

    async def _do(self, samples: Floats | None) -> list[Event]:
        begin_s = self._num_before / self.sample_rate
        return [_later(event, begin_s) for event in await self._engine.do(self._stream, samples)]


def _later(event: Event, by_s: float) -> Event:
    words = tuple(x._replace(start_s=x.start_s + by_s, end_s=x.end_s + by_s) for x in event.words)
    return replace(event, start_s=event.start_s + by_s, end_s=event.end_s + by_s, words=words)


def _do(jobs: Sequence[_Job]) -> list[list[Event] | Exception]:
    """The events of each job, or what went wrong with it."""
    results: dict[AnyStream, list[Event] | Exception] = {}
    for is_last in (False, True):
        some = [job for job in jobs if (job.samples is None) == is_last]
        results.update(_do_together({x.stream: x.samples for x in some if isinstance(x.stream, Stream)}))
        for job in some:
            if not isinstance(job.stream, Stream):
                results[job.stream] = _do_alone(job.stream, job.samples)
    return [results[job.stream] for job in jobs]


def _do_together(blocks: dict[Stream, Floats | None]) -> dict[AnyStream, list[Event] | Exception]:
    """Streams that share the calls of the encoder; all have a block, or none has."""
    streams = list(blocks)
    samples = [block for block in blocks.values() if block is not None]
    try:
        events = accept_all(streams, samples) if samples else finish_all(streams)
    except Exception as error:
        return dict.fromkeys(streams, error)
    return {stream: stream.failure or told for stream, told in zip(streams, events, strict=True)}


def _do_alone(stream: WholeStream | WindowStream, samples: Floats | None) -> list[Event] | Exception:
    try:
        return stream.finish() if samples is None else stream.accept(samples)
    except Exception as error:
        return error
