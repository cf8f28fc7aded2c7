"""`asr average`: the average of the last checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from asr.errors import CheckpointError, ConfigError


def average(
    exp: Annotated[Path, typer.Argument(help="folder of the experiment")],
    last: Annotated[int, typer.Option(help="how many of the last checkpoints")] = 10,
    steps: Annotated[str, typer.Option(help="average these steps instead, as in 8000,9000,10000")] = "",
) -> None:
    """Average the weights of checkpoints, usually better than any of them, into EXP/average.safetensors.

    Example: asr average exp/conformer-s --last 10
    """
    from asr.train.checkpoint import average_checkpoints, checkpoints, folder_of, path_of

    if last < 1:
        raise ConfigError(f"--last {last}: expected at least 1")
    chosen = [path_of(exp, _step(text)) for text in steps.split(",")] if steps else checkpoints(exp)[-last:]
    if not chosen:
        raise CheckpointError(f"{folder_of(exp)}: no checkpoint to average; train first")
    file = average_checkpoints(exp, chosen)
    print(f"{file}: mean of {len(chosen)}, {chosen[0].name} to {chosen[-1].name}")


def _step(text: str) -> int:
    if not text.strip().isdigit():
        raise ConfigError(f"--steps: {text!r} is not a number of steps, as in 8000,9000")
    return int(text)
