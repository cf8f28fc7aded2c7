"""How the cost of a decoder's attention grows with recordings: encoder frames that its tokens hear.

python tools/count_attention.py EXPERIMENT MODE MANIFEST... [--limit 1]

A manifest for each length, as `asr join --neighbours` makes them. The last line is the slope of the line
through the logarithms of cost and length.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from lhotse.cut import Cut

from asr.context import Context
from asr.data.cuts import open_cuts, read_cut
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Floats, Ints, Step, Window
from asr.model.torch_scorer import Hypotheses, Memory, TorchScorer
from asr.train.checkpoint import load_model


class Counter(TorchScorer):
    """Counts the frames that `step` and `score` attend to, and their processor time."""

    heard = 0
    seconds = 0.0

    def step(self, state: Hypotheses, tokens: Ints, k: int, window: Window | None = None) -> Step:
        everything = state.memory.y_lens.numpy()[state.owner]
        lens = everything if window is None else window.end - window.start
        self.heard += int(lens.sum()) * (tokens.size // len(tokens))
        with self._timed():
            return super().step(state, tokens, k, window)

    def score(
        self,
        memory: Memory,
        owner: Ints,
        tokens: Sequence[Sequence[int]],
        reverse: bool = False,
        prompt: Sequence[int] = (),
    ) -> list[Floats]:
        self.heard += int(memory.y_lens.numpy()[owner] @ [len(x) for x in tokens])
        with self._timed():
            return super().score(memory, owner, tokens, reverse, prompt)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds += time.process_time() - start


def measure(
    scorer: Counter, mode: str, cuts: Iterable[Cut], search: SearchConfig, context: Context
) -> Floats:
    """Means per recording: its frames, frames attended to, tokens, seconds of the decoder, and in all."""
    rows = []
    for cut in cuts:
        scorer.heard, scorer.seconds = 0, 0.0
        start = time.process_time()
        (found,) = decode(scorer, mode, [read_cut(cut)], search, context)
        spent = time.process_time() - start
        frames = cut.duration / scorer.frame_s
        rows.append((frames, scorer.heard, len(found[0].tokens), scorer.seconds, spent))
    return np.mean(rows, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", type=Path)
    parser.add_argument("mode")
    parser.add_argument("manifests", type=Path, nargs="+")
    parser.add_argument("--chunk-ms", type=int, default=640)
    parser.add_argument("--left-chunks", type=int, default=4)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1, help="number of recordings per manifest")
    args = parser.parse_args()
    model, _, config = load_model(args.experiment)
    scorer = Counter(model, "cpu")
    context = Context(round(args.chunk_ms / 1000 / scorer.frame_s), args.left_chunks)
    search, rate = SearchConfig(beam=args.beam), config.features.sample_rate
    table = []
    for manifest in args.manifests:
        cuts = (cut.resample(rate) for cut in open_cuts(manifest).subset(first=args.limit))
        means = measure(scorer, args.mode, cuts, search, context)
        table.append(means)
        print(
            "{:24} {:7,.0f} frames  {:13,.0f} heard  {:6,.0f} tokens  decoder {:7.2f} s of {:7.2f} s".format(
                manifest.name, *means
            ),
            flush=True,
        )
    logs = np.log(table)
    heard, seconds = (np.polyfit(logs[:, 0], logs[:, column], 1)[0] for column in (1, 3))
    print(f"slope: {heard:.2f} of frames heard, {seconds:.2f} of the decoder's time")


if __name__ == "__main__":
    main()
