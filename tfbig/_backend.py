"""Refuses another Keras backend than TensorFlow, before Keras is imported."""

import json
import os
import pathlib

from tfbig import errors


def check(backend):
    """Raises `BackendError` unless `backend` is "tensorflow"."""
    if backend != "tensorflow":
        raise errors.BackendError(
            f"tfbig needs Keras on the TensorFlow backend. Received: {backend!r}. Set the "
            "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
        )


def _configured():
    """The backend that Keras is going to use, as it looks for it."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = pathlib.Path(os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras")
    try:
        return json.loads((home / "keras.json").read_text()).get("backend") or "tensorflow"
    except (OSError, ValueError):
        return "tensorflow"


# Keras itself would fail to import on a backend that is not installed.
check(_configured())
