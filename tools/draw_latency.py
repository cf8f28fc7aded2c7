"""Word error rate against latency of several reports of `asr bench --latency -o FILE.json` in one figure.

python tools/draw_latency.py FILE.json ... FILE.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from export.latency import draw


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("out", type=Path, metavar="FILE.png")
    given = parser.parse_args(arguments)
    texts = [report.read_text(encoding="utf-8") for report in given.reports]
    draw([row for text in texts for row in json.loads(text)["settings"]], given.out)


if __name__ == "__main__":
    main()
