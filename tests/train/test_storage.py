"""A folder is complete or absent, whatever happens while it is written."""

import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from asr.errors import CheckpointError
from asr.train.storage import discard, remove_litter, verify_folder, write_file, write_folder

FILES = {"a.bin": b"a" * 300_000, "b.bin": b"b" * 300_000}


def write_forever(folder: Path) -> None:
    step = max([int(p.name) for p in folder.iterdir() if p.name.isdigit()], default=0)
    while True:
        step += 1
        write_folder(folder / f"{step}", FILES, {"step": step})
        write_file(folder / "latest", f"{step}".encode())
        discard(folder / f"{step - 2}")


def test_twenty_kills_at_random_moments_leave_what_verifies(tmp_path: Path, children: Any) -> None:
    def latest() -> int:
        file = tmp_path / "latest"
        return int(file.read_text()) if file.exists() else 0

    rng, unfinished, last = random.Random(0), 0, 0
    for _ in range(20):
        child = children.start(write_forever, tmp_path)
        while latest() <= last:
            assert child.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        child.join()
        unfinished += any(path.suffix == ".tmp" for path in tmp_path.iterdir())
        remove_litter(tmp_path)
        folders = sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir())
        assert all(verify_folder(tmp_path / f"{step}")["step"] == step for step in folders)
        assert folders[-1] >= latest() > last
        last = folders[-1]
    assert unfinished  # some did find a folder being written


def write_more_than_may_be(folder: Path) -> None:
    said = os.open(folder / "heard", os.O_WRONLY | os.O_CREAT)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        write_folder(folder / "2", FILES, {"step": 2})
    except CheckpointError as error:
        os.write(said, str(error).encode())


def test_a_full_disk_leaves_what_was_there_and_says_how_much_is_missing(
    tmp_path: Path, children: Any
) -> None:
    write_folder(tmp_path / "1", FILES, {"step": 1})
    children.start(write_more_than_may_be, tmp_path).join()
    message = (tmp_path / "heard").read_text()
    assert str(tmp_path / "2") in message
    assert "600," in message
    assert "free" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "heard"]
    assert verify_folder(tmp_path / "1")["step"] == 1


class Usage:
    free = 1000


def test_a_disk_known_to_be_too_small_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match=r"no space left on device; 600,.* bytes needed, 1,000 free"):
        write_folder(tmp_path / "1", FILES, {"step": 1})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((CheckpointError, FileExistsError, NotADirectoryError)):
        write_folder(tmp_path / "file" / "1", FILES, {"step": 1})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin: missing"),
        (lambda f: os.truncate(f / "a.bin", 10), "a.bin: 10 bytes, expected 300000"),
        (lambda f: (f / "a.bin").write_bytes(b"x" * 300_000), "a.bin: damaged"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json: damaged; not JSON"),
        (lambda f: (f / "meta.json").write_text("{}"), "meta.json: damaged; it lists no files"),
        (lambda f: (f / "meta.json").unlink(), "meta.json: no such file"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, harm: Any, message: str) -> None:
    write_folder(tmp_path / "1", FILES, {"step": 1})
    harm(tmp_path / "1")
    with pytest.raises(CheckpointError, match=message):
        verify_folder(tmp_path / "1")


def test_a_folder_replaces_one_of_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "1", {"a": b"old", "b": b"old"}, {"step": 1})
    write_folder(tmp_path / "1", {"a": b"new"}, {"step": 1})
    verify_folder(tmp_path / "1")
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["a", "meta.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
