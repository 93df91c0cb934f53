"""Refuses another Keras backend than TensorFlow, before Keras is imported."""

import os

from tfbig import errors


def check(backend, source):
    """Raises `BackendError` unless `backend` is "tensorflow"."""
    if backend != "tensorflow":
        raise errors.BackendError(
            "tfbig needs Keras on the TensorFlow backend. Received: "
            f"{backend!r} (from {source}). Set the environment variable "
            "KERAS_BACKEND=tensorflow before Keras is imported."
        )


# Keras itself would fail here on a backend that is not installed.
check(os.environ.get("KERAS_BACKEND") or "tensorflow", "KERAS_BACKEND")
