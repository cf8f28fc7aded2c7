"""asr tokenizer: what it reads, what it writes, and what it refuses."""

import gzip
import json

import pytest

from asr.tokens import load_tokenizer
from recipes.cli import main

CUTS = [
    {"id": "a", "type": "MonoCut", "supervisions": [{"id": "a", "text": "hello world"}]},
    {"id": "b", "type": "MonoCut", "supervisions": [{"id": "b"}, {"id": "c", "text": ""}]},
    {
        "id": "m",
        "type": "MixedCut",
        "tracks": [
            {"cut": {"id": "x", "type": "MonoCut", "supervisions": [{"text": "grüße"}]}},
            {"cut": {"id": "p", "type": "PaddingCut"}},
        ],
    },
]


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(cut) + "\n" for cut in CUTS).encode()))
    return path


def test_every_supervision_is_read_those_of_mixed_cuts_too(manifest, tmp_path, capsys):
    assert main(["tokenizer", str(manifest), "--kind", "char", "-o", str(tmp_path / "char")]) == 0
    assert set("helowrdgüß▁") == set(load_tokenizer(tmp_path / "char").symbols[3:])
    assert "14 units; 2 texts, 3 words, 5.33 units per word, 0 unknown" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_several_manifests_and_plain_text_train_one_model(manifest, tmp_path, kind):
    lines = tmp_path / "more.txt"
    lines.write_text("the world and the house\nhello house\n")
    out = tmp_path / kind
    assert (
        main(["tokenizer", str(manifest), str(lines), "--kind", kind, "--vocab", "20", "-o", str(out)]) == 0
    )
    tokenizer = load_tokenizer(out)
    assert len(tokenizer.symbols) == 20
    assert tokenizer.decode(tokenizer.encode("grüße the house")) == "grüße the house"


def test_a_lexicon_gives_phones_and_the_words_it_lacks_are_counted(manifest, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("hello HH AH L OW\nworld W ER L D\n")
    args = ["--kind", "phone", "--lexicon", str(tmp_path / "words.txt"), "-o", str(tmp_path / "phone")]
    assert main(["tokenizer", str(manifest), *args]) == 0
    assert "1 unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.jsonl", None, "none.jsonl: not found; make manifests with"),
        ("a.jsonl", b'{"supervisions": []}\n{"superv', "a.jsonl:2: not JSON at column 2"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl:1: expected a cut with supervisions"),
        ("a.jsonl", b'{"supervisions": []}\n', "no text to make a tokenizer of"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9], "a.jsonl.gz: damaged gzip after line"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: damaged gzip after line 0"),
        ("a.txt", b"ok\ncaf\xe9\n", "a.txt:2: byte 0xE9 at column 4 is not UTF-8"),
        ("a.txt", b"hello world\n", "vocabulary size 500 is too large for this text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_the_exit_status_is_2(name, data, message, tmp_path, capsys):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert main(["tokenizer", str(tmp_path / name), "--vocab", "500", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
