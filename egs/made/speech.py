"""Speech made by eSpeak NG: the library in the wheel `espeakng-loader`, through ctypes.

A voice is an accent and a timbre ("en-us+test7"). The engine has few timbres of its own, robots and whispers
among them, so ours are drawn: vocal tracts of any length. The engine remembers what it said before (the phase
of a wave, a generator of noise), so samples are the same again if a fresh process says the same in the same
order.
"""

import ctypes
import os
import random
from collections.abc import Iterable
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
class Timbre:
    """A person, as far as eSpeak can be one."""

    name: str
    variant: str
    """What a file of `voices/!v` says of it."""


def draw_timbre(name: str, rng: random.Random) -> Timbre:
    """A vocal tract between a child's and a large man's, all formants shifted about alike; a pitch to go with
    it; a little hoarse, or not."""
    shift = rng.uniform(0.88, 1.2)
    pitch = 90 * shift**3 * rng.uniform(0.8, 1.3)
    lines = [
        f"language variant\nname {name}",
        f"pitch {pitch:.0f} {pitch * rng.uniform(1.25, 1.6):.0f}",
        f"flutter {rng.randint(0, 4)}\nroughness {rng.randint(0, 3)}",
        f"voicing {rng.randint(80, 120)}\nconsonants {rng.randint(70, 130)} {rng.randint(70, 130)}",
    ]
    for number in range(9):
        formant = [100 * shift * rng.uniform(0.95, 1.05), rng.uniform(80, 115), rng.uniform(90, 130)]
        lines.append(f"formant {number} " + " ".join(f"{percent:.0f}" for percent in formant))
    return Timbre(name, "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Spoken:
    """An utterance and how it is spoken."""

    text: str
    accent: str
    timbre: Timbre
    words_per_minute: int = 175
    pitch: int = 50
    """0 to 100, about that of the timbre."""

    pitch_range: int = 50
    """0 is a monotone, 100 is lively."""

    snr_db: float = 30.0
    """Speech to noise."""

    seed: int = 0
    """Of the noise."""

    @property
    def voice(self) -> str:
        return f"{self.accent}+{self.timbre.name}"


def lay_out_data(folder: Path, timbres: Iterable[Timbre]) -> None:
    """The data of eSpeak in `folder`, by links, with our timbres in the place of its own."""
    source = Path(espeakng_loader.get_data_path())
    voices, variants = Path("voices"), Path("voices/!v")
    (folder / source.name / variants).mkdir(parents=True)
    for place, replaced in ((Path(), voices), (voices, variants)):
        for entry in (source / place).iterdir():
            if entry.name != replaced.name:
                (folder / source.name / place / entry.name).symlink_to(entry)
    for timbre in timbres:
        (folder / source.name / variants / timbre.name).write_text(timbre.variant)


class Engine:
    """eSpeak NG in this process, of which there can be one; it changes the working directory."""

    def __init__(self, folder: Path) -> None:
        """folder: see `lay_out_data`."""
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
