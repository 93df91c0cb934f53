"""Offline speech synthesis by the library of espeak-ng."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import pathlib
from typing import Any

import command_line
import numpy as np

# From espeak-ng's speak_lib.h.
_RETRIEVAL, _POSITION_CHARACTER, _UTF8, _OK = 1, 1, 1, 0
_RATE, _PITCH = 1, 3

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class UnknownVoiceError(ValueError):
    """espeak-ng has no such voice."""


class Espeak:
    """The library, which a process can start only once: use `start()`.

    Attributes:
        sample_rate: In Hz.
    """

    def __init__(self) -> None:
        path, data = _library()
        self._library = ctypes.CDLL(path)
        self.sample_rate = self._library.espeak_Initialize(_RETRIEVAL, 0, data, 0)
        if self.sample_rate <= 0:
            raise OSError(f"espeak-ng does not start: {path}, with data in {data}")
        self._pieces: list[np.ndarray] = []
        # Referenced here, since the library keeps only its address.
        self._callback = _CALLBACK(self._take)
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Info.restype = ctypes.c_char_p
        data_path = ctypes.c_char_p()
        self.version = self._library.espeak_Info(ctypes.byref(data_path)).decode()
        self._variants = pathlib.Path(data_path.value.decode()) / "voices" / "!v"

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def set_voice(self, voice: str) -> None:
        """Sets who speaks: a language and, after a plus, a variant, as in en-us+f1.

        Raises:
            UnknownVoiceError: If there is no such language or variant.
        """
        variant = voice.partition("+")[2]
        # espeak-ng silently ignores an unknown variant.
        is_known = not variant or (self._variants / variant).is_file()
        if not is_known or self._library.espeak_SetVoiceByName(voice.encode()) != _OK:
            raise UnknownVoiceError(
                f"espeak-ng has no voice {voice!r}. `espeak-ng --voices` lists languages, "
                f"and {self._variants} holds variants, which follow a plus: en-us+f1."
            )

    def say(self, text: str, rate: int, pitch: int) -> np.ndarray:
        """What the voice says, without silence before and after.

        Args:
            text: What to say.
            rate: Words per minute; 175 is usual.
            pitch: From 0 to 99; 50 is usual.

        Returns:
            Samples, an int16 vector.
        """
        self._pieces.clear()
        self._library.espeak_SetParameter(_RATE, int(rate), 0)
        self._library.espeak_SetParameter(_PITCH, int(pitch), 0)
        encoded = text.encode()
        self._library.espeak_Synth(
            encoded, len(encoded) + 1, 0, _POSITION_CHARACTER, 0, _UTF8, None, None
        )
        self._library.espeak_Synchronize()
        samples = np.concatenate([np.zeros(0, "int16"), *self._pieces])
        (loud,) = np.nonzero(np.abs(samples.astype("int32")) > 100)
        return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


@functools.cache
def start() -> Espeak:
    """The library, started.

    Raises:
        MissingExtraError: If it is not installed.
    """
    return Espeak()


def _library() -> tuple[str, bytes | None]:
    """Path of the shared library, and of its data; None if the library knows where they are."""
    with contextlib.suppress(ImportError):
        import espeakng_loader

        return espeakng_loader.get_library_path(), espeakng_loader.get_data_path().encode()
    if found := ctypes.util.find_library("espeak-ng"):  # As on Debian.
        return found, None
    raise command_line.MissingExtraError("--task=speech", "speech")
