"""`asr train`: train a model, or resume where it stopped."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

UNFINISHED = 75
"""EX_TEMPFAIL of sysexits.h, which schedulers treat as "try again"."""


def train(
    config: Annotated[list[Path], typer.Option(help="YAML file; later ones override earlier ones")],
    exp: Annotated[Path, typer.Option(help="folder of the experiment, created if missing")],
    set: Annotated[list[str], typer.Option(help="one field, as in optim.lr=1e-3; overrides the files")] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train a model, or resume from the last checkpoint in the folder of the experiment.

    On SIGTERM, SIGINT or SIGUSR1, finishes the current step, saves a checkpoint and exits with 75: not done,
    run it again. A second signal ends it at once.

    Example: asr train --config conf/train.yaml --config recipes/conf/conformer-s.yaml --exp exp/conformer-s

    Example: torchrun --nproc-per-node 8 -m recipes.cli train --config A.yaml --config B.yaml --exp exp/NAME
    """
    # oneDNN caches a thousand kernels, one per shape: a gigabyte, although hardly any two batches share one
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    from asr.config import load_config
    from asr.train.distributed import device_of
    from asr.train.loop import train as run
    from asr.train.loop import why_done

    loaded = load_config(config, set)
    progress = run(
        loaded,
        exp,
        device_of(device),
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    if not why_done(progress, loaded):
        raise typer.Exit(UNFINISHED)  # so that a recipe does not continue with a half-trained model
