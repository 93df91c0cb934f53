"""The classes that the models of the tasks consist of, for `keras.saving.load_model`.

Keras refuses to load a class that is not its own until it is imported. The model of digits has only
classes of Keras and tfbig, so `import tfbig` is enough for it. The others have what Keras lacks:
language and speech a transformer block with rotary positions, language also an embedding that keeps
the mask of padding and metrics over tokens, speech a log-mel spectrogram that XLA can compile for
TPUs, and gan a `train_step` for two networks. Running this file imports all of them, from any
directory and without a change of `sys.path`:

    runpy.run_path(".../scripts/tasks/saved_models.py")

It needs TensorFlow, Keras, NumPy and tfbig, and defines no flags.
"""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

import tfbig  # noqa: F401


@contextlib.contextmanager
def _first_on_path(directory: pathlib.Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


with _first_on_path(pathlib.Path(__file__).resolve().parents[1]):
    from tasks import adversaries, bits, log_mel, transformer  # noqa: F401
