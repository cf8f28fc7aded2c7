"""One training in one folder.

The lock is POSIX's, which ends with the process however it ends, is not inherited by the processes that read
data, and reaches other hosts where the file system carries it. The file only says who holds it.
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
    """Hold `folder`/lock. Raises TrainingError naming the process that does."""
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
