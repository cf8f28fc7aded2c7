"""`asr heads`: find the decoder's attention heads that follow the alignment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.errors import ConfigError, ManifestError

if TYPE_CHECKING:
    from asr.train.heads import Agreement

SHOWN = 10


def heads(
    exp: Annotated[Path, typer.Argument(help="folder of the experiment")],
    manifest: Annotated[Path, typer.Argument(help="utterances with text, of a dev set")],
    utterances: Annotated[int, typer.Option(help="how many of them, from the start")] = 100,
    checkpoint: Annotated[str, typer.Option(help="average, latest, best, ema, or a path")] = "average",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Find the cross-attention heads of the decoder that agree best with the CTC alignment of the text.

    Writes EXP/heads.json, which guides modes alignatt and edatt from then on; export a bundle afterwards.
    Prints the best heads, with their mean distance from the frames of a token, in encoder frames, and the
    share of tokens within two frames.

    Example: asr heads exp/conformer-s data/manifests/corpus_dev.jsonl.gz
    """
    import torch

    from asr.train.checkpoint import load_model
    from asr.train.distributed import device_of
    from asr.train.heads import hear, save_guide, search
    from export.verify import read_utterances

    if utterances < 1:
        raise ConfigError(f"--utterances {utterances}: expected at least 1")
    where = device_of(device)
    model, tokenizer, config = load_model(exp, checkpoint, where)
    if config.decoder.type != "transformer":
        raise ConfigError(
            f"{exp}: its decoder is of type {config.decoder.type}, which attends to windows; "
            "heads guide a decoder that attends to every frame"
        )
    read = read_utterances(manifest, utterances, config.features.sample_rate)
    all_ = [hear(model, torch.from_numpy(x.samples).to(where), tokenizer.encode(x.text)) for x in read]
    heard = [x for x in all_ if x is not None]
    if not heard:
        raise ManifestError(f"{manifest}: no utterance has a text and enough frames for it")
    found = search(model, heard)
    _print(found)
    num_tokens = sum(len(x.tokens) for x in heard)
    file = save_guide(exp, found[0], num_tokens)
    print(f"{file}: layer {found[0].guide.layer}, {_heads(found[0])}, of {num_tokens:,} tokens")


def _print(found: list[Agreement]) -> None:
    print("layer  distance  within 2  heads")
    for x in found[:SHOWN]:
        print(f"{x.guide.layer:5}  {x.distance_frames:8.2f}  {100 * x.near:6.1f} %  {_heads(x)}")


def _heads(found: Agreement) -> str:
    names = ", ".join(map(str, found.guide.heads))
    return f"mean of heads {names}" if len(found.guide.heads) > 1 else f"head {names}"
