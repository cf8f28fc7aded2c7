"""Text to unit ids and back.

Ids 0, 1, 2 are `<blk>`, `<sos/eos>`, `<unk>` in every inventory; the units follow. A tokenizer is a folder:

    tokens.txt      lines "symbol id", as sherpa-onnx reads them; all that decoding needs
    tokens.model    the SentencePiece model (kinds unigram and bpe), needed for encoding only
    lexicon.txt     lines "word phone phone ..." (kind phone), needed for encoding only

With neither of the last two, the units are single characters (kind char), or pieces of UTF-8 that include
every byte (kind bytes: asr/byte_tokens.py, which also describes their spelling).

`▁` (U+2581) is a space, at the start of a SentencePiece unit or as a unit of its own (characters, phones)
between words. So one rule decodes every kind: join the symbols, `▁` is a space. The phones of a word run
together. Text that no unit covers is encoded as `<unk>` and shown as `⁇`.

Text is normalised once, before encoding: Unicode NFC, and any run of white space becomes one space.
decode(encode(text)) is normalise(text) if the units cover it.

Kudo and Richardson, "SentencePiece", arXiv:1808.06226.
"""

import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from asr.errors import TokensError, naming_full_disk
from asr.pieces import makes_units, open_pieces

BLANK, SOS_EOS, UNK = 0, 1, 2
SPECIAL = ("<blk>", "<sos/eos>", "<unk>")
SPACE = "▁"
UNKNOWN_MARK = "⁇"
TWIN = "\ue000"
"""Marks a duplicate symbol: appended once for each earlier unit with that symbol; occurs in no text."""
KINDS = ("unigram", "bpe", "char", "phone")

MAX_BYTES = 64 * 2**20
"""A larger tokens.txt, tokens.model or lexicon.txt is refused: the largest in use are below 10 MB."""

# Ideographs and kana are written without spaces: for word times, each is a word.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_NO_TEXT = "no text to make a tokenizer of; check that the supervisions have text"
_LINE = re.compile(r"(?P<symbol>[^ \t]*)[ \t]+(?P<id>[^ \t]+)")


class Tokenizer(Protocol):
    """The interface of a unit inventory to the rest of the toolkit."""

    kind: str
    """"sentencepiece", "char", "phone", "bytes", or "units" if there is only tokens.txt, for decoding."""

    symbols: list[str]
    """The symbol of each id; V in number."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without blank and sos/eos."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; blank and sos/eos are skipped."""
        ...

    def words(self, ids: Iterable[int]) -> list[tuple[str, int, int]]:
        """(word, index of its first token, index after its last token), in order.

        Joined by spaces, they are decode(ids), except that each ideograph is a separate word.
        """
        ...


def normalise(text: str) -> str:
    """NFC, with any run of white space (also U+00A0, U+3000, and `▁` itself) as one space."""
    if "\0" in text:
        raise TokensError(f"text holds a NUL character: {text[:40]!r}; remove it")
    return " ".join(unicodedata.normalize("NFC", text.replace(SPACE, " ")).split())


class Units:
    """Symbols and their decoding: all that tokens.txt alone supports."""

    kind = "units"

    def __init__(self, symbols: Sequence[str], folder: Path) -> None:
        self.symbols = list(symbols)
        self.folder = folder
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> list[int]:
        raise TokensError(
            f"{self.folder}: tokens.txt alone cannot encode; put its tokens.model or lexicon.txt beside it"
        )

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join("".join(map(self._surface, ids)).replace(SPACE, " ").split())

    def words(self, ids: Iterable[int]) -> list[tuple[str, int, int]]:
        words: list[tuple[str, int, int]] = []
        is_open = False
        for letter, first, last in self._letters(ids):
            is_unspaced = bool(_UNSPACED.match(letter))
            if letter == SPACE or letter.isspace():
                is_open = False
            elif is_open and not is_unspaced:
                words[-1] = (words[-1][0] + letter, words[-1][1], last)
            else:
                words.append((letter, first, last))
                is_open = not is_unspaced
        return words

    def _letters(self, ids: Iterable[int]) -> Iterator[tuple[str, int, int]]:
        """(letter, index of its first token, index after its last token)."""
        for i, token in enumerate(ids):
            for letter in self._surface(token):
                yield letter, i, i + 1

    def _surface(self, token: int) -> str:
        if not 0 <= token < len(self.symbols):
            raise TokensError(f"{self.folder}: no id {token}; ids are 0 to {len(self.symbols) - 1}")
        if token == UNK:
            return UNKNOWN_MARK
        symbol = self.symbols[token]
        return "" if token in (BLANK, SOS_EOS) else symbol.rstrip(TWIN) or symbol


class Characters(Units):
    """Every character is a unit, with `▁` between words."""

    kind = "char"

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(letter, UNK) for letter in normalise(text).replace(" ", SPACE)]


