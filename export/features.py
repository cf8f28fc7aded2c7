"""Log-mel features in a hand-written graph."""

import math
from typing import cast

from asr.features import FLOOR, PREEMPHASIS, Fbank
from asr.model.hybrid import HybridModel
from export.graph import END, Graph


def write_features(graph: Graph, model: HybridModel, window: str) -> str:
    """Samples (N, S) -> normalised log-mel energies (N, T, F): `asr.features.Fbank.frames`."""
    fbank = cast(Fbank, model.fbank)
    block = math.gcd(fbank.frame_samples, fbank.shift_samples)
    step, num_blocks = fbank.shift_samples // block, fbank.frame_samples // block
    half = len(fbank.cosine)
    with graph.scope("fbank"):
        x = graph.add("Mul", window, graph.constant(fbank.config.scale, "float32"))
        x = graph.add("Reshape", x, graph.constant([0, -1, block]))
        ends = [i - num_blocks + 1 or END for i in range(num_blocks)]
        parts = [graph.slice(x, i, end, 1, step) for i, end in enumerate(ends)]
        x = graph.add("Concat", *parts, axis=2)
        x = graph.add("Sub", x, graph.add("ReduceMean", x, graph.constant([-1])))
        before = graph.add("Concat", graph.slice(x, 0, 1, 2), graph.slice(x, 0, -1, 2), axis=2)
        x = graph.add("Sub", x, graph.add("Mul", before, graph.constant(PREEMPHASIS, "float32")))
        late, early = graph.slice(x, -half, END, 2), graph.slice(x, half - 1, -END, 2, -1)
        energies = []
        for name, op in (("cosine", "Add"), ("sine", "Sub")):
            y = graph.add("MatMul", graph.add(op, late, early), graph.weight(name, getattr(fbank, name)))
            energies.append(graph.add("Mul", y, y))
        x = graph.add("MatMul", graph.add("Add", *energies), graph.weight("mel", fbank.mel))
        x = graph.add("Log", graph.add("Max", x, graph.constant(FLOOR, "float32")))
    return write_cmvn(graph, model, x)


def write_cmvn(graph: Graph, model: HybridModel, x: str) -> str:
    """(..., F) -> the same, normalised."""
    with graph.scope("cmvn"):
        x = graph.add("Sub", x, graph.weight("mean", model.cmvn.mean))
        return graph.add("Mul", x, graph.weight("istd", model.cmvn.istd))
