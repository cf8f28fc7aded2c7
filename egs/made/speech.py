"""Speech made by eSpeak NG: the library in the wheel `espeakng-loader`, through ctypes.

A voice is an accent and a timbre ("en-us+f3"). The engine remembers what it said before (the phase of a wave,
a generator of noise), so samples are the same again if a fresh process says the same in the same order.
"""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from asr.audio import SAMPLE_RATE
from asr.errors import AudioError, MissingExtra

try:
    import espeakng_loader
except ModuleNotFoundError:
    raise MissingExtra("espeakng-loader", "made") from None

ACCENTS = ["en-us", "en-us-nyc", "en", "en-gb-x-rp", "en-gb-x-gbclan"]  # "en" is British

RATE, PITCH, PITCH_RANGE = 1, 3, 4  # espeak_PARAMETER
SYNCHRONOUS, DO_NOT_EXIT, UTF8 = 2, 0x8000, 1

Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Spoken:
    """An utterance and how it is spoken."""

    text: str
    accent: str
    timbre: str
    words_per_minute: int = 175
    pitch: int = 50
    """0 to 100."""

    pitch_range: int = 50
    """0 is a monotone, 100 is lively."""

    snr_db: float = 30.0
    """Speech to noise."""

    seed: int = 0
    """Of the noise."""

    @property
    def voice(self) -> str:
        return f"{self.accent}+{self.timbre}"


MACHINES = ("robosoft", "klatt", "UniRobot", "anikaRobot", "Demonic", "croak", "whisper", "iven", "ian")

MAX_SPREAD = 1.3
"""A vocal tract is longer or shorter as a whole: a person's first three formants are shifted about alike."""


def timbres() -> list[str]:
    """Names of the timbres that might be a person's."""
    files = (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir()
    return sorted(
        file.name
        for file in files
        if not file.name.startswith(MACHINES) and spread(file.read_text(errors="replace")) <= MAX_SPREAD
    )


def spread(timbre: str) -> float:
    """The largest shift of the first three formants over the smallest: 140 / 90 of
    "formant 1 90 90 90", "formant 2 140 140 140"; what is not told is at 100."""
    shifts = {"1": 100.0, "2": 100.0, "3": 100.0}
    for line in timbre.splitlines():
        match line.split():
            case ["formant", number, shift, *_] if number in shifts:
                shifts[number] = float(shift)
    return max(shifts.values()) / max(1.0, min(shifts.values()))


class Engine:
    """eSpeak NG in this process, of which there can be one; it changes the working directory."""

    def __init__(self) -> None:
        folder = Path(espeakng_loader.get_data_path()).parent
        os.chdir(folder)  # eSpeak keeps no more than 160 bytes of a path
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate = self.library.espeak_Initialize(SYNCHRONOUS, 0, b".", DO_NOT_EXIT)
        if self.sample_rate <= 0:
            raise AudioError(f"{folder}: eSpeak NG cannot use its data; install espeakng-loader again")
        self.parts: list[np.ndarray] = []
        self.callback = Callback(self._keep)  # it must live as long as the library may call it
        self.library.espeak_SetSynthCallback(self.callback)

    def _keep(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: object) -> int:
        if count > 0:
            self.parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, spoken: Spoken) -> np.ndarray:
        """(S,) float32 at 16 kHz, with noise and some silence around. AudioError for an unknown voice."""
        if self.library.espeak_SetVoiceByName(spoken.voice.encode()):
            raise AudioError(f"eSpeak NG has no voice {spoken.voice}")
        self.library.espeak_SetParameter(RATE, spoken.words_per_minute, 0)
        self.library.espeak_SetParameter(PITCH, spoken.pitch, 0)
        self.library.espeak_SetParameter(PITCH_RANGE, spoken.pitch_range, 0)
        self.parts.clear()
        text = spoken.text.encode()
        self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, UTF8, None, None)
        samples = np.concatenate(self.parts) / np.float32(32768)
        return surround(soxr.resample(samples, self.sample_rate, SAMPLE_RATE), spoken)


def surround(samples: np.ndarray, spoken: Spoken) -> np.ndarray:
    """Some silence before and after, noise over all of it, and any level."""
    rng = np.random.default_rng(spoken.seed)
    before, after = (rng.uniform(0.1, 0.4, size=2) * SAMPLE_RATE).astype(int)
    samples = np.pad(samples, (before, after))
    noise = coloured_noise(len(samples), rng)
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-spoken.snr_db / 20)
    mixed = samples + noise
    return (mixed * rng.uniform(0.1, 0.9) / np.abs(mixed).max()).astype(np.float32)


def coloured_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Between white and brown, drawn anew each time."""
    padded = 1 << length.bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(padded, dtype=np.float32))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** rng.uniform(0, 1)
    return np.fft.irfft(spectrum)[:length]
