"""Which public checkpoints can be read: add a family here."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from asr.convert import firered, icefall, nemo_read, wenet, whisper
from asr.convert.converted import Converted
from asr.convert.source import Source
from asr.convert.tensors import read_checkpoint
from asr.errors import AsrError, CheckpointError

WEIGHTS = ("*.nemo", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.pth.tar", "*.bin")


class Family(NamedTuple):
    """One toolkit's checkpoints."""

    read: Callable[[Source], Converted]

    mark: str
    """A pattern of a tensor's name that no other family has."""

    files: tuple[str, ...]
    """Patterns of what is fetched from a hub."""


FAMILIES: dict[str, Family] = {
    "icefall": Family(icefall.read, icefall.MARK, icefall.FILES),
    "wenet": Family(wenet.read, wenet.MARK, wenet.FILES),
    "nemo": Family(nemo_read.read, nemo_read.MARK, nemo_read.FILES),
    "whisper": Family(whisper.read, whisper.MARK, whisper.FILES),
    "firered": Family(firered.read, firered.MARK, firered.FILES),
}


def convert(family: str, source: Source) -> Converted:
    """The model of a source. Raises CheckpointError, ConfigError or TokensError, and says which family the
    source looks like where it is another."""
    try:
        return FAMILIES[family].read(source)
    except AsrError as error:
        seems, text = looks_like(source), str(error)
        if source.archive:
            text = text.replace(str(source.folder), source.label)
        hint = "" if seems in (None, family) else f"; it looks like {seems}: asr convert {seems}"
        raise CheckpointError(f"{text}{hint}") from None


def looks_like(source: Source) -> str | None:
    """The family that the names of a source's tensors belong to; None where that cannot be said."""
    files = [source.main] if source.main else _weights(source.folder)
    for file in files:
        try:
            found = read_checkpoint(file)
        except AsrError:
            continue
        names = _names(found)
        for family, (_, mark, _) in FAMILIES.items():
            if any(re.search(mark, name) for name in names):
                return family
    return None


def _weights(folder: Path) -> list[Path]:
    found = [path for pattern in WEIGHTS for path in sorted(folder.rglob(pattern)) if path.is_file()]
    return list(dict.fromkeys(found))[:8]


def _names(found: object) -> list[str]:
    """All keys of a checkpoint, and of the mappings in it."""
    if not isinstance(found, dict):
        return []
    return [str(key) for key in found] + [
        str(key) for value in found.values() if isinstance(value, dict) for key in value
    ]
