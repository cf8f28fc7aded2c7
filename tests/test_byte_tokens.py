"""Pieces of UTF-8: every text survives encoding and decoding, also through tokens.txt."""

import base64
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.byte_tokens import ByteLevel, bytes_of, decode_utf8, read_ranks, split_words, symbol_of
from asr.errors import TokensError
from asr.tokens import SPECIAL, Characters, check_tokens, load_tokenizer, normalise, read_tokens

WORDS = re.findall(r"\S+", "th in the er an ing hello world don 't 's é é字 字 ▁ < <0x <|")
PIECES = [
    *WORDS,
    *(f" {x}" for x in (*WORDS[-4:], "t", "th", "the", "h", "hello", "w", "world", "1")),
    "  ",
    " -",
]


def make_ranks() -> list[bytes]:
    """All bytes, not in numerical order, then pieces, each after its prefixes."""
    found = [bytes([x]) for x in (*range(33, 256), *range(33))]
    for piece in map(str.encode, PIECES):
        found += [piece[:i] for i in range(2, len(piece) + 1) if piece[:i] not in found]
    return found


RANKS = make_ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens")
    symbols = [*SPECIAL, *map(symbol_of, RANKS), "<|en|>", "<|0.00|>"]
    text = "".join(f"{symbol} {i}\n" for i, symbol in enumerate(symbols))
    (path / "tokens.txt").write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_the_kind_is_found_in_tokens_txt(folder, tokenizer, tmp_path):
    assert isinstance(tokenizer, ByteLevel)
    assert tokenizer.kind == "bytes"
    (tmp_path / "tokens.txt").write_text("<blk> 0\n<sos/eos> 1\n<unk> 2\na 3\n")
    assert isinstance(load_tokenizer(tmp_path), Characters)
    check_tokens(tokenizer.symbols, len(RANKS) + 5)
    assert read_tokens(folder / "tokens.txt") == tokenizer.symbols


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalise(text)
    words = tokenizer.words(ids)
    assert "".join(word for word, _, _ in words) == "".join(normalise(text).split())
    assert all(0 <= first < last <= len(ids) for _, first, last in words)


@given(st.binary())
@settings(max_examples=300, deadline=None)
def test_every_piece_has_a_symbol_that_tokens_txt_holds(data):
    symbol = symbol_of(data)
    assert bytes_of(symbol) == data
    assert symbol.split() == [symbol]
    assert symbol.isprintable()


def test_symbols_are_read_as_they_are_documented():
    found = [symbol_of(x) for x in (b" the", b"\n", "字".encode()[:2], b"<blk>", "▁é".encode())]
    expected = ["▁the", "<0x0A>", "<0xE5><0xAD>", "<0x3C>blk>", "<0xE2><0x96><0x81>é"]
    assert found == expected
    assert [bytes_of(x) for x in ("<blk>", "<|en|>", "<0xE>", "")] == [b""] * 4


@given(st.binary())
@settings(max_examples=300, deadline=None)
def test_what_is_no_utf8_is_replaced(data):
    found = list(decode_utf8(data))
    assert "".join(letter for letter, _, _ in found) == data.decode("utf-8", "replace")
    assert [0, *(end for _, _, end in found)][:-1] == [start for _, start, _ in found]


def test_a_letter_may_be_spread_over_units(tokenizer):
    letter = "한"
    ids = tokenizer.encode(f"a{letter}b 字")
    assert len(ids) > 4
    assert tokenizer.decode(ids) == f"a{letter}b 字"
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd") or tokenizer.decode(ids[:-1]) == f"a{letter}b"
    cut = tokenizer.encode(letter)[:-1]
    assert tokenizer.decode(cut) == "\ufffd"
    assert tokenizer.words(cut) == [("\ufffd", 1, len(cut))]  # the first unit is the space


