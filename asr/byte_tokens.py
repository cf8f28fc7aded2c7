"""Units that are pieces of UTF-8, from byte-level BPE (Sennrich et al., arXiv:1508.07909; GPT-2, Whisper).

Every byte is a unit, so every text can be encoded, and a character may span several units. Encoding splits a
text into words and a word into bytes, and merges the adjacent pair that is the unit with the lowest id until
there is none. This needs tokens.txt only.

In tokens.txt a space is `▁`. A byte is written as `<0xE4>` if it belongs to a character that the unit holds
only in part, that does not print, or that is `<` or U+2581. So `<` starts a byte, or a unit that is not text,
such as `<|en|>`, or `<>`, the empty piece.
Decoding gives U+FFFD for bytes that are not UTF-8, and nothing for units that are not text.
"""

import base64
import binascii
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from asr.errors import TokensError
from asr.tokens import SPACE, SPECIAL, UNK, UNKNOWN_MARK, Units, normalise

NOTHING = "<>"

_TEXT = re.compile(r"(?:<0x[0-9A-F]{2}>|[^<])+")
_PART = re.compile(r"<0x([0-9A-F]{2})>|([^<]+)")

# a word is a run of letters, of digits, or of other characters, with the space before it; surplus white space
# ends before the space of a word. Letters stand as `a`, digits as `0`, other characters as `.`, see _kind
_SHORT = re.compile("'(?:s|t|re|ve|m|ll|d)")
_WORD = re.compile(r" ?a+| ?0+| ?\.+|\s+(?!\S)|\s+")


class ByteLevel(Units):
    """Text as pieces of UTF-8; `encode` prepends a space, as the other words of a text have one."""

    kind = "bytes"

    def __init__(self, symbols: Sequence[str], folder: Path) -> None:
        super().__init__(symbols, folder)
        self._bytes = [bytes_of(x) if i >= len(SPECIAL) else b"" for i, x in enumerate(symbols)]
        self._bytes[UNK] = UNKNOWN_MARK.encode()
        self._ranks = {x: i for i, x in enumerate(self._bytes) if x and i != UNK}
        self._merge = functools.lru_cache(maxsize=1 << 16)(self.merge)

    @staticmethod
    def fits(symbols: Sequence[str]) -> bool:
        """Whether every byte is a unit."""
        return {symbol_of(bytes([x])) for x in range(256)} <= set(symbols)

    def encode(self, text: str) -> list[int]:
        text = normalise(text)
        return self.encode_exactly(f" {text}") if text else []

    def encode_exactly(self, text: str) -> list[int]:
        """The units of a text as it is, without a space prepended."""
        return [i for word in split_words(text) for i in self._merge(word.encode())]

    def merge(self, word: bytes) -> tuple[int, ...]:
        """The units of one word."""
        if word in self._ranks:
            return (self._ranks[word],)
        parts = [word[i : i + 1] for i in range(len(word))]
        while len(parts) > 1:
            pairs = [self._ranks.get(a + b, len(self.symbols)) for a, b in itertools.pairwise(parts)]
            lowest = min(pairs)
            if lowest == len(self.symbols):
                break
            i = pairs.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return tuple(self._ranks[part] for part in parts)

    def decode(self, ids: Iterable[int]) -> str:
        text = "".join(letter for letter, _, _ in self._letters(ids))
        return " ".join(text.replace(SPACE, " ").split())

    def _letters(self, ids: Iterable[int]) -> Iterator[tuple[str, int, int]]:
        parts = []
        for token in ids:
            self._surface(token)  # raises if there is no such unit
            parts.append(self._bytes[token])
        owner = [i for i, part in enumerate(parts) for _ in part]
        for letter, start, end in decode_utf8(b"".join(parts)):
            yield letter, owner[start], owner[end - 1] + 1


def symbol_of(data: bytes) -> str:
    """A piece of UTF-8 as tokens.txt writes it, for any bytes, even none."""
    return NOTHING if not data else "".join(map(_written, data.decode("utf-8", "surrogateescape")))


def bytes_of(symbol: str) -> bytes:
    """The inverse of `symbol_of`; no bytes for a unit that is not text."""
    if not _TEXT.fullmatch(symbol):
        return b""
    parts = (
        bytes.fromhex(byte) if byte else text.replace(SPACE, " ").encode()
        for byte, text in _PART.findall(symbol)
    )
    return b"".join(parts)


def _written(letter: str) -> str:
    if letter == " ":
        return SPACE
    if letter.isprintable() and letter not in ("<", SPACE):
        return letter
    return "".join(f"<0x{x:02X}>" for x in letter.encode("utf-8", "surrogateescape"))


def decode_utf8(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(character, index of its first byte, index after its last); U+FFFD for bytes that are not UTF-8."""
    at = 0
    while at < len(data):
        rest = data[at:]
        try:
            text, wrong = rest.decode(), 0
        except UnicodeDecodeError as error:
            text, wrong = rest[: error.start].decode(), error.end - error.start
        for letter in text:
            size = len(letter.encode())
            yield letter, at, at + size
            at += size
        if wrong:
            yield "\ufffd", at, at + wrong
            at += wrong


def split_words(text: str) -> Iterator[str]:
    """The pieces of a text that are encoded separately; joined, they are the text."""
    kinds = "".join(map(_kind, text))
    at = 0
    while at < len(text):
        match = _SHORT.match(text, at) or _WORD.match(kinds, at)
        assert match
        yield text[at : match.end()]
        at = match.end()


def _kind(letter: str) -> str:
    """The class of a character in `_WORD`: Unicode categories L, N, all others, and white space."""
    if letter == " ":
        return " "
    if letter.isspace() and letter not in "\x1c\x1d\x1e\x1f":
        return "\n"
    return {"L": "a", "N": "0"}.get(unicodedata.category(letter)[0], ".")


def read_ranks(path: str | Path) -> list[bytes]:
    """The units of a `.tiktoken` file, with lines `base64 rank`, in the order of their ranks; one may be
    empty, written as `=`.

    Raises TokensError with the number of the invalid line.
    """
    found: dict[int, bytes] = {}
    try:
        lines = Path(path).read_text("ascii").splitlines()
    except OSError as error:
        raise TokensError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise TokensError(f"{path}: not a file of ranks, expected lines `base64 rank`") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        unit, _, rank = line.partition(" ")
        try:
            data = b"" if unit == "=" else base64.b64decode(unit, validate=True)
        except binascii.Error:
            unit = ""
        if not unit or not rank.isdigit() or int(rank) in found:
            raise TokensError(
                f"{path}:{number}: {line[:40]!r}, expected base64, a space, and a rank of its own"
            )
        found[int(rank)] = data
    if sorted(found) != list(range(len(found))):
        gap = next(i for i in range(len(found)) if i not in found)
        raise TokensError(f"{path}: no unit has rank {gap}; ranks must be 0, 1, 2, ... without a gap")
    if not found:
        raise TokensError(f"{path}: empty, expected lines `base64 rank`")
    return [found[i] for i in range(len(found))]
