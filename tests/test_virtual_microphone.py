"""A microphone with its own clock: no test waits, and no audio has to arrive in real time."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from asr import microphone
from asr.errors import AudioError
from asr.microphone import Block, microphone_blocks
from asr.runtime import Bundle, StreamConfig
from asr.virtual_microphone import VirtualMicrophone
from export import latency
from export.latency import play, play_to_microphone
from export.verify import made_sound

SOUND = np.arange(1, 16001, dtype=np.float32) / 16000


class Machine:
    """A computer whose clock advances only when it is told to compute."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    def __call__(self) -> float:
        return self.time_s

    def compute(self, seconds: float) -> None:
        self.time_s += seconds


def listen(device: VirtualMicrophone, count: int, machine: Machine, cost_s: float = 0.0) -> list[Block]:
    """The first blocks of 100 ms, for a reader that takes cost_s for each."""
    got = []
    for block in islice(microphone_blocks(simulation=device), count):
        got.append(block)
        machine.compute(cost_s)
    return got


def test_blocks_come_at_their_end_and_silence_follows():
    machine = Machine()
    device = VirtualMicrophone(SOUND, 16000, machine)
    times = []
    heard = []
    for block in islice(microphone_blocks(simulation=device), 12):
        times.append(device.now())
        heard.append(block.samples)
        machine.compute(0.03)
    assert times == pytest.approx([0.1 * n for n in range(1, 13)])
    np.testing.assert_array_equal(np.concatenate(heard), np.pad(SOUND, (0, 3200)))


def test_a_reader_who_is_slow_falls_behind_and_what_it_loses_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(microphone, "QUEUE_S", 1.0)
    machine = Machine()
    got = listen(VirtualMicrophone(np.zeros(0), 16000, machine), 200, machine, cost_s=0.15)
    lags = [block.lag_s for block in got]
    assert lags[:10] == pytest.approx([0.05 * n for n in range(10)])
    assert max(lags) == pytest.approx(1.5, abs=0.16)  # at most what the queue holds
    lost_s = sum(block.lost_s for block in got)
    assert lost_s > 5
    assert sum(block.overflowed for block in got) == sum(block.lost_s > 0 for block in got) > 20
    # delivered, lost and still waiting samples add up to all of the audio
    said_s = 0.15 * 199 + 0.1
    assert said_s - 2 <= 0.1 * len(got) + lost_s <= said_s + 0.2


def test_a_moment_of_slowness_is_caught_up_without_a_loss():
    machine = Machine()
    device = VirtualMicrophone(SOUND, 16000, machine)
    blocks = microphone_blocks(simulation=device)
    first = next(blocks)
    machine.compute(2.0)
    rest = list(islice(blocks, 25))
    assert not any(block.overflowed for block in rest)
    assert [block.lag_s for block in rest[:3]] == pytest.approx([1.9, 1.8, 1.7])
    assert [block.lag_s for block in rest[20:]] == pytest.approx([0] * 5)
    np.testing.assert_array_equal(np.concatenate([x.samples for x in [first, *rest]])[:16000], SOUND)


def test_what_the_device_loses_is_told_with_the_next_block():
    machine = Machine()
    got = listen(VirtualMicrophone(SOUND, 16000, machine, lost_blocks=(3, 4)), 7, machine)
    assert [block.overflowed for block in got] == [False, False, False, True, False, False, False]
    assert got[3].samples[0] == SOUND[5 * 1600]


def test_a_device_that_is_pulled_out_is_an_error():
    machine = Machine()
    device = VirtualMicrophone(SOUND, 16000, machine, unplugged_s=0.45)
    blocks = microphone_blocks(simulation=device)
    assert len(list(islice(blocks, 4))) == 4
    with pytest.raises(AudioError, match="'virtual' has stopped; is it unplugged"):
        next(blocks)


def test_another_rate_is_resampled():
    machine = Machine()
    device = VirtualMicrophone(np.zeros(48000, np.float32), 48000, machine)
    assert sum(len(block.samples) for block in listen(device, 10, machine)) == pytest.approx(16000, abs=900)


# the lag of a bundle


@pytest.fixture(scope="module")
def bundle(tiny_bundles: Path) -> Bundle:
    return Bundle.load(tiny_bundles / "cpu-fp32")


CONFIG = StreamConfig(mode="ctc-greedy", chunk_ms=320)


def test_texts_are_shown_when_their_chunk_has_come_and_is_computed(bundle: Bundle):
    sound = made_sound(4.0, 16000)
    machine = Machine()
    told, blocks = play_to_microphone(bundle, sound, CONFIG, 100, timer=machine)
    assert all(text.elapsed_ms == pytest.approx(text.read_ms) for text in told)
    assert max(block.lag_s for block in blocks) == pytest.approx(0)
    # a text comes with the block that completes its chunk, at most one block later than without a microphone
    padded = np.pad(sound, (0, round(16000 * latency.SILENT_S)))
    early, _ = play(bundle, padded, CONFIG)
    for a, b in zip(told, early, strict=False):
        assert (a.text, a.final) == (b.text, b.final)
        assert 0 <= a.read_ms - b.read_ms <= 100
    assert len(told) > 5


def test_computing_makes_texts_later(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    sound = made_sound(4.0, 16000)
    expected, _ = play_to_microphone(bundle, sound, CONFIG, 100, timer=Machine())
    machine = Machine()
    open_stream = latency.open_stream

    def slow(*args: object) -> object:
        stream = open_stream(*args)
        accept = stream.accept
        stream.accept = lambda samples: (machine.compute(0.07), accept(samples))[1]
        return stream

    monkeypatch.setattr(latency, "open_stream", slow)
    told, _ = play_to_microphone(bundle, sound, CONFIG, 100, timer=machine)
    assert [text.text for text in told] == [text.text for text in expected]
    late = [a.elapsed_ms - b.elapsed_ms for a, b in zip(told, expected, strict=True)]
    assert late == pytest.approx([70] * len(late))
