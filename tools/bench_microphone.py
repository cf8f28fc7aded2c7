"""From the end of a word to its text on the screen, with a virtual microphone.

Utterances of a manifest are spoken to it one after another, and go the way of `asr transcribe --mic`: blocks,
queue, resampling, stream. Computing takes the time that it takes here; waiting for sound is not waited for.
Where words end, a forced alignment of the text says (docs/latency.md).

    python tools/bench_microphone.py BUNDLE data/manifests/test.jsonl.gz --chunk-ms 320 --utterances 50
"""

import argparse
import os
from pathlib import Path

from asr.latency import Delays, make_trace, summarise
from asr.runtime import Bundle, StreamConfig
from export.latency import play_to_microphone, read_spoken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--alignment", type=Path, help="bundle that aligns words with the audio")
    parser.add_argument("--mode", default="")
    parser.add_argument("--chunk-ms", type=int, nargs="*", default=[None])
    parser.add_argument(
        "--block-ms", type=int, default=100, help="length of the blocks that the device delivers"
    )
    parser.add_argument("--utterances", type=int, default=50)
    args = parser.parse_args()
    bundle = Bundle.load(args.bundle)
    spoken = read_spoken(args.manifest, args.utterances, Bundle.load(args.alignment or args.bundle))
    for chunk_ms in args.chunk_ms:
        config = StreamConfig(mode=args.mode, chunk_ms=chunk_ms)
        print(measure(bundle, spoken, config, args.block_ms), flush=True)


def measure(bundle: Bundle, spoken: list, config: StreamConfig, block_ms: int) -> str:
    """A line about one setting."""
    rate = bundle.info.features.sample_rate
    play_to_microphone(bundle, spoken[0].samples, config, block_ms)  # the first time is a warm-up
    traces, blocks = [], []
    for samples, words, ends_ms in spoken:
        told, heard = play_to_microphone(bundle, samples, config, block_ms)
        traces.append(make_trace(told, 1000 * len(samples) / rate, words, ends_ms))
        blocks += heard
    latency = summarise(traces)
    chunk_ms = config.chunk_ms or bundle.info.stream.chunk_ms
    lag_ms = 1000 * max(block.lag_s for block in blocks)
    lost = sum(block.overflowed for block in blocks)
    aware = latency.aware
    return (
        f"{bundle.folder.name}  {config.mode or 'own mode'}  chunk {chunk_ms} ms, "
        f"block {block_ms} ms: word {_told(aware.word)}, first {_told(aware.first_word)}, last "
        f"{_told(aware.last_word)} ms (p50 p95 p99) of {aware.word.count} words; reader {lag_ms:.0f} ms "
        f"behind at most, {lost} losses; WER {100 * latency.errors.rate:.2f} %; load {os.getloadavg()[0]:.1f}"
    )


def _told(delays: Delays) -> str:
    values = (delays.p50, delays.p95, delays.p99)
    return " ".join("-" if value is None else f"{value:.0f}" for value in values)


if __name__ == "__main__":
    main()
