"""The origin of a converted model, in origin.json of its experiment: for `asr info`, and for its bundles."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from asr.errors import CheckpointError

FILE = "origin.json"
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Origin:
    """The origin of an experiment's weights."""

    family: str
    source: str
    """The source as given: a path, or the id on the hub with its revision."""

    licence: str
    """The licence as stated by the source or the user."""

    files: dict[str, str] = field(default_factory=dict)
    """Name -> SHA-256 of the files that were read."""

    notes: tuple[str, ...] = ()
    """What was changed in conversion."""

    asr: str = ""
    """The version that converted it."""

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_origin(experiment: Path) -> Origin | None:
    """The origin of an experiment; None if it was trained here. CheckpointError if the file is damaged."""
    file = experiment / FILE
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        origin = Origin(**{**found, "notes": tuple(found["notes"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged: {error}; convert the checkpoint again") from None
    return origin
