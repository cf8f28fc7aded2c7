"""SentencePiece models, and whether they cut text into the units of a tokens.txt.

Those of other toolkits have their pieces in another order, a few that no training text had, and more units
`<...>` besides them.
"""

import re
from collections.abc import Sequence
from typing import Any

from asr.errors import TokensError

LEAST_SHARE = 0.9
"""So many of its pieces are units, or it is another model: a large one has the pieces of a small one, too."""

WITHOUT_TEXT = 3
"""Pieces of nearly every model that text is not cut into: unknown, and the marks of start and end."""


def open_pieces(model: bytes, where: str) -> tuple[Any, list[str]]:
    """The processor of a SentencePiece model and its pieces; TokensError where it is none."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return processor, [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
    except (RuntimeError, UnicodeDecodeError) as error:
        raise TokensError(f"{where}: not a SentencePiece model ({error})") from None


def makes_units(pieces: Sequence[str], units: Sequence[str]) -> bool:
    """Whether texts cut into these pieces are spelt by these units: all but `<...>` are pieces, and nearly
    all pieces are among them."""
    plain = {unit for unit in units if not re.fullmatch("<.+>", unit)}
    known = plain.intersection(pieces)
    return known == plain and len(known) >= LEAST_SHARE * (len(pieces) - WITHOUT_TEXT)
