"""Spoken words in many voices, speeds, pitches and noise levels, made by espeak-ng and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile

import numpy as np

from tasks import espeak

# Half of espeak-ng's.
SAMPLE_RATE = 11_025
SAMPLES = 8_820  # 0.8 s, enough for a slow "seven".

WORDS = (
    *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)

_ARRAYS = ("x", "y", "held_out_x", "held_out_y")

# Incremented when the same settings give other recordings.
_FORMAT = 1


@dataclasses.dataclass
class Settings:
    """What is spoken, and how.

    Attributes:
        voices: Names of espeak-ng, such as en-us+f1.
        held_out_voices: Those of the validation.
        takes: How often each voice says each word.
        seed: Of rate, pitch, noise and position.
        slowest, fastest: Words per minute.
        lowest, highest: Pitches from 0 to 99.
        noisiest, quietest: By how many decibels the word is louder than white noise.
    """

    voices: list[str]
    held_out_voices: list[str]
    takes: int
    seed: int = 1
    slowest: int = 140
    fastest: int = 230
    lowest: int = 25
    highest: int = 75
    noisiest: float = 5.0
    quietest: float = 30.0


def check_voices(voices: list[str]) -> None:
    """Raises UnknownVoiceError if espeak-ng lacks a voice."""
    speaker = espeak.start()
    for voice in voices:
        speaker.set_voice(voice)


def recordings(
    settings: Settings, directory: pathlib.Path
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Recordings of the words, read from the directory if it holds them, else kept there.

    Returns:
        Two pairs `(x, y)`, of the voices and of the held-out voices: waveforms from -1 to 1,
        float32 of shape `(recordings, SAMPLES)`, and the indices of their words.
    """
    about = [_FORMAT, espeak.start().version, WORDS, SAMPLES, dataclasses.asdict(settings)]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = directory / f"spoken-words-{digest}.npz"
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            arrays = [file[name] for name in _ARRAYS]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # There is no file, or it is damaged.
        arrays = _synthesise(settings)
        _keep(path, arrays)
    x, y, held_out_x, held_out_y = arrays
    return (_waveforms(x), y), (_waveforms(held_out_x), held_out_y)


def _waveforms(x: np.ndarray) -> np.ndarray:
    return x.astype("float32") / 2**15


def _keep(path: pathlib.Path, arrays: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step, since other workers may do the same.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **dict(zip(_ARRAYS, arrays, strict=True)))
    temporary.replace(path)


def _synthesise(settings: Settings) -> list[np.ndarray]:
    # All at once: espeak-ng keeps state from word to word, so that the same words give the same
    # samples only in the same order from the start of a process.
    random = np.random.default_rng(settings.seed)
    return [
        *_spoken(settings.voices, settings, random),
        *_spoken(settings.held_out_voices, settings, random),
    ]


def _spoken(
    voices: list[str], settings: Settings, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    speaker = espeak.start()
    x, y = [], []
    for voice in voices:
        speaker.set_voice(voice)
        for index, word in enumerate(WORDS):
            for _ in range(settings.takes):
                rate = int(random.integers(settings.slowest, settings.fastest + 1))
                pitch = int(random.integers(settings.lowest, settings.highest + 1))
                decibels = random.uniform(settings.noisiest, settings.quietest)
                spoken = _halved(speaker.say(word, rate, pitch))
                x.append(_recorded(spoken, decibels, random))
                y.append(index)
    return np.stack(x), np.array(y, "int32")


def _halved(samples: np.ndarray) -> np.ndarray:
    """Every other sample, after a low-pass filter against aliasing."""
    return np.convolve(samples.astype("float64"), [0.25, 0.5, 0.25], "same")[::2]


def _recorded(spoken: np.ndarray, decibels: float, random: np.random.Generator) -> np.ndarray:
    """A recording with noise and the word at a random position, int16."""
    spoken = spoken[:SAMPLES]
    begin = random.integers(SAMPLES - len(spoken) + 1)
    power = np.mean(spoken**2) if len(spoken) else 1.0
    noise = random.standard_normal(SAMPLES) * np.sqrt(power / 10 ** (decibels / 10))
    noise[begin : begin + len(spoken)] += spoken
    loudness = random.uniform(0.1, 0.9) * 2**15
    return np.round(noise * (loudness / np.abs(noise).max())).astype("int16")
