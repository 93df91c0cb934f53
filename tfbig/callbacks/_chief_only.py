"""Callbacks that act on the chief alone: `tfbig.callbacks.ChiefOnly`."""

from collections.abc import Callable

import keras

from tfbig import _types, errors
from tfbig.distribute import _workers

__all__ = ("ChiefOnly",)


class ChiefOnly(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Callbacks that write files or print, on the chief alone.

    On the other workers of a job they do nothing. They see the same on all workers: logs are those
    of all samples. Not for callbacks that change training, such as `EarlyStopping`: all workers
    must have them.

    Args:
        callbacks: A callback, or several.

    Raises:
        InvalidOptionError: If an argument is not a Keras callback.

    Example:

    >>> callback = tfbig.callbacks.ChiefOnly(keras.callbacks.CSVLogger("history.csv"))
    """

    # Callbacks, one by one or in nested lists.
    def __init__(self, *callbacks: _types.Structure) -> None:
        super().__init__()
        self.callbacks: list[_types.Callback] = keras.tree.flatten(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise errors.InvalidOptionError(
                    f"`callbacks` must be Keras callbacks. Received: {callback!r}."
                )
            if hasattr(callback, "around_fit"):
                raise errors.InvalidOptionError(
                    f"All workers must have this callback. Received: {type(callback).__name__} in "
                    "ChiefOnly. Pass it to `fit` itself: only the chief writes."
                )
        self._active = self.callbacks

    def set_params(self, params: dict[str, object]) -> None:
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        is_chief = _workers.Workers.of(model.distribute_strategy).is_chief
        self._active = self.callbacks if is_chief else []
        for callback in self._active:
            callback.set_model(model)


def _forward(name: str) -> Callable[..., None]:
    def call(self: ChiefOnly, *args: object, **kwargs: object) -> None:
        for callback in self._active:
            getattr(callback, name)(*args, **kwargs)

    call.__name__ = name
    return call


for _name in (
    *(f"on_{run}_{moment}" for run in ("train", "test", "predict") for moment in ("begin", "end")),
    *(f"on_{run}_batch_{end}" for run in ("train", "test", "predict") for end in ("begin", "end")),
    *(f"on_epoch_{moment}" for moment in ("begin", "end")),
):
    setattr(ChiefOnly, _name, _forward(_name))
