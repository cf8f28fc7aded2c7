"""Word error rate against latency of several reports of `asr bench --latency -o FILE.json` in one figure.

python tools/draw_latency.py FILE.json ... FILE.png
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from export.latency import draw


def main(arguments: Sequence[str]) -> None:
    *reports, out = map(Path, arguments)
    rows = [row for report in reports for row in json.loads(report.read_text(encoding="utf-8"))["settings"]]
    draw(rows, out)


if __name__ == "__main__":
    main(sys.argv[1:])
