"""`asr convert`: turn a public checkpoint into an experiment that every other verb can use."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from asr.convert.converted import Converted
    from asr.convert.origin import Origin
    from asr.convert.source import Source


def convert(
    family: Annotated[str, typer.Argument(help="icefall, wenet, nemo, whisper or firered")],
    source: Annotated[
        str, typer.Argument(help="folder, file or archive; or OWNER/NAME on the Hugging Face hub")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="experiment to write, a new folder")],
    licence: Annotated[str, typer.Option(help="licence of the weights, if the source states none")] = "",
) -> None:
    """Turn a public checkpoint into an experiment: config.yaml, tokens, average.safetensors, origin.json.

    Reads tensors only. Refuses checkpoints that contain code, and those that our models cannot represent
    exactly. docs/convert.md says what each family needs.

    Example: asr convert wenet 20210601_u2++_conformer_exp.tar.gz -o exp/aishell
    """
    from asr.convert.families import FAMILIES
    from asr.convert.families import convert as read

    if family not in FAMILIES:
        raise ConfigError(f"{family}: no such family; expected one of {', '.join(FAMILIES)}")
    check_out(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        opened = _open(source, family, Path(scratch))
        converted = read(family, opened)
        origin = _origin(family, opened, converted, licence)
        folder = Path(scratch) / "experiment"
        try:
            write_experiment(folder, converted, origin)
            if out.exists():
                out.rmdir()
            folder.rename(out)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), str(out))) from None
        except OSError as error:  # without a file name if the disk is full
            reason = (error.strerror or str(error)).lower()
            raise ConfigError(f"{out}: cannot be written: {reason}; nothing is kept") from None
    _report(out, converted, origin)


def check_out(out: Path) -> None:
    """Raise ConfigError unless a new experiment can be written to `out`."""
    if out.name in ("", ".."):
        raise ConfigError(f"{out}: expected the name of a new folder; choose one with -o")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"{out}: exists; choose a new folder with -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out.parent}: {(error.strerror or str(error)).lower()}") from None


def write_experiment(folder: Path, converted: Converted, origin: Origin) -> None:
    """Write a folder that `load_model` opens."""
    from asr.config import save_config
    from asr.convert.origin import FILE
    from asr.tokens import write_tokens
    from asr.train.checkpoint import describe, write_average

    write_tokens(folder / "tokens", *converted.tokens)
    save_config(converted.config, folder / "config.yaml")
    about = describe(converted.config, folder / "tokens", {})
    write_average(folder, converted.model.state_dict(), about, [origin.source])
    (folder / FILE).write_text(origin.text(), encoding="utf-8")


def _open(source: str, family: str, scratch: Path) -> Source:
    from asr.convert.families import FAMILIES
    from asr.convert.hub import fetch, is_hub_id
    from asr.convert.source import open_source

    if not is_hub_id(source):
        return open_source(Path(source), scratch)
    folder, label = fetch(source, FAMILIES[family].files)
    return open_source(folder, scratch, label)


def _origin(family: str, source: Source, converted: Converted, licence: str) -> Origin:
    from asr import __version__
    from asr.convert.origin import NOT_STATED, Origin

    stated = licence or source.licence() or NOT_STATED
    return Origin(family, source.label, stated, source.hashes(), converted.notes, __version__)


def _report(out: Path, converted: Converted, origin: Origin) -> None:
    config, total = converted.config, sum(p.numel() for p in converted.model.parameters())
    print(f"{'encoder':<14}{config.encoder.type}, {total / 1e6:.2f} M parameters in all")
    print(f"{'units':<14}{len(converted.tokens.symbols):,}")
    print(f"{'licence':<14}{origin.licence}")
    for note in converted.notes:
        print(f"{'note':<14}{note}")
    print(f"{out}/ written, from {origin.family} {origin.source}")