class Phones(Units):
    """The first pronunciation in lexicon.txt, with `▁` between words; a word that is not in it is `<unk>`."""

    kind = "phone"

    def __init__(self, symbols: Sequence[str], folder: Path) -> None:
        super().__init__(symbols, folder)
        self._lexicon = read_lexicon(folder / "lexicon.txt")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in normalise(text).split():
            phones = self._lexicon.get(word, SPECIAL[UNK : UNK + 1])
            ids += [self._ids[SPACE]] * bool(ids) + [self._ids.get(phone, UNK) for phone in phones]
        return ids


class SentencePiece(Units):
    """Units of tokens.model, which is opened (and sentencepiece imported) at the first encode.

    tokens.txt may have the pieces in another order, leave out a few, and have additional units `<...>`.
    """

    kind = "sentencepiece"

    def __init__(self, symbols: Sequence[str], folder: Path) -> None:
        super().__init__(symbols, folder)
        self._processor: Any = None
        self._of_piece: list[int] = []

    def encode(self, text: str) -> list[int]:
        if self._processor is None:
            path = self.folder / "tokens.model"
            self._processor, pieces = open_pieces(_read_bytes(path), str(path))
            if not makes_units(pieces, self.symbols[len(SPECIAL) :]):
                raise TokensError(
                    f"{path}: its {len(pieces)} units are not the {len(self.symbols)} of tokens.txt; "
                    "the two files are of different tokenizers"
                )
            self._of_piece = [self._ids.get(piece, UNK) for piece in pieces]
        return [self._of_piece[i] for i in self._processor.EncodeAsIds(normalise(text))]


