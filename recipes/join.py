"""`asr join`: short utterances of a speaker made into longer ones, for sets that must not change."""

from pathlib import Path
from typing import Annotated

import typer


def join(
    manifest: Annotated[Path, typer.Argument(help="utterances to join")],
    out: Annotated[Path, typer.Option("--out", "-o", help="manifest to write (.jsonl.gz)")],
    words: Annotated[tuple[int, int], typer.Option(help="fewest and most utterances in one")] = (1, 8),
    pause_s: Annotated[tuple[float, float], typer.Option(help="shortest and longest pause")] = (0.1, 0.4),
    max_s: Annotated[float, typer.Option(help="longest joined utterance, in seconds")] = 30.0,
    seed: Annotated[int, typer.Option(help="which go together, in which order")] = 0,
) -> None:
    """Join short utterances of one speaker, each used once, in random order, with pauses.

    For test sets; in training data.join_words does it anew each epoch.

    Example: asr join data/words_test.jsonl.gz -o data/manifests/test.jsonl.gz --words 1 8
    """
    import random

    from asr.data.cuts import join_cuts, open_cuts, save_cuts

    joined = join_cuts(open_cuts(manifest), random.Random(seed), words, pause_s, max_s)
    seconds = sum(cut.duration for cut in joined)
    count = save_cuts(joined, out)
    print(f"{out}: {count:,} utterances, {seconds / 60:.1f} min")