def test_words_know_their_units(tokenizer):
    ids = tokenizer.encode("hello the world")
    assert [tokenizer.symbols[i] for i in ids] == ["▁hello", "▁the", "▁world"]
    assert tokenizer.words(ids) == [("hello", 0, 1), ("the", 1, 2), ("world", 2, 3)]
    marked = [tokenizer.symbols.index("<|en|>"), 0, 1, *ids, tokenizer.symbols.index("<|0.00|>")]
    assert tokenizer.decode(marked) == "hello the world"
    assert tokenizer.words(marked)[0] == ("hello", 3, 4)


def test_pieces_join_in_the_order_of_their_ranks(tokenizer):
    """By definition: always the pair that is the unit with the lowest id, the first among equals."""
    ranks = {data: i for i, data in enumerate(RANKS)}
    for word in ("thethe", "inghello", "éé字字", "wwworlds"):
        parts = [bytes([x]) for x in word.encode()]
        while True:
            pairs = [
                (ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks
            ]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        whole = ranks.get(word.encode())
        expected = [ranks[x] for x in parts] if whole is None else [whole]
        assert [x - 3 for x in tokenizer.encode_exactly(word)] == expected


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello world", ["Hello", " world"]),
        ("don't we'll I'M", ["don", "'t", " we", "'ll", " I", "'", "M"]),
        ("a1b22 333", ["a", "1", "b", "22", " 333"]),
        ("x  y   ", ["x", " ", " y", "   "]),
        ("a\n b\t c", ["a", "\n", " b", "\t", " c"]),
        ("wait... 'so' (é字)", ["wait", "...", " '", "so", "'", " (", "é字", ")"]),
        ("½ Ⅷ x²_", ["½", " Ⅷ", " x", "²", "_"]),
        ("हिन्दी", ["ह", "ि", "न", "्", "द", "ी"]),
        ("", []),
    ],
)
def test_texts_are_cut_into_words(text, pieces):
    assert list(split_words(text)) == pieces


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_the_pieces_of_a_text_are_the_text(text):
    pieces = list(split_words(text))
    assert "".join(pieces) == text
    assert all(pieces)


def test_on_ascii_the_cut_is_that_of_the_published_expression():
    letters = "[A-Za-z]"
    other = r"[^\sA-Za-z0-9]"
    expression = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letters}+| ?[0-9]+| ?{other}+|\s+(?!\S)|\s+")

    @given(st.text(st.sampled_from("ab's tre 1-\n'")))
    @settings(max_examples=500, deadline=None)
    def check(text):
        assert list(split_words(text)) == expression.findall(text)

    check()


def test_a_file_of_ranks(tmp_path):
    path = tmp_path / "a.tiktoken"
    lines = [f"{base64.b64encode(x).decode()} {i}\n" for i, x in enumerate(RANKS)]
    path.write_text("".join(reversed(lines)))
    assert read_ranks(path) == RANKS
    path.write_text("".join(lines) + f"= {len(RANKS)}\n")  # like the last one of Whisper
    assert read_ranks(path) == [*RANKS, b""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("IQ== 0\nnot 1\n", r"a.tiktoken:2: 'not 1', expected base64, a space, and a rank of its own"),
        ("IQ== 0\nIg== 0\n", r"a.tiktoken:2: 'Ig== 0', expected base64"),
        ("IQ== x\n", r"a.tiktoken:1: 'IQ== x', expected base64"),
        ("IQ== 0\nIg== 2\n", r"a.tiktoken: no unit has rank 1; ranks must be 0, 1, 2"),
        ("", r"a.tiktoken: empty, expected lines"),
        ("é 0", r"a.tiktoken: not a file of ranks"),
    ],
)
def test_what_is_wrong_with_a_file_of_ranks_is_said(tmp_path, text, message):
    path = tmp_path / "a.tiktoken"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TokensError, match=message):
        read_ranks(path)
    with pytest.raises(TokensError, match=r"b.tiktoken: no such file"):
        read_ranks(tmp_path / "b.tiktoken")


def test_an_id_that_is_none_is_an_error(tokenizer):
    with pytest.raises(TokensError, match="no id 100000; ids are 0 to"):
        tokenizer.decode([100000])
