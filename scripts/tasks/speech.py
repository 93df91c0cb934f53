"""Speech: convolutions and a transformer recognize words from waveforms.

espeak-ng speaks them. Validation uses voices that are not in the training data.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

import command_line
import numpy as np
from absl import flags

from tasks import espeak, spoken_words, task

if TYPE_CHECKING:
    import keras
    from training.settings import Settings

DEFAULTS = task.Defaults(batch_size=64, epochs=20, learning_rate=0.002)

_TRAIN_SPEAKERS = (
    *("m1", "m2", "m3", "m4", "m6", "m7", "f1", "f2", "f3", "f5", "klatt", "klatt3"),
    *("Alex", "Alicia", "Andy", "Annie", "Gene", "Lee", "adam", "anika", "aunty", "belinda"),
    *("boris", "ed", "grandma", "ian", "john", "max", "paul", "quincy", "steph", "zac"),
)
_HELD_OUT_SPEAKERS = ("m5", "m8", "f4", "klatt2", "Michael", "Andrea", "linda", "edward")
_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")


def _voices(speakers: tuple[str, ...]) -> list[str]:
    """The speakers, with the accents of English in turn."""
    return [f"{_ACCENTS[i % len(_ACCENTS)]}+{speaker}" for i, speaker in enumerate(speakers)]


_VOICES = flags.DEFINE_list(
    "voices", _voices(_TRAIN_SPEAKERS), "speech: voices to train on, names of espeak-ng."
)
_HELD_OUT_VOICES = flags.DEFINE_list(
    "held_out_voices", _voices(_HELD_OUT_SPEAKERS), "speech: voices to validate with."
)
_TAKES = flags.DEFINE_integer(
    "takes",
    5,
    "speech: how often a voice says each word, at other speeds and pitches and in other noise.",
    lower_bound=1,
)
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir", None, "speech: where recordings are kept. By default ~/.cache/tfbig."
)
FLAGS = ("voices", "held_out_voices", "takes")


@flags.multi_flags_validator(
    ["voices", "held_out_voices"], "a voice is for training or for validation, and both need one"
)
def _are_apart(values: dict[str, Any]) -> bool:
    train, held_out = set(values["voices"]), set(values["held_out_voices"])
    return bool(train and held_out) and not train & held_out


def load(settings: Settings) -> task.Task:
    """The task.

    Raises:
        MissingExtraError: Without espeak-ng.
        UsageError: If it lacks a voice of the flags.
    """
    import keras

    import tfbig

    try:
        spoken_words.check_voices([*_VOICES.value, *_HELD_OUT_VOICES.value])
    except espeak.UnknownVoiceError as e:
        raise command_line.UsageError(e) from None
    train, validation = _recordings()
    return task.Task(
        train=train,
        validation=validation,
        make_model=lambda **options: tfbig.Model(*_layers(), **options),
        make_optimizer=lambda rate, updates: keras.optimizers.AdamW(
            task.falling(rate, updates, warmup=updates // 20),
            weight_decay=0.05,
            global_clipnorm=1.0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        make_metrics=lambda: ["accuracy"],
        measure="val_accuracy",
        bar=0.90,
        conclude=lambda model, path: _confused(model, validation),
    )


def _recordings() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    directory = pathlib.Path(_CACHE_DIR.value or pathlib.Path(home) / "tfbig")
    settings = spoken_words.Settings(_VOICES.value, _HELD_OUT_VOICES.value, _TAKES.value)
    # Checked before minutes are spent on recordings that cannot be kept.
    command_line.make_writable(directory, "cache_dir")
    return spoken_words.recordings(settings, directory)


def _layers(width: int = 96, depth: int = 2) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    import keras
    from keras import layers

    from tasks import log_mel, transformer

    inputs = keras.Input((spoken_words.SAMPLES,), dtype=keras.config.floatx(), name="waveform")
    x = log_mel.LogMel(spoken_words.SAMPLE_RATE, name="log_mel")(inputs)
    # So that neither a single band nor the noise of its recording gives a word away.
    x = layers.SpatialDropout1D(0.2, name="bands_dropout")(x)
    x = layers.GaussianNoise(0.3, name="noise")(x)
    # 78 frames of 10 ms become 20 positions.
    for i in range(2):
        x = layers.Conv1D(width, 5, strides=2, padding="same", name=f"convolution_{i}")(x)
        x = layers.LayerNormalization(name=f"norm_{i}")(x)
        x = layers.Activation("gelu", name=f"gelu_{i}")(x)
    for i in range(depth):
        x = transformer.Block(depth, causal=False, name=f"block_{i}")(x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="mean")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    # Logits are at least float32: a softmax in float16 loses its tail.
    logits = layers.Dense(len(spoken_words.WORDS), dtype=keras.config.floatx(), name="logits")
    return inputs, logits(x)


def _confused(model: keras.Model, validation: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """Lines that name the words most often mistaken for others."""
    x, y = validation
    taken = np.concatenate(
        [np.argmax(model(part, training=False), axis=-1) for part in _parts(x, 64)]
    )
    wrong = [
        (spoken_words.WORDS[a], spoken_words.WORDS[b])
        for a, b in zip(y, taken, strict=True)
        if a != b
    ]
    most = sorted(set(wrong), key=lambda pair: (-wrong.count(pair), pair))[:3]
    said = ", ".join(f"{a} for {b} ({wrong.count((a, b))})" for a, b in most)
    return ["", f"{len(wrong)} of {len(y)} words of unknown voices are mistaken. Most: {said}"]


def _parts(x: np.ndarray, size: int) -> list[np.ndarray]:
    return [x[i : i + size] for i in range(0, len(x), size)]
