"""Speed of the features, and how many times that of kaldi-native-fbank it is, on one thread, in turns.

    python tools/bench_fbank.py

Seconds of audio per second of processor time, in pieces of a file of 60 s: ours as the graph of a bundle has
them, matrix products in onnxruntime, and as torch computes them; kaldi-native-fbank (an extra of `dev`) with
its frames read out one by one, as a program has to. Medians over the rounds of the ratios of neighbours, with
the smallest and the largest, and the largest difference of a log-mel value.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import kaldi_native_fbank
import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.export import Dim

from asr.decode.scorer import Floats
from asr.features import Fbank, FbankConfig
from asr.runtime.bundle import session_options
from export.onnx import Trace, export
from export.verify import made_sound

SECONDS, ROUNDS, RATE = 60, 7, 16000
PIECES_S = (0.64, 60.0)


class Graph(nn.Module):
    def __init__(self, fbank: Fbank) -> None:
        super().__init__()
        self.fbank = fbank

    def forward(self, window: Tensor) -> tuple[Tensor]:
        return (self.fbank.frames(window),)


def windows(samples: Floats, fbank: Fbank, piece_s: float) -> list[Floats]:
    """Windows as in a stream: whole frames, with the samples that neighbours share."""
    shift, extra = fbank.shift_samples, fbank.frame_samples - fbank.shift_samples
    size = round(piece_s * RATE) // shift * shift
    cut = [samples[None, at : at + size + extra] for at in range(0, len(samples), size)]
    return [x for x in cut if x.shape[1] >= fbank.frame_samples]


def kaldi(samples: Floats, piece_s: float) -> Floats:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins, options.mel_opts.high_freq = 80, -400
    fbank, size = kaldi_native_fbank.OnlineFbank(options), round(piece_s * RATE)
    frames: list[Floats] = []
    for at in range(0, len(samples), size):
        fbank.accept_waveform(RATE, samples[at : at + size])
        while len(frames) < fbank.num_frames_ready:
            frames.append(fbank.get_frame(len(frames)))
    return np.stack(frames)


def graph_frames(session: ort.InferenceSession, parts: list[Floats]) -> Floats:
    return np.concatenate([session.run(None, {"window": x})[0][0] for x in parts])


def torch_frames(fbank: Fbank, parts: list[Floats]) -> Floats:
    return np.concatenate([fbank.frames(torch.from_numpy(x))[0].numpy() for x in parts])


def main() -> None:
    torch.set_num_threads(1)
    fbank, samples = Fbank(FbankConfig()).eval(), made_sound(SECONDS, RATE)
    shift, extra = fbank.shift_samples, fbank.frame_samples - fbank.shift_samples
    example = {"window": torch.randn(1, 8 * shift + extra)}
    dynamic = {"window": {1: shift * Dim("T", min=1) + extra}}
    graph = export(Trace(Graph(fbank).eval(), example, dynamic, ["x"], 0), "fbank")
    session = ort.InferenceSession(graph.SerializeToString(), session_options(1))
    for piece_s in PIECES_S:
        parts = windows(samples, fbank, piece_s)
        ways: dict[str, Callable[[], Floats]] = {
            "kaldi-native-fbank": partial(kaldi, samples, piece_s),
            "graph": partial(graph_frames, session, parts),
            "torch": partial(torch_frames, fbank, parts),
        }
        found = {name: way() for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.process_time()
                way()
                seconds[name].append(time.process_time() - start)
        for name, took in seconds.items():
            ratios = [b / a for a, b in zip(took, seconds["kaldi-native-fbank"], strict=True)]
            num = min(map(len, found.values()))
            apart = np.abs(found[name][:num] - found["kaldi-native-fbank"][:num]).max()
            print(
                f"{piece_s:5.2f} s  {name:19} {SECONDS / statistics.median(took):6,.0f} s/s  "
                f"{statistics.median(ratios):4.2f} [{min(ratios):.2f}..{max(ratios):.2f}]  apart {apart:.0e}"
            )


if __name__ == "__main__":
    main()