# Reading


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Open a tokenizer folder. TokensError if a file is missing, too large, or invalid (with the line)."""
    folder = Path(folder)
    symbols = read_tokens(folder / "tokens.txt")
    if (folder / "tokens.model").exists():
        return SentencePiece(symbols, folder)
    if (folder / "lexicon.txt").exists():
        return Phones(symbols, folder)
    from asr.byte_tokens import ByteLevel  # it imports this module

    if ByteLevel.fits(symbols):
        return ByteLevel(symbols, folder)
    if all(len(symbol) == 1 for symbol in symbols[len(SPECIAL) :]):
        return Characters(symbols, folder)
    return Units(symbols, folder)


def read_tokens(path: str | Path) -> list[str]:
    """The symbols of a tokens.txt in the order of their ids; TokensError names an invalid line.

    Lines may be in any order, end in CRLF, and write the space as `▁` or as a space.
    """
    lines: dict[int, int] = {}
    ids: dict[str, int] = {}
    for number, line in _lines(Path(path)):
        where = f"{path}:{number}"
        symbol, i = _parse_line(line, where)
        if symbol in ids:
            raise TokensError(
                f"{where}: {symbol!r} is already on line {lines[ids[symbol]]}; give each unit one line"
            )
        if i in lines:
            raise TokensError(f"{where}: id {i} is already on line {lines[i]}; give each id one line")
        ids[symbol], lines[i] = i, number
    missing = next(i for i in range(len(lines) + 1) if i not in lines)
    if missing < len(lines):
        after = lines[min(i for i in lines if i > missing)]
        raise TokensError(f"{path}:{after}: id {missing} is missing; ids must be 0, 1, 2, ... without a gap")
    symbols = sorted(ids, key=ids.__getitem__)
    for i, special in enumerate(SPECIAL):
        if symbols[i : i + 1] != [special]:
            found = f"id {i} is {symbols[i]!r}" if i in lines else f"there is no id {i}"
            where = f"{path}:{lines.get(i, 1)}"
            raise TokensError(
                f"{where}: {found}, expected {special}; the file must start {' '.join(SPECIAL)}"
            )
    return symbols


def _parse_line(line: str, where: str) -> tuple[str, int]:
    line = line.rstrip(" \t")
    match = _LINE.fullmatch(line) or _LINE.fullmatch(f" {line}")  # an id alone: its symbol is the space
    if not match:
        raise TokensError(f"{where}: found {line[:40]!r}, expected a symbol, one space, and its id")
    number = match["id"]
    if not (number.isascii() and number.isdigit() and len(number) < 8):
        raise TokensError(f"{where}: id {number!r} is not a whole number from 0 on")
    return match["symbol"] or SPACE, int(number)


def read_lexicon(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Word -> its first pronunciation. TokensError names the line of a word without phones."""
    lexicon: dict[str, tuple[str, ...]] = {}
    for number, line in _lines(Path(path)):
        word, *phones = line.split()
        if not phones:
            raise TokensError(f"{path}:{number}: {word!r} has no phones; write: word phone phone ...")
        reserved = {*SPECIAL, SPACE}.intersection(phones)
        if reserved:
            raise TokensError(f"{path}:{number}: {reserved.pop()!r} is not a phone but reserved; rename it")
        lexicon.setdefault(unicodedata.normalize("NFC", word), tuple(phones))
    return lexicon


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered non-empty lines. Only \\n ends a line: U+2028 and U+0085 may be symbols."""
    data = _read_bytes(path).removeprefix("\ufeff".encode())
    for number, raw in enumerate(data.split(b"\n"), start=1):
        try:
            line = raw.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{raw[error.start]:02X} at column {error.start + 1}"
            raise TokensError(f"{path}:{number}: {found} is not UTF-8; convert the file with iconv") from None
        if "\0" in line:
            raise TokensError(f"{path}:{number}: holds a NUL character; remove it")
        if line.strip():
            yield number, line


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TokensError(f"{path}: {path.stat().st_size} bytes, at most {MAX_BYTES} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise TokensError(f"{path}: not found; make it with asr tokenizer") from None
    except OSError as error:
        raise TokensError(f"{path}: {error.strerror}") from None


def tokens_hash(tokens: str | Path | Sequence[str]) -> str:
    """SHA-256 of an inventory (symbols, or a tokenizer folder), of its tokens.txt in canonical form."""
    symbols = read_tokens(Path(tokens) / "tokens.txt") if isinstance(tokens, str | Path) else tokens
    return hashlib.sha256(_tokens_text(symbols).encode()).hexdigest()


def check_tokens(symbols: Sequence[str], num_tokens: int, where: str = "model") -> None:
    """Raise TokensError unless there are as many symbols as outputs of the model, num_tokens."""
    if len(symbols) != num_tokens:
        raise TokensError(
            f"{where}: has {num_tokens} outputs, tokens.txt has {len(symbols)} units; "
            "use the tokens it was trained with"
        )


# Training


def train_tokenizer(
    texts: Iterable[str], kind: str, vocab_size: int, out_dir: str | Path, lexicon: str | Path | None = None
) -> Tokenizer:
    """Make a tokenizer folder from texts; the same texts in the same order give the same files.

    vocab_size: number of units, including the three special ones. Kind char keeps the commonest, or all with
    0; kind phone takes them from the lexicon. TokensError if the texts are empty or do not give that many.
    """
    if kind not in KINDS:
        raise TokensError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if vocab_size <= len(SPECIAL) and not (vocab_size == 0 and kind in ("char", "phone")):
        raise TokensError(
            f"vocabulary size {vocab_size} leaves no unit after {' '.join(SPECIAL)}; pass a larger one"
        )
    lines = (line for text in texts if (line := normalise(text)))
    files: dict[str, bytes] = {}
    if kind == "char":
        symbols = _character_symbols(lines, vocab_size)
    elif kind == "phone":
        if lexicon is None:
            raise TokensError("kind phone needs a lexicon; pass --lexicon lexicon.txt")
        symbols = [*SPECIAL, SPACE, *sorted({p for phones in read_lexicon(lexicon).values() for p in phones})]
        files["lexicon.txt"] = Path(lexicon).read_bytes()
    else:
        symbols, files["tokens.model"] = _train_sentencepiece(lines, kind, vocab_size)
    return _write(Path(out_dir), {"tokens.txt": _tokens_text(symbols).encode(), **files})


def _tokens_text(symbols: Sequence[str]) -> str:
    return "".join(f"{symbol} {i}\n" for i, symbol in enumerate(symbols))


def _character_symbols(lines: Iterable[str], vocab_size: int) -> list[str]:
    counts = Counter(letter for line in lines for letter in line.replace(" ", SPACE))
    if not counts:
        raise TokensError(_NO_TEXT)
    commonest = sorted(counts, key=lambda letter: (-counts[letter], letter))
    return [*SPECIAL, *sorted(commonest[: vocab_size - len(SPECIAL) if vocab_size else None])]


def _train_sentencepiece(lines: Iterator[str], kind: str, vocab_size: int) -> tuple[list[str], bytes]:
    import sentencepiece

    first = next(lines, None)
    if first is None:
        raise TokensError(_NO_TEXT)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(line for part in ((first,), lines) for line in part),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",  # normalise() already did it, for all kinds alike
            max_sentence_length=2**20,
            unk_id=UNK,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=list(SPECIAL[:UNK]),
            num_threads=4,  # a fixed number: the sums of the E step depend on it
            minloglevel=3,
        )
    except RuntimeError as error:
        raise TokensError(_explain(str(error), vocab_size)) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.IdToPiece(i) for i in range(processor.GetPieceSize())], model.getvalue()


def _explain(error: str, vocab_size: int) -> str:
    """SentencePiece's refusal of a vocabulary size, reworded."""
    if match := re.search(r"value <= (\d+)", error):
        return f"vocabulary size {vocab_size} is too large for this text; the largest possible is {match[1]}"
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocabulary size {vocab_size} is too small for this text; its characters alone need {match[1]}"
        )
    return f"sentencepiece: {' '.join(error.split())}"


def write_tokens(folder: Path, symbols: Sequence[str], model: bytes | None = None) -> Tokenizer:
    """Make a tokenizer folder of symbols and, if given, the SentencePiece model that cuts text into them."""
    files = {"tokens.txt": _tokens_text(symbols).encode()} | ({"tokens.model": model} if model else {})
    return _write(folder, files)


def _write(folder: Path, files: dict[str, bytes]) -> Tokenizer:
    """Write the files of a tokenizer, each whole or not at all, and remove those of another kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in {"tokens.txt", "tokens.model", "lexicon.txt"} - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        unfinished = folder / f"{name}.tmp"
        with naming_full_disk(folder / name):
            unfinished.write_bytes(data)
        unfinished.replace(folder / name)
    return load_tokenizer(folder)
