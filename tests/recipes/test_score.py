"""asr score: the numbers, the tables, what counts as which error, and what is refused."""

import json

import pytest

from recipes.cli import main


def row(id: str, ref: str, hyp: str | None, speaker: str = "s1") -> dict:
    return {"id": id, "speaker": speaker, "duration_s": 1.0, "ref": ref, "hyp": hyp}


ROWS = [
    row("a", "the cat sat on the mat", "the hat sat on mat"),
    row("b", "a dog", "a dog barked", "s2"),
    row("c", "yes", "yes", "s2"),
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def hyp(tmp_path):
    return write(tmp_path / "exp" / "decode" / "test-clean_ctc-prefix_c640" / "hyp.jsonl", ROWS)


def test_the_total_comes_first_and_all_else_is_in_wer_txt(hyp, tmp_path, capsys):
    assert main(["score", hyp]) == 0
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert first.startswith("test-clean  ctc-prefix_c640  WER 33.33 % [95 % ")
    assert first.endswith("[9 words: 1 ins, 1 del, 1 sub]")
    assert "by speaker" not in out
    text = (tmp_path / "exp/decode/test-clean_ctc-prefix_c640/wer.txt").read_text()
    assert text.startswith(out.rstrip())
    for part in ("cat > hat 1", "barked 1", "0-5", "6-10", "by speaker", "s2    33.33 %", "s1    33.33 %"):
        assert part in text
    assert text.index("\n  a  [0 ins") < text.index("\n  b  [1 ins")  # the worst first
    assert "ref  the cat sat on the mat\n    hyp  the hat sat on *** mat" in text
    assert "  c  " not in text


def test_characters_speakers_and_json(hyp, capsys):
    assert main(["score", hyp, "--cer", "--by-speaker", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["measure"], found["ref"], found["ins"], found["del"], found["sub"]) == ("CER", 24, 6, 3, 1)
    assert found["rate"] == pytest.approx(10 / 24)
    assert found["low"] <= found["rate"] <= found["high"]
    assert found["utterances"] == 3
    assert set(found["speakers"]) == {"s1", "s2"}
    assert sum(s["ref"] for s in found["speakers"].values()) == 24


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ([], "66.67 %"),
        (["--ignore-case"], "66.67 %"),
        (["--ignore-punctuation"], "33.33 %"),
        (["--ignore-case", "--ignore-punctuation"], "0.00 %"),
    ],
)
def test_case_and_punctuation_are_ignored_when_asked(options, rate, tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", [row("a", "Don’t, stop …now!", "don't stop now")])
    assert main(["score", path, *options]) == 0
    assert f"x  WER {rate}" in capsys.readouterr().out


def test_the_two_ways_to_write_an_umlaut_are_one(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", [row("a", "scho\u0308n", "schön")])
    assert main(["score", path]) == 0
    assert "WER 0.00 %" in capsys.readouterr().out


def test_a_missing_hypothesis_is_deletions_and_is_said(tmp_path, capsys):
    path = write(tmp_path / "hyp.jsonl", [row("a", "x y", "x y"), row("b", "x y", None)])
    failed = [{"id": "c", "ref": "z", "path": "c.wav", "error": "c.wav: is empty"}, {"id": "d", "error": "?"}]
    write(tmp_path / "failures.jsonl", failed)
    assert main(["score", path]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "[5 words: 0 ins, 3 del, 0 sub]  2 without a hypothesis, counted as deletions" in line


def test_words_heard_in_silence_are_insertions(tmp_path, capsys):
    path = write(tmp_path / "x.jsonl", [row("a", "x y", "x y"), row("b", "", "thank you")])
    assert main(["score", path]) == 0
    assert "WER 100.00 %" in capsys.readouterr().out


def test_an_experiment_gives_a_line_for_each_set_and_mode(hyp, tmp_path, capsys):
    write(tmp_path / "exp/decode/dev_joint/hyp.jsonl", ROWS[2:])
    assert main(["score", str(tmp_path / "exp")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:27].rstrip() for line in lines] == ["dev  joint", "test-clean  ctc-prefix_c640"]
    assert lines[0].index("WER") == lines[1].index("WER")
    assert all(
        (tmp_path / f"exp/decode/{name}/wer.txt").exists()
        for name in ("dev_joint", "test-clean_ctc-prefix_c640")
    )


def test_every_utterance_with_an_error_is_aligned(hyp, tmp_path):
    assert main(["score", hyp, "--align", str(tmp_path / "all.txt")]) == 0
    assert (tmp_path / "all.txt").read_text().splitlines() == [
        "  a  [0 ins, 1 del, 1 sub]",
        "    ref  the cat sat on the mat",
        "    hyp  the hat sat on *** mat",
        "  b  [1 ins, 0 del, 0 sub]",
        "    ref  a dog ******",
        "    hyp  a dog barked",
    ]


def many(wrong_every: int) -> list[dict]:
    return [
        row(str(i), "one two three", "one two tree" if i % wrong_every == 0 else "one two three")
        for i in range(200)
    ]


@pytest.mark.parametrize(
    ("other", "verdict"),
    [(many(50), "better"), (many(2), "worse"), (many(4)[::-1], "no significant difference")],
)
def test_a_comparison_says_whether_the_other_is_better(other, verdict, tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", many(4))
    b = write(tmp_path / "b.jsonl", other)
    assert main(["score", a, "--compare", b]) == 0
    assert capsys.readouterr().out.rstrip().endswith(verdict)
    assert main(["score", a, "--compare", b, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[1])
    assert found["significant"] == (verdict in ("better", "worse"))
    assert found["low"] <= found["difference"] <= found["high"]


def test_what_the_other_lacks_is_counted_as_deletions_and_said(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", ROWS)
    b = write(tmp_path / "b.jsonl", [row("c", "yes", "yes"), row("new", "x", "x")])
    assert main(["score", a, "--compare", b]) == 0
    out = capsys.readouterr().out
    assert "WER 88.89 %, +55.56" in out
    assert "2 utterances missing from it are counted as deletions" in out
    assert "1 utterances found only in it are left out" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "x.jsonl: not found; asr decode writes it"),
        ("", "x.jsonl: holds no utterances"),
        ('{"id": "a", "ref": "b"}\n{"id"\n', "x.jsonl:2: not JSON at column"),
        ('{"id": "a", "hyp": "b"}\n', "x.jsonl:1: has no 'ref'"),
        ("[1]\n", "x.jsonl:1: found '[1]"),
        ('{"id": 1, "ref": "b"}\n', "x.jsonl:1: id, speaker, ref and hyp must be text"),
        ('{"id": "a", "ref": "b"}\n{"id": "a", "ref": "b"}\n', "x.jsonl:2: utterance a is already on line 1"),
        ('{"id": "a", "ref": "", "hyp": "b"}\n', "no utterance has a reference"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_the_exit_status_is_2(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "x.jsonl").write_text(text)
    assert main(["score", str(tmp_path / "x.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_mistakes_exit_with_2_too(hyp, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "exp/decode/dev_joint/hyp.jsonl", ROWS[2:])
    other = write(tmp_path / "other.jsonl", [row("c", "no", "no")])
    for args, message in [
        ([str(tmp_path / "empty")], "has no decode/*/hyp.jsonl; run asr decode"),
        ([hyp, "--compare", other], "utterance c has a different reference"),
        ([str(tmp_path / "exp"), "--compare", other], "has 2 sets; --compare needs one"),
        ([hyp, "--align", str(tmp_path / "none" / "x")], "cannot be written"),
    ]:
        assert main(["score", *args]) == 2
        assert message in capsys.readouterr().err
