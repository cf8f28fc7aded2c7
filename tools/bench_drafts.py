"""How much faster the attention decoder writes a text when CTC drafts it, and whether it is the same text.

    python tools/bench_drafts.py BUNDLE MANIFEST [--limit 60]

Utterance by utterance, a beam of 1: token by token (asr/decode/joint.py), and checking drafts
(asr/decode/speculative.py), by turns. Processor time and calls of the decoder from the encoder's output on;
the ratio of all time, and the median of those of utterances with the middle half of them.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from asr.data.cuts import open_cuts, read_cut
from asr.decode import joint, speculative
from asr.decode.config import SearchConfig
from asr.decode.scorer import Floats, Hypothesis, Ints, Step, Window
from asr.runtime import Bundle
from asr.runtime.onnx_scorer import OnnxScorer

SEARCHES = {"token by token": joint.search, "from drafts": speculative.greedy}
GREEDY = SearchConfig(beam=1, ctc_weight=0)


class Counter(OnnxScorer):
    """Counts calls of the decoder."""

    calls = 0

    def step(self, state: Any, tokens: Ints, k: int, window: Window | None = None) -> Step:
        self.calls += 1
        return super().step(state, tokens, k, window)

    def steps(self, state: Any, tokens: Ints, k: int) -> Step:
        self.calls += 1
        return super().steps(state, tokens, k)


def timed(
    search: Callable[..., list[list[Hypothesis]]], scorer: Counter, log_probs: list[Floats], memory: Any
) -> tuple[float, int, tuple[int, ...]]:
    """Seconds of the processor, calls, tokens."""
    scorer.calls, start = 0, time.process_time()
    tokens = search(scorer, log_probs, memory, GREEDY)[0][0].tokens
    return time.process_time() - start, scorer.calls, tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--limit", type=int, default=60, help="number of utterances")
    args = parser.parse_args()
    scorer = Counter(Bundle.load(args.bundle))
    rate = scorer.bundle.info.features.sample_rate
    cuts = list(open_cuts(args.manifest).subset(first=args.limit))
    found: dict[str, list[tuple[float, int, tuple[int, ...]]]] = {name: [] for name in SEARCHES}
    for cut in track([cuts[0], *cuts], description="by turns"):  # the first one warms up
        log_probs, memory = scorer.encode([read_cut(cut.resample(rate))])
        for name, search in SEARCHES.items():
            found[name].append(timed(search, scorer, log_probs, memory))
    rows = {
        name: [np.array(column) for column in list(zip(*x[1:], strict=True))[:2]] for name, x in found.items()
    }
    for name, (seconds, calls) in rows.items():
        print(f"{name:16} {1000 * seconds.mean():8.2f} ms  {calls.mean():6.2f} calls  an utterance")
    (before, _), (after, _) = rows.values()
    quarter, median, rest = np.percentile(before / after, [25, 50, 75])
    texts = [[tokens for *_, tokens in x[1:]] for x in found.values()]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    print(
        f"{before.sum() / after.sum():.2f} times as fast, median {median:.2f} [{quarter:.2f} .. {rest:.2f}]"
    )
    print(f"the same tokens in {same} of {len(cuts)}, {np.mean([len(x) for x in texts[0]]):.1f} an utterance")


if __name__ == "__main__":
    main()
