"""Files and folders written atomically, even if the process is killed or the disk fills up.

A folder is written under a temporary name, each file and the folder itself are flushed to disk, and then it
is renamed. Its meta.json holds the size and SHA-256 of each file, and readers verify them.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asr.errors import DISK_FULL, CheckpointError

META = "meta.json"
UNFINISHED = ".tmp"
DISCARDED = ".old"


def write_file(path: Path, data: bytes) -> None:
    """Replace a file atomically: a reader sees the old one or the new one."""
    unfinished = path.with_name(path.name + UNFINISHED)
    _guard_space(path, len(data))
    try:
        _write(unfinished, data)
        os.replace(unfinished, path)
        _flush_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise _explain(error, path, len(data)) from error


def write_folder(path: Path, files: Mapping[str, bytes], meta: dict[str, Any]) -> None:
    """Write files and meta.json into a new folder. On failure, raises CheckpointError and leaves nothing."""
    listed = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    head = json.dumps({**meta, "files": listed}, indent=2).encode()
    needed = len(head) + sum(map(len, files.values()))
    unfinished = path.with_name(path.name + UNFINISHED)
    path.parent.mkdir(parents=True, exist_ok=True)
    _guard_space(path, needed)
    try:
        unfinished.mkdir()
        for name, data in {**files, META: head}.items():
            _write(unfinished / name, data)
        _flush_folder(unfinished)
        if path.exists():
            discard(path)
        os.replace(unfinished, path)
        _flush_folder(path.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise _explain(error, path, needed) from error


def verify_folder(path: Path) -> dict[str, Any]:
    """The meta.json of a folder, once all its files are verified. CheckpointError names the first bad one."""
    meta = read_meta(path)
    for name, expected in meta["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: damaged; its SHA-256 is not that of {META}")
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    file = path / META
    try:
        meta = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        raise CheckpointError(f"{file}: damaged; not JSON") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise CheckpointError(f"{file}: damaged; it lists no files")
    return meta


def discard(path: Path) -> None:
    """Rename a folder, then remove it, so that it is never half there. What cannot be renamed stays."""
    discarded = path.with_name(path.name + DISCARDED)
    shutil.rmtree(discarded, ignore_errors=True)
    try:
        os.replace(path, discarded)
    except OSError:
        return
    shutil.rmtree(discarded, ignore_errors=True)


def remove_litter(folder: Path) -> None:
    """Remove what an earlier process left unfinished."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in (UNFINISHED, DISCARDED):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _guard_space(path: Path, needed: int) -> None:
    if needed > shutil.disk_usage(path.parent).free:
        raise _explain(OSError(errno.ENOSPC, "No space left on device"), path, needed)


def _explain(error: OSError, path: Path, needed: int) -> CheckpointError:
    reason = (error.strerror or str(error)).lower()
    if error.errno not in DISK_FULL:
        return CheckpointError(f"{path}: cannot be written: {reason}")
    free = shutil.disk_usage(path.parent).free
    return CheckpointError(
        f"{path}: cannot be written: {reason}; {needed:,} bytes needed, {free:,} free; "
        "earlier checkpoints are as they were"
    )
