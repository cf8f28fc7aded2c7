"""A lock against two training runs in one folder.

It is a POSIX lock: it ends with the process however that ends, data workers do not inherit it, and it works
across hosts if the file system supports that. The file's contents only name the holder.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from asr.errors import TrainingError


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder`/lock. Raises TrainingError that names the process that already holds it."""
    path = folder / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise TrainingError(
                f"{folder}: {holder} is training here; wait for it or choose another --exp"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
