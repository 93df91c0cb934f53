"""The classes that the models of the tasks consist of, for `keras.saving.load_model`.

Keras refuses to load a class of someone else's until it is imported. The model of digits has no
class but those of Keras and tfbig, so `import tfbig` is enough for it. The others have what Keras
lacks: language and speech a transformer block with rotary positions, language also an embedding
that keeps the mask of padding and metrics over tokens, speech a log-mel spectrogram that XLA can
compile for TPUs, and gan a `train_step` for two networks. One line imports all of them:

    import tasks.saved_models  # With scripts/ on PYTHONPATH.

This module needs TensorFlow, Keras, NumPy and tfbig, and defines no flags.
"""

import tfbig  # noqa: F401
from tasks import adversaries, bits, log_mel, transformer  # noqa: F401
