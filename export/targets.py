"""What a bundle can be built for: add yours here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """How the float32 graphs of a model become those of a bundle."""

    summary: str

    quantized: bool
    """Matrices as signed 8-bit integers (`export/quantize.py`)."""


TARGETS: dict[str, Target] = {
    "cpu-fp32": Target("float32 throughout: the reference", quantized=False),
    "cpu-int8": Target("8-bit matrices: a quarter of the size, and faster", quantized=True),
}
