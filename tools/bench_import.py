"""How long the first impression takes: wall seconds of a fresh interpreter, the median of several.

python tools/bench_import.py [repeats]
"""

import statistics
import subprocess
import sys
import time

CASES = {
    "python, nothing imported": ["-c", "pass"],
    "import asr": ["-c", "import asr"],
    "asr --help": ["-m", "recipes.cli", "--help"],
    "asr transcribe --help": ["-m", "recipes.cli", "transcribe", "--help"],
    "import asr.runtime": ["-c", "import asr.runtime"],
}


def seconds(arguments: list[str], repeats: int) -> float:
    """Median wall seconds of `python ARGUMENTS`, after one call that warms the disk."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for name, arguments in CASES.items():
        print(f"{name:25} {seconds(arguments, repeats):.3f} s")
