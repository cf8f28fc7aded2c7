"""curves.png: loss, word error rate and learning rate over the steps."""

from pathlib import Path
from typing import Any

PANELS = (
    ("loss per token", (("train", "loss"), ("valid", "loss"))),
    ("word error rate (%)", (("valid", "wer"),)),
    ("learning rate", (("train", "lr"),)),
)


def draw_curves(rows: list[dict[str, Any]], file: Path) -> None:
    """rows: the lines of metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for kind, name in curves:
            points = [(row["step"], row[name]) for row in rows if row["kind"] == kind]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), label=kind)
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(file, dpi=100)
