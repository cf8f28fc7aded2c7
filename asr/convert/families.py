"""The families of public checkpoints that can be read: add one here."""

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
    """A pattern for a tensor name that no other family has."""

    files: tuple[str, ...]
    """Patterns of the files to fetch from a hub."""


FAMILIES: dict[str, Family] = {
    "icefall": Family(icefall.read, icefall.MARK, icefall.FILES),
    "wenet": Family(wenet.read, wenet.MARK, wenet.FILES),
    "nemo": Family(nemo_read.read, nemo_read.MARK, nemo_read.FILES),
    "whisper": Family(whisper.read, whisper.MARK, whisper.FILES),
    "firered": Family(firered.read, firered.MARK, firered.FILES),
}


def convert(family: str, source: Source) -> Converted:
    """The model of a source. Raises CheckpointError, ConfigError or TokensError, naming the family that the
    source looks like if it is another one."""
    try:
        return FAMILIES[family].read(source)
    except AsrError as error:
        seems, text = looks_like(source), str(error)
        if source.archive:
            text = text.replace(str(source.folder), source.label)
        hint = "" if seems in (None, family) else f"; it looks like {seems}: asr convert {seems}"
        raise CheckpointError(f"{text}{hint}") from None


def looks_like(source: Source) -> str | None:
    """The family that a source's tensor names belong to; None if that is unclear."""
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
    """All keys of a checkpoint, including those of nested mappings."""
    if not isinstance(found, dict):
        return []
    return [str(key) for key in found] + [
        str(key) for value in found.values() if isinstance(value, dict) for key in value
    ]
