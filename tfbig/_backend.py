"""Refuses any Keras backend but TensorFlow, before Keras is imported."""

import json
import os
import pathlib

from tfbig import errors


def check(backend: str) -> None:
    """Raises `BackendError` unless `backend` is "tensorflow"."""
    if backend != "tensorflow":
        raise errors.BackendError(
            f"tfbig needs Keras on the TensorFlow backend. Received: {backend!r}. Set the "
            "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
        )


def _configured() -> str:
    """The backend that Keras will use, found where Keras looks for it."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = pathlib.Path(os.environ.get("KERAS_HOME") or pathlib.Path.home() / ".keras")
    try:
        backend: str | None = json.loads((home / "keras.json").read_text()).get("backend")
    except (OSError, ValueError):
        backend = None
    return backend or "tensorflow"


# Keras itself would fail to import on a backend that is not installed.
check(_configured())
