"""A journal of a long job, in a file beside its output, so that the job can resume after any interruption.

    {"asr": "0.1.0", "recording": "3f2a...", ...}        what the job is
    {"end_s": 61.4, "events": [...]}                      a batch that is done
    ...

Only complete lines count: work from the first truncated or damaged line on is done again. A journal of
another recording, model or configuration is discarded. A POSIX lock, which is released however the process
ends, keeps two jobs from writing one output.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from asr.errors import ConfigError, naming_full_disk

if TYPE_CHECKING:
    from asr.runtime.recording import Batch

MAX_NAME_BYTES = 255


class Journal:
    """An open journal."""

    def __init__(self, file: IO[bytes], job: Mapping[str, Any]) -> None:
        self._file = file
        self.batches: list[Batch] = []
        """Batches done by an earlier run."""
        self.changed: list[str] = []
        """In what the job of an earlier run differed, if its journal was discarded."""
        job = json.loads(json.dumps(job))
        lines = list(_lines(file))
        earlier = lines[0][1] if lines else {}
        if earlier == job:
            whole, _ = lines[0]
            with contextlib.suppress(KeyError, TypeError):  # a line in another format
                for end, line in lines[1:]:
                    self.batches.append(_batch(line))
                    whole = end
            file.truncate(whole)
        else:
            self.changed = [key for key in job if earlier.get(key) != job[key]] if lines else []
            file.truncate(0)
            self._write(job)
        self.num_batches = len(self.batches)
        """The number of batches, including those added."""

    def add(self, batch: Batch) -> None:
        """Record a batch; it is on disk when this returns."""
        self._write(asdict(batch))
        self.num_batches += 1

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def open_journal(output: Path, job: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of an output; it is deleted when the job ends without an error, or has done nothing.

    job: everything that the output depends on. ConfigError if another process writes the same output.
    """
    path = hidden(output, ".journal")
    with naming_full_disk(path), path.open("a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{output}: another process is writing it; wait for it, or choose another with -o"
            ) from None
        journal, is_done = None, False
        try:
            journal = Journal(file, job)
            yield journal
            is_done = True
        finally:
            if is_done or not (journal and journal.num_batches):
                path.unlink()


def hidden(output: Path, suffix: str) -> Path:
    """A hidden file beside an output, with a short name if that of the output is too long to be extended."""
    name = f".{output.name}{suffix}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()[:32]}{suffix}"
    return output.with_name(name)


def hash_recording(path: Path) -> str:
    """SHA-256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end position, content) of the lines before the first incomplete one."""
    file.seek(0)
    for line in file:
        try:
            content = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(content, dict):
            return
        yield file.tell(), content


def _batch(line: Mapping[str, Any]) -> Batch:
    from asr.decode.words import Word
    from asr.runtime import Event
    from asr.runtime.recording import Batch

    events = [
        Event(**{**event, "words": tuple(Word(*word) for word in event["words"])}) for event in line["events"]
    ]
    return Batch(tuple(events), line["end_s"])
