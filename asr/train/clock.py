"""CPU time of a training run: this process and its data workers."""

import multiprocessing
import os
import resource
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s() -> float:
    """CPU seconds of this process and of its finished and running children."""
    total = 0.0
    children = [child.pid for child in multiprocessing.active_children()]
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total + sum(_living_cpu_s(pid) for pid in children if pid)


def _living_cpu_s(pid: int) -> float:
    try:
        # after the program name, which may contain spaces, user and system time are fields 11 and 12
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def peak_memory_bytes() -> int:
    """The peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
