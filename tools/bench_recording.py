"""A long recording against the utterances it is joined from: word error rate, speed, memory.

The utterances of a manifest, joined with so much silence between them, are transcribed in three ways: each
by itself, the recording cut at pauses (`asr transcribe --vad`), and the recording as one stream.

    python tools/bench_recording.py BUNDLE data/manifests/test.jsonl.gz --mode rescore --silence 0.5 --hours 3

--hours: the recording is repeated until it is so long (then for speed and memory alone).
"""

import argparse
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.modes import decode, mode_of
from asr.decode.scorer import Floats
from asr.runtime import Bundle, Event, StreamConfig, open_stream
from asr.runtime.cutter import CutConfig
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.recording import Recording, RecordingConfig
from asr.wer import NOTHING, align, count_errors, words
from export.verify import Utterance, read_utterances


def apart(bundle: Bundle, mode: str, utterances: Sequence[Utterance]) -> list[str]:
    """The texts of the utterances, each decoded by itself."""
    scorer = OnnxScorer(bundle)
    found = [decode(scorer, mode_of(scorer, mode), [x.samples], SearchConfig())[0][0] for x in utterances]
    return [bundle.tokenizer.decode(x.tokens) for x in found]


def in_pieces(bundle: Bundle, mode: str, blocks: Iterator[Floats], max_s: float) -> list[str]:
    recording = Recording(bundle, RecordingConfig(mode=mode, cut=CutConfig(max_s=max_s)))
    return [event.text for batch in recording.batches(blocks) for event in batch.events]


def as_stream(bundle: Bundle, mode: str, blocks: Iterator[Floats]) -> list[str]:
    stream = open_stream(bundle, StreamConfig(mode=mode, chunks_per_call=4))
    events: list[Event] = [event for block in blocks for event in stream.accept(block)]
    return [event.text for event in events + stream.finish() if event.final]


def joined(utterances: Sequence[Utterance], silence_s: float, rate: int, hours: float) -> Iterator[Floats]:
    """The recording, one block per utterance; the silence is faint noise."""
    random, seconds = np.random.default_rng(0), 0.0
    while True:
        for x in utterances:
            noise = random.normal(0, 1e-4, round(silence_s * rate)).astype(np.float32)
            block = np.concatenate([x.samples, noise])
            seconds += len(block) / rate
            yield block
        if seconds >= 3600 * hours:
            return


def report(name: str, refs: Sequence[str], hyps: Sequence[str], cpu_s: float, audio_s: float) -> None:
    pairs = align(words(" ".join(refs)), words(" ".join(hyps)))
    errors, peak_mb = count_errors(pairs), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    lost = sum(a or b for a, b in _border_deletions(refs, pairs))
    print(
        f"{name:<8} WER {100 * errors.rate:6.2f} %  {errors.ref:,} words: {errors.ins:,} ins, "
        f"{errors.dels:,} del, {errors.subs:,} sub; first or last word deleted in {lost} of {len(refs)}; "
        f"RTF {cpu_s / audio_s:.4f} (processor), {peak_mb:.0f} MB at most so far",
        flush=True,
    )


def _border_deletions(refs: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[bool, bool]]:
    """Whether the first and the last word of each utterance were left out."""
    hyps = [hyp for ref, hyp in pairs if ref != NOTHING]
    start = 0
    for ref in refs:
        end = start + len(words(ref))
        yield hyps[start] == NOTHING, hyps[end - 1] == NOTHING
        start = end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--mode", default="")
    parser.add_argument("--silence", type=float, default=0.5, help="seconds between two utterances")
    parser.add_argument("--max-s", type=float, default=CutConfig().max_s, help="longest piece, in seconds")
    parser.add_argument("--utterances", type=int, default=10_000, help="number of utterances, at most")
    parser.add_argument("--hours", type=float, default=0.0)
    args = parser.parse_args()
    bundle = Bundle.load(args.bundle)
    rate = bundle.info.features.sample_rate
    utterances = read_utterances(args.manifest, args.utterances, rate)
    refs = [x.text for x in utterances]
    print(f"{len(refs)} utterances, {sum(len(x.samples) for x in utterances) / rate / 60:.1f} min")

    def blocks(hours: float = 0.0) -> Iterator[Floats]:
        return joined(utterances, args.silence, rate, hours)

    audio_s = sum(map(len, blocks())) / rate
    for name, way in {
        "pieces": lambda: in_pieces(bundle, args.mode, blocks(), args.max_s),
        "stream": lambda: as_stream(bundle, args.mode, blocks()),
        "apart": lambda: apart(bundle, args.mode, utterances),
    }.items():
        before_s = time.process_time()
        report(name, refs, way(), time.process_time() - before_s, audio_s)
    if args.hours:
        before_s = time.process_time()
        in_pieces(bundle, args.mode, blocks(args.hours), args.max_s)
        rtf = (time.process_time() - before_s) / 3600 / args.hours
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"{args.hours:g} h  RTF {rtf:.4f} (processor), {peak_mb:.0f} MB at most")


if __name__ == "__main__":
    main()
