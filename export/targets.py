"""What a bundle can be built for: add yours here. The word before the first dash is the device it runs on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from asr.runtime.bundle import Bundle
from export.float16 import to_float16
from export.gate import Convert
from export.int4 import to_int4
from export.quantize import KEPT, quantize
from export.static import calibrate
from export.verify import Utterance

Calibrate = Callable[[Bundle, Mapping[str, onnx.ModelProto], Sequence[Utterance]], Convert]
"""The float32 bundle, its graphs, and calibration utterances -> what converts the graphs."""

QUANTIZED = f"{', '.join(KEPT.values())}  (export/quantize.py says why)"


@dataclass(frozen=True)
class Target:
    """How the float32 graphs of a model become those of a bundle; with neither function, unchanged."""

    summary: str

    convert: Convert | None = None
    """Converts a graph to the target."""

    calibrate: Calibrate | None = None
    """Makes such a converter by calibration."""

    kept: str = ""
    """A description of what stays in float32."""

    def converter(
        self, float32: Bundle, graphs: Mapping[str, onnx.ModelProto], utterances: Sequence[Utterance]
    ) -> Convert | None:
        """The converter of graphs to the target, calibrated on utterances if necessary."""
        return self.calibrate(float32, graphs, utterances) if self.calibrate else self.convert


TARGETS: dict[str, Target] = {
    "cpu-fp32": Target("float32 throughout: the reference"),
    "cpu-int8": Target("8-bit matrices: a quarter of the size, and faster", quantize, kept=QUANTIZED),
    "cpu-int8-static": Target(
        "8 bits, activations scaled beforehand: no call depends on its company",
        calibrate=calibrate,
        kept=QUANTIZED,
    ),
    "cpu-int4": Target("4-bit matrices: the smallest", to_int4, kept=QUANTIZED),
    "cuda-fp16": Target(
        "layers in 16 bits, for a GPU", to_float16, kept="features, positions, log-probabilities"
    ),
}
