"""Untrusted downloads run no code and write nothing outside their folder; errors in them are named."""

import argparse
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from asr.convert import archive
from asr.convert.families import FAMILIES
from asr.convert.origin import read_origin
from asr.convert.tensors import read_checkpoint
from asr.errors import CheckpointError
from asr.train.checkpoint import load_model
from recipes.cli import main


class Payload:
    """A pickle that creates a file if unpickling runs code."""

    def __init__(self, marker: Path, call: Callable[[str], object] = os.system) -> None:
        self.marker, self.call = marker, call

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return self.call, (f"touch {self.marker}",)


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    return torch.load(source / "final.pt", weights_only=True)


def changed(source: Path, **others: object) -> None:
    torch.save(weights_of(source) | others, source / "final.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {}, "optimizer": x}, lambda x: [x]])
def test_a_checkpoint_with_code_runs_nothing_and_is_refused(asr, tiny_source, tmp_path, zipped, wrap):
    marker = tmp_path / "marker"
    torch.save(wrap(Payload(marker)), tiny_source / "final.pt", _use_new_zipfile_serialization=zipped)
    status, _, err = asr("convert", "wenet", tiny_source, "-o", tmp_path / "exp")
    assert status == 2
    assert "which is code" in err
    assert "system" in err
    assert sorted(tmp_path.iterdir()) == [tiny_source]
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload works, where it is let"


def test_a_plain_pickle_with_code_is_refused(asr, tiny_source, tmp_path):
    (tiny_source / "final.pt").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    status, _, err = asr("convert", "wenet", tiny_source, "-o", tmp_path / "exp")
    assert status == 2
    assert err.startswith(f"asr: {tiny_source}/final.pt: ")
    assert sorted(tmp_path.iterdir()) == [tiny_source]


def test_yaml_with_code_is_refused(asr, tiny_source, tmp_path):
    text = f"!!python/object/apply:os.system ['touch {tmp_path}/marker']"
    (tiny_source / "train.yaml").write_text(text)
    status, _, err = asr("convert", "wenet", tiny_source, "-o", tmp_path / "exp")
    assert status == 2
    assert "train.yaml:1: not YAML" in err
    assert sorted(tmp_path.iterdir()) == [tiny_source]


def test_options_and_paths_that_trainers_save_hold_values_only(tmp_path):
    torch.save(
        {"args": argparse.Namespace(d_model=3), "exp": Path("/x"), "w": torch.ones(2)}, tmp_path / "a.pt"
    )
    found = read_checkpoint(tmp_path / "a.pt")
    assert vars(found["args"])["d_model"] == 3
    assert not isinstance(found["exp"], Path)


# ---- what is wrong with a source


def half(source: Path) -> None:
    data = (source / "final.pt").read_bytes()
    (source / "final.pt").write_bytes(data[: len(data) // 2])


def squeezed(source: Path) -> None:
    with zipfile.ZipFile(source / "final.pt") as old:
        files = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(source / "final.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in files.items():
            new.writestr(name, data)


def without(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def written(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda source: (source / name).write_bytes(data)


def lines(change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    def edit(source: Path) -> None:
        text = (source / "units.txt").read_text(encoding="utf-8").splitlines()
        (source / "units.txt").write_text("\n".join(change(text)) + "\n", encoding="utf-8")

    return edit


def rounded(source: Path) -> None:
    torch.save({name: x.bfloat16() for name, x in weights_of(source).items()}, source / "final.pt")


def in_training(source: Path) -> None:
    saved = {"model": weights_of(source), "optimizer": {"state": {0: torch.ones(1)}}, "step": 7}
    torch.save(saved, source / "final.pt")


def stretched(source: Path) -> None:
    """A few stored numbers that claim to be a huge tensor."""
    changed(source, **{"ctc.ctc_lo.weight": torch.ones(1).expand(10**7, 10**5)})


def flipped(source: Path) -> None:
    """One bit of a weight is another."""
    data = bytearray((source / "final.pt").read_bytes())
    data[data.index(weights_of(source)["ctc.ctc_lo.weight"].numpy().tobytes())] ^= 1
    (source / "final.pt").write_bytes(data)


def program(source: Path) -> None:
    torch.jit.script(torch.nn.ReLU()).save(source / "final.pt")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
BOMB += "dataset_conf: *a11\n"
"""A few lines of YAML, and gigabytes if written in full."""

WRONG: list[tuple[Callable[[Path], object], str]] = [
    (half, "final.pt: damaged, or only a part of it; download it again"),
    (squeezed, "is compressed, which torch never does; refused"),
    (without("final.pt"), "incomplete, expected one of final.pt, "),
    (without("train.yaml"), "incomplete, expected one of train.yaml, "),
    (without("units.txt"), "incomplete, expected one of units.txt, lang_char.txt"),
    (written("final.pt", b""), "final.pt: not a checkpoint"),
    (written("final.pt", b"version https://git-lfs.github.com/spec/v1\n"), "run git lfs pull"),
    (written("final.pt", b"<!DOCTYPE html>"), "a web page; download the file itself"),
    (written("units.txt", b"\xff\xfe"), "units.txt: not UTF-8"),
    (written("units.txt", b"<blank>\n"), "units.txt:1: '<blank>', expected a unit and an id"),
    (written("train.yaml", b"- 1"), "train.yaml: list, expected options by name"),
    (written("train.yaml", b"a: ["), "train.yaml:1: not YAML"),
    (written("global_cmvn", b"[ 1 2"), "global_cmvn: not a Kaldi matrix"),
    (written("global_cmvn", b'{"mean_stat": [1]}'), "global_cmvn: not statistics in JSON"),
    (lines(lambda x: x[:-1]), "8 units, the checkpoint has 9"),
    (lines(lambda x: [*x[:3], f"{x[2].split()[0]} 3", *x[4:]]), "two units would be"),
    (lines(lambda x: [*x[:-1], "a 12"]), "no unit has id 8"),
    (lines(lambda x: [*x[:-1], "a 7"]), "units.txt:9: 'a 7', expected a unit and an id of its own"),
    (lines(lambda x: [x[0], "a 1", *x[2:]]), "no unit <unk>"),
    (stretched, "ctc.ctc_lo.weight (10000000, 100000) has fewer numbers in the file"),
    (rounded, "tensors are bfloat16, encoder."),
    (in_training, "a checkpoint of training, with optimizer beside its weights; convert what was"),
    (lambda x: changed(x, extra=torch.zeros(2, 3)), "extra (2, 3) is unused"),
    (lambda x: changed(x, **{"ctc.ctc_lo.bias": torch.zeros(9).fill_(torch.nan)}), "no finite number"),
    (lambda x: changed(x, **{"ctc.ctc_lo.bias": torch.zeros(9).to_sparse()}), "expected plain floating"),
    (lambda x: changed(x, step=3), "'step' is int, expected tensors by name"),
    (flipped, "in it is damaged; download it again"),
    (program, "a TorchScript program, expected tensors"),
    (lambda x: changed(x, **{"ctc.ctc_lo.bias": torch.ones(9, device="meta")}), "on meta; expected plain"),
    (lambda x: changed(x, **{"ctc.ctc_lo.bias": torch.ones(9).to(torch.float8_e5m2)}), "float8_e5m2, "),
    (
        lambda x: changed(x, **{"ctc.ctc_lo.bias": torch.full((9,), 1e300, dtype=torch.float64)}),
        "no finite number",
    ),
    (lambda x: changed(x, **{"ctc.ctc_lo.weight": torch.tensor(1.0)}), "ctc.ctc_lo.weight () does not fit"),
    (
        lambda x: changed(x, **{"encoder.encoders.0.self_attn.linear_q.bias": torch.tensor(1.0)}),
        "linear_q.bias (), encoder.encoders.0.self_attn.linear_k.bias (8,), ",
    ),
    (
        lambda x: changed(x, **{"encoder.encoders.0.self_attn.linear_q.bias": torch.ones(8).long()}),
        "linear_q.bias (8,) of int64, ",
    ),
    (lambda x: changed(x, **{"a\n\x1b[2J": torch.ones(1)}), "'a\\n\\x1b[2J', expected names that can be"),
    (written("train.yaml", b"[" * 50_000), "train.yaml: not YAML of ours: nested too deeply"),
    (written("train.yaml", b"a: !!int x"), "train.yaml: not YAML: invalid literal"),
    (written("train.yaml", b"a: \0"), "train.yaml: not YAML: special characters are not allowed"),
    (written("train.yaml", BOMB.encode()), "train.yaml: dataset_conf: [[[...], "),
    (written("global_cmvn", b'{"mean_stat": ' + b"[" * 100_000), "global_cmvn: not statistics in JSON"),
    (
        written("global_cmvn", b'{"mean_stat": [1], "var_stat": [1], "frame_num": 1' + b"0" * 400 + b"}"),
        "JSON",
    ),
    (written("units.txt", b"<blank> " + b"9" * 5000), "units.txt:1: '<blank> 999"),
    (lambda x: torch.save([1], x / "final.pt"), "list in it, expected tensors by name"),
    (lambda x: torch.save({}, x / "final.pt"), "nothing in it, expected tensors"),
]


@pytest.mark.parametrize(("spoil", "expected"), WRONG, ids=[expected for _, expected in WRONG])
def test_a_wrong_source_has_its_error_and_nothing_is_written(asr, tiny_source, tmp_path, spoil, expected):
    spoil(tiny_source)
    status, out, err = asr("convert", "wenet", tiny_source, "-o", tmp_path / "exp")
    assert (status, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [tiny_source]


def test_a_missing_tensor_is_named_with_its_shape(asr, tiny_source, tmp_path):
    weights = weights_of(tiny_source)
    del weights["encoder.after_norm.bias"]
    torch.save(weights, tiny_source / "final.pt")
    err = asr("convert", "wenet", tiny_source, "-o", tmp_path / "exp")[2]
    assert "encoder.after_norm.bias is missing for encoder.norm.bias (8,)" in err


def test_there_is_no_such_source_or_family(asr, tmp_path):
    assert "/none: no such file or folder" in asr("convert", "wenet", "/none", "-o", tmp_path / "exp")[2]
    err = asr("convert", "kaldi", tmp_path, "-o", tmp_path / "exp")[2]
    assert f"kaldi: no such family; expected one of {', '.join(FAMILIES)}" in err


def test_an_experiment_that_is_there_is_not_replaced(asr, tiny_source, tmp_path):
    (tmp_path / "exp").mkdir()
    assert asr("convert", "wenet", tiny_source, "-o", tmp_path / "exp")[0] == 0
    status, _, err = asr("convert", "wenet", tiny_source, "-o", tmp_path / "exp")
    assert (status, err) == (2, f"asr: {tmp_path}/exp: exists; choose a new folder with -o\n")


def test_help_names_every_family(asr):
    out = asr("convert", "--help")[1]
    assert all(name in out for name in FAMILIES)


# ---- sources in other formats


def same(one: Path, other: Path) -> bool:
    first, second = (load_model(path)[0].state_dict() for path in (one, other))
    return all(torch.equal(x, second[name]) for name, x in first.items())


def converted(source: Path, out: Path) -> Path:
    assert main(["convert", "wenet", str(source), "-o", str(out)]) == 0
    return out


def test_what_stands_beside_the_weights_is_left_out_and_told(asr, tiny_source, tmp_path):
    plain = converted(tiny_source, tmp_path / "plain")
    weights = {f"module.{name}": x for name, x in weights_of(tiny_source).items()}
    torch.save({"model": weights, "optimizer": None, "step": 7}, tiny_source / "final.pt")
    status, out, _ = asr("convert", "wenet", tiny_source, "-o", tmp_path / "wrapped")
    assert status == 0
    assert "not carried over: optimizer, step" in out
    assert same(tmp_path / "wrapped", plain)


def test_a_file_an_archive_and_safetensors_are_the_same(asr, tiny_source, tmp_path):
    folder = converted(tiny_source, tmp_path / "folder")
    assert same(converted(tiny_source / "final.pt", tmp_path / "file"), folder)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as opened:
        opened.add(tiny_source, "20210601_exp")
    packed = converted(tmp_path / "a.tar.gz", tmp_path / "archive")
    assert same(packed, folder)
    origin = read_origin(packed)
    assert origin
    assert list(origin.files) == ["a.tar.gz"]
    save_file(weights_of(tiny_source), tiny_source / "model.safetensors")
    (tiny_source / "final.pt").unlink()
    assert same(converted(tiny_source, tmp_path / "safetensors"), folder)


def test_a_damaged_origin_is_told(tiny_source, tmp_path):
    exp = converted(tiny_source, tmp_path / "exp")
    (exp / "origin.json").write_text(json.dumps({"family": "wenet", "notes": []}))
    with pytest.raises(CheckpointError, match=r"origin\.json: damaged"):
        read_origin(exp)


# ---- archives


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 3, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


ARCHIVES = {
    "up": ([member("../evil")], "'../evil' lies outside the archive"),
    "deep up": ([member("a/../../evil")], "lies outside the archive"),
    "absolute": ([member("/tmp/evil")], "'/tmp/evil' lies outside the archive"),
    "backslash": ([member("..\\evil")], "lies outside the archive"),
    "symlink": ([member("a", tarfile.SYMTYPE, 0, "/etc/passwd")], "is a link or a device"),
    "hard link": ([member("a", tarfile.LNKTYPE, 0, "/etc/passwd")], "is a link or a device"),
    "device": ([member("a", tarfile.CHRTYPE, 0)], "is a link or a device"),
    "pipe": ([member("a", tarfile.FIFOTYPE, 0)], "is a link or a device"),
    "twice": ([member("a"), member("./a")], "is there twice"),
    "large": ([member("a", size=2000)], "is too large: 2,000 bytes"),
    "many": ([member(f"a{i}") for i in range(5)], "is one too many, at most 4"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_reaches_outside_is_refused(asr, tmp_path, monkeypatch, kind):
    members, expected = ARCHIVES[kind]
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 4)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar.gz", "w:gz") as opened:
        for x in members:
            opened.addfile(x, io.BytesIO(bytes(x.size)))
    status, _, err = asr("convert", "wenet", tmp_path / "in" / "a.tar.gz", "-o", tmp_path / "out" / "exp")
    assert status == 2
    assert expected in err
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "in",
        "in/a.tar.gz",
        "out",
    ]


def packed(source: Path, file: Path) -> Path:
    with tarfile.open(file, "w:gz") as opened:
        opened.add(source, "exp")
    return file


@pytest.mark.parametrize("place", [-6, None])
def test_an_archive_with_a_wrong_checksum_is_told(asr, tiny_source, tmp_path, place):
    """Whether its last bytes or those of the weights were changed on the way."""
    file = packed(tiny_source, tmp_path / "a.tar.gz")
    data = bytearray(file.read_bytes())
    data[place or len(data) // 2] ^= 0x55
    file.write_bytes(data)
    status, _, err = asr("convert", "wenet", file, "-o", tmp_path / "exp")
    assert status == 2
    assert f"{file}: incomplete archive: " in err
    assert err.endswith("download it again\n")
    assert sorted(tmp_path.iterdir()) == [file, tiny_source]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_an_archive_that_would_fill_the_memory_is_refused(asr, tmp_path, kind):
    with gzip.open(tmp_path / "a.tar.gz", "wb") as out:
        out.write(member("x", kind, 2**30).tobuf(tarfile.GNU_FORMAT))
    status, _, err = asr("convert", "wenet", tmp_path / "a.tar.gz", "-o", tmp_path / "exp")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{tmp_path}/a.tar.gz: a header of 1,073,741,824 bytes, at most 1,048,576 are read" in err


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs", "run git lfs pull"),
        (b"x", "not a tar"),
    ],
)
def test_what_is_no_archive_is_told_in_one_line(asr, tmp_path, data, expected):
    (tmp_path / "a.nemo").write_bytes(data)
    status, _, err = asr("convert", "nemo", tmp_path / "a.nemo", "-o", tmp_path / "exp")
    assert (status, err.count("\n")) == (2, 1)
    assert expected in err


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# A title\n---\nA rule: and: another\n---\n", "not stated"),
        ("---\nlicense: [\n---\n", "not stated"),
        ("caf\xe9", "not stated"),
        ('---\nlicense: "a\\e[2J"\n---\n', "not stated"),
    ],
)
def test_any_model_card_lets_a_model_be_converted(tiny_source, tmp_path, card, expected):
    (tiny_source / "README.md").write_text(card, encoding="latin-1", newline="")
    origin = read_origin(converted(tiny_source, tmp_path / "exp"))
    assert origin
    assert origin.licence == expected


@pytest.mark.parametrize("beside", [True, False])
def test_the_card_of_an_archive_stands_beside_it_or_in_it(tiny_source, tmp_path, beside):
    (tmp_path / "repository").mkdir()
    card = (tmp_path / "repository" if beside else tiny_source) / "README.md"
    card.write_text("---\nlicense: cc-by-4.0\n---\n")
    origin = read_origin(
        converted(packed(tiny_source, tmp_path / "repository" / "a.tar.gz"), tmp_path / "exp")
    )
    assert origin
    assert origin.licence == "cc-by-4.0"


@pytest.mark.parametrize("limit", [0, 1000, 10_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_source, tmp_path, limit):
    program = f"""
import resource, sys
from recipes.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["convert", "wenet", {str(tiny_source)!r}, "-o", {str(tmp_path / "exp")!r}]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"asr: {tmp_path}/exp")
    assert "cannot be written: file too large" in ended.stderr
    assert sorted(tmp_path.iterdir()) == [tiny_source]


@pytest.mark.parametrize("name", [".", "..", "link"])
def test_where_no_folder_can_be_made_is_told_before_anything_is_read(asr, tmp_path, monkeypatch, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "in")
    status, _, err = asr("convert", "wenet", "/none", "-o", name)
    assert status == 2
    assert err.startswith(f"asr: {name}: ")
    assert err.endswith("with -o\n")


def test_the_remedy_fits_where_files_are_missing_or_too_many(asr, tiny_source, tmp_path):
    (tiny_source / "units.txt").rename(tmp_path / "units.txt")
    err = asr("convert", "wenet", tiny_source / "final.pt", "-o", tmp_path / "exp")[2]
    assert "dict.txt beside it; or name a folder that holds both" in err
    for name in ("a.nemo", "b.nemo"):
        (tiny_source / name).touch()
    err = asr("convert", "nemo", tiny_source, "-o", tmp_path / "exp")[2]
    assert "2 archives in it: a.nemo, b.nemo; name one" in err


@pytest.mark.parametrize("suffix", [".tar.gz", ".nemo"])
def test_half_an_archive_is_told(asr, tiny_source, tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    with tarfile.open(file, "w:gz" if "gz" in suffix else "w") as opened:
        opened.add(tiny_source, "exp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    status, _, err = asr("convert", "wenet", file, "-o", tmp_path / "exp")
    assert status == 2
    assert f"{file}: incomplete archive: " in err
    assert not (tmp_path / "exp").exists()
