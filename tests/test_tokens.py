"""Units and ids: round trips of every kind, wrong files, and what decoding needs."""

import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest

from asr.errors import TokensError
from asr.tokens import (
    SPECIAL,
    UNK,
    UNKNOWN_MARK,
    check_tokens,
    load_tokenizer,
    normalise,
    read_tokens,
    tokens_hash,
    train_tokenizer,
)

TEXTS = [
    "die Straße nach Köln ist schön",
    "ich gehe nach Hause und schlafe",
    "hello world this is the house",
    "你好 世界",
    "你们好吗",
    "cafe\u0301 and nai\u0308ve and the cafe\u0301",  # combining marks, as NFD writes them
]
LEXICON = "hello HH AH0 L OW1\nworld W ER1 L D\nhello HH EH0 L OW1\nschön SH OE N\n"
KINDS = {"unigram": 45, "bpe": 60, "char": 0, "phone": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokens")
    (root / "words.txt").write_text(LEXICON)
    for kind, size in KINDS.items():
        train_tokenizer(TEXTS * 3, kind, size, root / kind, root / "words.txt" if kind == "phone" else None)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_decode_undoes_encode_up_to_nfc_and_spaces(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    for text in [*TEXTS, "  hello\u00a0\t world ", "好", ""]:
        ids = tokenizer.encode(text)
        assert UNK not in ids
        assert (
            tokenizer.decode(ids) == normalise(text) == unicodedata.normalize("NFC", " ".join(text.split()))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_three_ids_are_special_and_units_follow(folders, kind):
    symbols = load_tokenizer(folders[kind]).symbols
    assert tuple(symbols[:3]) == SPECIAL == ("<blk>", "<sos/eos>", "<unk>")
    assert len(set(symbols)) == len(symbols) == (KINDS[kind] or len(symbols))


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char"])
def test_a_character_never_seen_is_unk_and_decodes_to_a_visible_mark(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    ids = tokenizer.encode("the Ω house <blk>")
    assert ids.count(UNK) >= 1
    assert tokenizer.decode(ids).startswith(f"the {UNKNOWN_MARK} house")
    assert 0 not in ids  # the name of a special unit in a text is ordinary letters
    assert 1 not in ids


def test_phones_go_through_the_lexicon(folders):
    tokenizer = load_tokenizer(folders["phone"])
    ids = tokenizer.encode("hello Ωmega world")
    assert " ".join(tokenizer.symbols[i] for i in ids) == "HH AH0 L OW1 ▁ <unk> ▁ W ER1 L D"
    assert tokenizer.decode(ids) == f"HHAH0LOW1 {UNKNOWN_MARK} WER1LD"
    assert tokenizer.words(ids) == [("HHAH0LOW1", 0, 4), (UNKNOWN_MARK, 5, 6), ("WER1LD", 7, 11)]


@pytest.mark.parametrize("kind", KINDS)
def test_words_joined_are_the_decoded_text_and_their_tokens_lie_in_order(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    ids = [0, *tokenizer.encode("hello world hello"), 1]
    words = tokenizer.words(ids)
    assert len(words) == 3
    assert " ".join(word for word, _, _ in words) == tokenizer.decode(ids)
    assert all(tokenizer.decode(ids[first:end]) == word for word, first, end in words)
    assert all(a_end <= b_first for (_, _, a_end), (_, b_first, _) in pairwise(words))


def test_an_ideograph_is_a_word_of_its_own(folders):
    tokenizer = load_tokenizer(folders["char"])
    assert tokenizer.words(tokenizer.encode("你好 the 世")) == [
        ("你", 0, 1),
        ("好", 1, 2),
        ("the", 3, 6),
        ("世", 7, 8),
    ]
    assert tokenizer.words(tokenizer.encode("the你the")) == [("the", 0, 3), ("你", 3, 4), ("the", 4, 7)]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_twice_gives_the_same_files(folders, kind, tmp_path):
    train_tokenizer(TEXTS * 3, kind, KINDS[kind], tmp_path)
    for name in ("tokens.txt", "tokens.model"):
        assert (tmp_path / name).read_bytes() == (folders[kind] / name).read_bytes()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_too_large_names_the_largest_possible_and_that_one_trains(kind, tmp_path):
    with pytest.raises(TokensError, match=r"5000 is too large .* largest possible is [0-9]+$") as error:
        train_tokenizer(TEXTS, kind, 5000, tmp_path)
    largest = int(str(error.value).split()[-1])
    assert len(train_tokenizer(TEXTS, kind, largest, tmp_path).symbols) == largest
    with pytest.raises(TokensError, match="too large"):
        train_tokenizer(TEXTS, kind, largest + 1, tmp_path)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("unigram", 10, "too small .* characters alone need [0-9]+"),
        ("bpe", 2, "leaves no unit"),
        ("phone", 0, "needs a lexicon"),
        ("words", 9, "not one of unigram, bpe, char, phone"),
    ],
)
def test_training_says_what_is_wrong_with_its_arguments(kind, size, message, tmp_path):
    with pytest.raises(TokensError, match=message):
        train_tokenizer(TEXTS, kind, size, tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "char"])
def test_training_without_text_is_an_error(kind, tmp_path):
    with pytest.raises(TokensError, match="no text"):
        train_tokenizer(["", "  "], kind, 50, tmp_path)


def test_a_limited_number_of_characters_keeps_the_commonest(tmp_path):
    tokenizer = train_tokenizer(["aaa bb c"], "char", 5, tmp_path)
    assert tokenizer.symbols[3:] == ["a", "b"] or tokenizer.symbols[3:] == ["a", "▁"]
    assert tokenizer.encode("cac") == [UNK, 3, UNK]


def test_training_another_kind_takes_the_old_files_away(folders, tmp_path):
    train_tokenizer(TEXTS, "bpe", 60, tmp_path)
    assert train_tokenizer(TEXTS, "char", 0, tmp_path).kind == "char"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.txt"]


GOOD = "<blk> 0\n<sos/eos> 1\n<unk> 2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "a 3\na 4\n", r"tokens.txt:5: 'a' is already on line 4"),
        (GOOD + "a 3\nb 3\n", r"tokens.txt:5: id 3 is already on line 4"),
        (GOOD + "a 3\nb 5\n", r"tokens.txt:5: id 4 is missing"),
        ("a 0\n<sos/eos> 1\n<unk> 2\n", r"tokens.txt:1: id 0 is 'a', expected <blk>"),
        ("<sos/eos> 1\n<unk> 2\n", r"tokens.txt:1: id 0 is missing"),
        ("", r"tokens.txt:1: there is no id 0, expected <blk>"),
        (GOOD + "a three\n", r"tokens.txt:4: id 'three' is not a whole number"),
        (GOOD + "a -3\n", r"tokens.txt:4: id '-3' is not a whole number"),
        (GOOD + "a ３\n", r"tokens.txt:4: id '３' is not a whole number"),
        (GOOD + "a b 3\n", r"tokens.txt:4: found 'a b 3', expected a symbol, one space, and its id"),
        (GOOD + "a\n", r"tokens.txt:4: id 'a' is not a whole number"),
        (GOOD + "a\0 3\n", r"tokens.txt:4: holds a NUL"),
        (GOOD.encode() + b"caf\xe9 3\n", r"tokens.txt:4: byte 0xE9 at column 4 is not UTF-8"),
    ],
)
def test_a_wrong_tokens_txt_names_its_line(text, message, tmp_path):
    (tmp_path / "tokens.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TokensError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("space", ["  3", " 3", "▁ 3", "3"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_crlf_the_byte_order_mark_and_every_way_to_write_a_space_parse(space, end, tmp_path):
    lines = [*GOOD.splitlines(), space, "\u2028 4", "5 5", "ä\t6", ""]
    (tmp_path / "tokens.txt").write_bytes(("\ufeff" + end.join(lines)).encode())
    assert read_tokens(tmp_path / "tokens.txt") == [*SPECIAL, "▁", "\u2028", "5", "ä"]


def test_decoding_needs_tokens_txt_alone_and_no_sentencepiece(folders, tmp_path):
    tokenizer = load_tokenizer(folders["bpe"])
    ids = tokenizer.encode("die Straße nach Köln")
    (tmp_path / "tokens.txt").write_bytes((folders["bpe"] / "tokens.txt").read_bytes())
    program = (
        "import sys; from asr.tokens import load_tokenizer; t = load_tokenizer(sys.argv[1]);"
        f"assert t.decode({ids}) == 'die Straße nach Köln'; assert t.words({ids}) == {tokenizer.words(ids)};"
        "assert not {'sentencepiece', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
    with pytest.raises(TokensError, match=r"cannot encode; put its tokens\.model"):
        load_tokenizer(tmp_path).encode("die")


def test_a_model_of_another_tokenizer_or_a_broken_one_is_refused(folders, tmp_path, monkeypatch):
    (tmp_path / "tokens.txt").write_bytes((folders["bpe"] / "tokens.txt").read_bytes())
    (tmp_path / "tokens.model").write_bytes((folders["unigram"] / "tokens.model").read_bytes())
    with pytest.raises(TokensError, match="its 45 units are not the 60 of tokens"):
        load_tokenizer(tmp_path).encode("die")
    (tmp_path / "tokens.model").write_bytes(b"not a model")
    with pytest.raises(TokensError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path).encode("die")
    (tmp_path / "tokens.model").write_bytes(b"long" * 500)
    monkeypatch.setattr("asr.tokens.MAX_BYTES", 1000)
    with pytest.raises(TokensError, match=r"tokens\.model: 2000 bytes, at most 1000 are read"):
        load_tokenizer(tmp_path).encode("die")


def test_a_missing_tokenizer_says_how_to_make_one(tmp_path):
    with pytest.raises(TokensError, match=r"tokens\.txt: not found; make it with asr tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("hello", "2: 'hello' has no phones"), ("x ▁", "2: '▁' is not a phone but reserved")],
)
def test_a_wrong_lexicon_names_its_line(line, message, tmp_path):
    (tmp_path / "words.txt").write_text(f"world W D\n{line}\n")
    with pytest.raises(TokensError, match=message):
        train_tokenizer(TEXTS, "phone", 0, tmp_path / "out", tmp_path / "words.txt")


def test_an_id_outside_the_inventory_is_an_error(folders):
    with pytest.raises(TokensError, match="no id 60; ids are 0 to 59"):
        load_tokenizer(folders["bpe"]).decode([60])


def test_text_with_nul_is_an_error(folders):
    with pytest.raises(TokensError, match="NUL"):
        load_tokenizer(folders["char"]).encode("a\0b")


def test_the_hash_is_of_the_inventory_not_of_line_ends(folders, tmp_path):
    data = (folders["char"] / "tokens.txt").read_bytes()
    (tmp_path / "tokens.txt").write_bytes(data.replace(b"\n", b"\r\n"))
    symbols = load_tokenizer(folders["char"]).symbols
    assert tokens_hash(tmp_path) == tokens_hash(folders["char"]) == tokens_hash(symbols)
    assert tokens_hash(symbols[:-1]) != tokens_hash(symbols)


def test_a_model_of_another_size_names_both_sizes():
    check_tokens(list("abc"), 3)
    with pytest.raises(TokensError, match="bundle: has 4 outputs, tokens"):
        check_tokens(list("abc"), 4, "bundle")
