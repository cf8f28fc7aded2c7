"""Options that several verbs have."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asr.errors import ConfigError

if TYPE_CHECKING:
    from asr.decode.config import SearchConfig
    from asr.runtime import StreamConfig

MODES = (
    "ctc-greedy, ctc-prefix, attention, unbounded, joint, rescore; with an attention decoder that writes as "
    "frames arrive: alignatt, edatt, triggered; for models with such a decoder: segmental, segmental-simple, "
    "segmental-label, chunked, whisper; if not given: ctc-prefix, or attention without a CTC head"
)

Mode = Annotated[str, typer.Option(help=MODES)]

Modes = Annotated[
    list[str] | None, typer.Option(help=f"{MODES}; several with --latency  [default: ctc-prefix]")
]

Search = Annotated[
    list[str] | None,
    typer.Option(help="a field of asr/decode/config.py, as in margin_frames=8; may be repeated"),
]


def search_config(settings: Sequence[str] | None, **given: Any) -> SearchConfig:
    """The given fields, overridden by settings NAME=VALUE. Raises ConfigError."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from asr.decode.config import SearchConfig

    names = [x.name for x in fields(SearchConfig)]
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals or name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}=...?" if near else f"fields are {', '.join(names)}"
            raise ConfigError(f"--search {setting}: expected a field and a value; {hint}")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--search {setting}: {value} is not a valid value") from None
    try:
        return TypeAdapter(SearchConfig).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--search {where}={first['input']}: {first['msg'].lower()}") from None


def stream_config(
    mode: str, chunk_ms: int, left_chunks: int, look_ahead: int = 0, search: Sequence[str] | None = None
) -> StreamConfig:
    """The options of a stream; a chunk of 0 ms and -1 left chunks stand for the bundle's defaults."""
    from asr.runtime import StreamConfig

    if left_chunks < -1:
        raise ConfigError(f"--left-chunks {left_chunks}: expected 0 or more, or -1 for the bundle's own")
    left = left_chunks if left_chunks >= 0 else None
    return StreamConfig(
        mode=mode,
        chunk_ms=chunk_ms or None,
        left_chunks=left,
        look_ahead=look_ahead,
        search=search_config(search),
    )
