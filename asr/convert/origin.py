"""Where a converted model is from, in origin.json of its experiment: for `asr info`, and for its bundles."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from asr.errors import CheckpointError

FILE = "origin.json"
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Origin:
    """Of the weights of an experiment."""

    family: str
    source: str
    """As it was named: a path, or the id on the hub with its revision."""

    licence: str
    """As the source or the user states it."""

    files: dict[str, str] = field(default_factory=dict)
    """Name -> SHA-256 of those that were read."""

    notes: tuple[str, ...] = ()
    """What was changed on the way."""

    asr: str = ""
    """The version that converted it."""

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_origin(experiment: Path) -> Origin | None:
    """The origin of an experiment; None where it was trained here. CheckpointError where it is damaged."""
    file = experiment / FILE
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        origin = Origin(**{**found, "notes": tuple(found["notes"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: damaged: {error}; convert the checkpoint again") from None
    return origin
