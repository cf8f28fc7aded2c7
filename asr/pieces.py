"""SentencePiece models, and whether they match the units of a tokens.txt.

In other toolkits, tokens.txt may order the pieces differently, leave out a few that no training text has, and
have more units `<...>` besides them.
"""

import re
from collections.abc import Sequence
from typing import Any

from asr.errors import TokensError

LEAST_SHARE = 0.9
"""The least share of pieces that must be units: a larger model also has the pieces of a smaller one."""

WITHOUT_TEXT = 3
"""Pieces of nearly every model that never occur in text: unknown, start and end."""


def open_pieces(model: bytes, where: str) -> tuple[Any, list[str]]:
    """The processor of a SentencePiece model and its pieces; TokensError if it is not such a model."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return processor, [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
    except (RuntimeError, UnicodeDecodeError) as error:
        raise TokensError(f"{where}: not a SentencePiece model ({error})") from None


def makes_units(pieces: Sequence[str], units: Sequence[str]) -> bool:
    """Whether these units can spell texts cut into these pieces: all units but `<...>` are pieces, and nearly
    all pieces are units."""
    plain = {unit for unit in units if not re.fullmatch("<.+>", unit)}
    known = plain.intersection(pieces)
    return known == plain and len(known) >= LEAST_SHARE * (len(pieces) - WITHOUT_TEXT)
