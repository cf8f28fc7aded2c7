"""The symbols of a public checkpoint's units, in the format of our tokens.txt."""

from collections import Counter
from collections.abc import Iterator, Sequence

from asr.convert.names import MADE_UP, Units
from asr.convert.source import Source
from asr.errors import CheckpointError
from asr.pieces import makes_units, open_pieces
from asr.tokens import SPACE, SPECIAL, TWIN


def read_units(text: str, where: str) -> list[str]:
    """Lines `symbol id`, in any order, as several toolkits write them -> symbols in the order of ids.

    Raises CheckpointError with the number of an invalid line.
    """
    symbols: dict[int, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        symbol, _, i = line.rstrip(" \t\r").rpartition(" ")
        if not (i.isascii() and i.isdigit() and len(i) < 8) or int(i) in symbols:
            raise CheckpointError(f"{where}:{number}: {line[:40]!r}, expected a unit and an id of its own")
        symbols[int(i)] = symbol.rstrip(" \t") or SPACE
    if sorted(symbols) != list(range(len(symbols))):
        gap = next(i for i in range(len(symbols)) if i not in symbols)
        raise CheckpointError(f"{where}: no unit has id {gap}; ids must be 0, 1, 2, ... without a gap")
    return [symbols[i] for i in range(len(symbols))]


def find_unit(theirs: Sequence[str], where: str, *names: str) -> int:
    """The id of the first of some names that is a unit; CheckpointError if none is."""
    if (found := maybe_unit(theirs, *names)) == MADE_UP:
        raise CheckpointError(f"{where}: no unit {' or '.join(names)} among {len(theirs)}")
    return found


def maybe_unit(theirs: Sequence[str], *names: str) -> int:
    """The id of the first of some names that is a unit, or MADE_UP."""
    return next((theirs.index(name) for name in names if name in theirs), MADE_UP)


def our_symbols(theirs: Sequence[str], units: Units, where: str) -> list[str]:
    """The symbol of each of our units; CheckpointError if tokens.txt cannot represent them."""
    kept = [theirs[i].replace(" ", SPACE) if i != MADE_UP else "" for i in units.outputs]
    symbols = [*SPECIAL, *kept[len(SPECIAL) :]]
    for problem in _problems(symbols):
        raise CheckpointError(f"{where}: {problem}")
    return symbols


def tell_apart(theirs: Sequence[str]) -> list[str]:
    """Units of several inventories, with marks appended to equal ones so that all differ."""
    seen: Counter[str] = Counter()
    found = []
    for symbol in theirs:
        found.append(symbol + TWIN * seen[symbol])
        seen[symbol] += 1
    return found


def splitter(source: Source, symbols: Sequence[str], *names: str) -> bytes | None:
    """The SentencePiece model of a source that splits text into these units; None if there is none, or if it
    makes other units. Units can then be decoded but not encoded."""
    if not (file := source.maybe(*names)):
        return None
    model = source.data(file)
    _, pieces = open_pieces(model, str(file))
    return model if makes_units(pieces, symbols[len(SPECIAL) :]) else None


def _problems(symbols: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for symbol in symbols:
        if symbol in seen:
            yield f"two units would be {symbol!r}"
        if not symbol or "\0" in symbol or symbol.split() != [symbol]:
            yield f"a unit is {symbol!r}, which tokens.txt cannot hold"
        seen.add(symbol)
