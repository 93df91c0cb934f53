"""What the models of all tasks are made of.

Once this is imported, `keras.saving.load_model` reads those that they saved.
"""

import tfbig  # noqa: F401
from tasks import adversaries, bits, log_mel, transformer  # noqa: F401
