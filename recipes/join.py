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
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
    neighbours: Annotated[
        int, typer.Option(help="join so many consecutive utterances, whoever speaks; 0: off")
    ] = 0,
) -> None:
    """Join short utterances of one speaker, each used once, in random order, with pauses.

    For test sets; in training, data.join_words does it anew each epoch. With --neighbours, turns the same
    speech into longer recordings, to test a model on minutes without a break.

    Example: asr join data/words_test.jsonl.gz -o data/manifests/test.jsonl.gz --words 1 8

    Example: asr join data/manifests/test.jsonl.gz -o data/manifests/test-x10.jsonl.gz --neighbours 10
    """
    import random

    from asr.data.cuts import join_cuts, join_neighbours, open_cuts, save_cuts

    rng, cuts = random.Random(seed), open_cuts(manifest)
    if neighbours:
        joined = list(join_neighbours(cuts, rng, neighbours, pause_s))
    else:
        joined = list(join_cuts(cuts, rng, words, pause_s, max_s))
    seconds = sum(cut.duration for cut in joined)
    count = save_cuts(joined, out)
    print(f"{out}: {count:,} utterances, {seconds / 60:.1f} min")
