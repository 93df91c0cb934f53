"""Speech from text, offline, by the library of espeak-ng."""

import contextlib
import ctypes
import ctypes.util
import functools
import pathlib

import command_line
import numpy as np

# Of espeak-ng's speak_lib.h.
_RETRIEVAL, _POSITION_CHARACTER, _UTF8, _OK = 1, 1, 1, 0
_RATE, _PITCH = 1, 3

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class UnknownVoiceError(ValueError):
    """espeak-ng has no such voice."""


class Espeak:
    """The library, which a process can start once: use `start()`.

    Attributes:
        sample_rate: int, in Hz.
    """

    def __init__(self):
        path, data = _library()
        self._library = ctypes.CDLL(path)
        self.sample_rate = self._library.espeak_Initialize(_RETRIEVAL, 0, data, 0)
        if self.sample_rate <= 0:
            raise OSError(f"espeak-ng does not start: {path}, with data in {data}")
        self._pieces = []
        # Kept, as the library keeps only its address.
        self._callback = _CALLBACK(self._take)
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Info.restype = ctypes.c_char_p
        data_path = ctypes.c_char_p()
        self.version = self._library.espeak_Info(ctypes.byref(data_path)).decode()
        self._variants = pathlib.Path(data_path.value.decode()) / "voices" / "!v"

    def _take(self, samples, count, events):
        if samples and count:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def set_voice(self, voice):
        """Sets who speaks: a language, and after a plus one of its variants, as in en-us+f1.

        Raises:
            UnknownVoiceError: If there is no such language or variant.
        """
        variant = voice.partition("+")[2]
        # Of a variant that it does not know espeak-ng says nothing, and takes none.
        is_known = not variant or (self._variants / variant).is_file()
        if not is_known or self._library.espeak_SetVoiceByName(voice.encode()) != _OK:
            raise UnknownVoiceError(
                f"espeak-ng has no voice {voice!r}. `espeak-ng --voices` lists languages, "
                f"and {self._variants} holds variants, which follow a plus: en-us+f1."
            )

    def say(self, text, rate, pitch):
        """What the voice says, without silence before and after.

        Args:
            text: str.
            rate: int, words a minute; 175 is usual.
            pitch: int, from 0 to 99; 50 is usual.

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
def start():
    """The started library.

    Raises:
        MissingExtraError: If there is none.
    """
    return Espeak()


def _library():
    """Path of the shared library, and of its data; None where it knows them itself."""
    with contextlib.suppress(ImportError):
        import espeakng_loader

        return espeakng_loader.get_library_path(), espeakng_loader.get_data_path().encode()
    if found := ctypes.util.find_library("espeak-ng"):  # Debian's, say.
        return found, None
    raise command_line.MissingExtraError("--task=speech", "speech")
