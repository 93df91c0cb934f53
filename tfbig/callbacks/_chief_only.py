"""Callbacks that act on the chief alone: `tfbig.callbacks.ChiefOnly`."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig.callbacks import _help
from tfbig.distribute import _workers

__all__ = ("ChiefOnly",)

# Where the other workers help a callback to read what is divided over all workers. After each batch
# it would take too long.
_HELPED = ("on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end")


class ChiefOnly(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Callbacks that write files or print, on the chief alone.

    On the other workers of a job they do nothing. They see the same on all workers: logs are those
    of all samples. Not for callbacks that change training, such as `EarlyStopping`: all workers
    must have them.

    With `shard`, where all workers are needed to read the state of the optimizer, the other workers
    help the chief to save: at the beginning and the end of training and of each epoch, and where a
    `ModelCheckpoint` saves after some batches. Elsewhere a callback that reads that state raises
    `UnsupportedStrategyError`. All workers must have the same `ChiefOnly` then.

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
        self._workers = _workers.Workers.of(tf.distribute.get_strategy())
        # By position: a copy has copies of the callbacks.
        self._saves = {
            i: _SavesOfBatches(c) for i, c in enumerate(self.callbacks) if _saves_by_batches(c)
        }

    def set_params(self, params: dict[str, object]) -> None:
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._workers = _workers.Workers.of(model.distribute_strategy)
        for callback in self.callbacks if self._workers.is_chief else ():
            callback.set_model(model)

    def same_on_all_workers(self, model: keras.Model) -> str | None:
        """What `fit` compares between the workers; None if they may differ."""
        if not _help.is_divided(model):
            return None
        helped = [name for c in self.callbacks for name in _HELPED if _has(c, name)]
        batches = [f"{saves.number} batches" for saves in self._saves.values()]
        return f"ChiefOnly of {', '.join([*helped, *batches])}"

    # Any: what Keras hands to the hooks.
    def _call(self, name: str, *args: Any, **kwargs: Any) -> None:
        for position, callback in enumerate(self.callbacks):
            hook = functools.partial(getattr(callback, name), *args, **kwargs)
            who = f"{type(callback).__name__}.{name}"
            if self._is_helped(position, name, *args):
                _help.act_with_help(self._workers, self.model, who, hook)
            elif self._workers.is_chief:
                with _keras.workers_together.chief_alone(who):
                    hook()

    def _is_helped(self, position: int, name: str, *args: Any) -> bool:
        if self._workers.count == 1 or not _help.is_divided(self.model):
            return False
        if name == "on_train_batch_end" and position in self._saves:
            return self._saves[position].is_due(*args)
        return name in _HELPED and _has(self.callbacks[position], name)


class _SavesOfBatches:
    """Tells when a `ModelCheckpoint` saves that has a number of batches as its `save_freq`.

    If it is wrong, the callback raises instead of saving.

    Args:
        callback: the callback.

    Attributes:
        number: the number of batches.
    """

    def __init__(self, callback: keras.callbacks.ModelCheckpoint) -> None:
        self.number: int = callback.save_freq
        self._seen, self._last = 0, -1

    def is_due(self, batch: int, logs: object = None) -> bool:
        """Whether it saves after this batch, as Keras counts; to be called after each."""
        del logs
        # The first of an epoch counts those before it.
        self._seen += batch - (self._last if batch > self._last else -1)
        self._last = batch
        if self._seen < self.number:
            return False
        self._seen = 0
        return True


def _saves_by_batches(callback: _types.Callback) -> bool:
    return isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_freq != "epoch"


def _has(callback: _types.Callback, name: str) -> bool:
    """Whether a callback does something at a hook."""
    default = getattr(keras.callbacks.Callback, name)
    # A LambdaCallback has functions as attributes.
    return name in vars(callback) or getattr(type(callback), name) is not default


def _forward(name: str) -> Callable[..., None]:
    def call(self: ChiefOnly, *args: object, **kwargs: object) -> None:
        self._call(name, *args, **kwargs)

    call.__name__ = name
    return call


for _name in (
    *(f"on_{run}_{moment}" for run in ("train", "test", "predict") for moment in ("begin", "end")),
    *(f"on_{run}_batch_{end}" for run in ("train", "test", "predict") for end in ("begin", "end")),
    *(f"on_epoch_{moment}" for moment in ("begin", "end")),
):
    setattr(ChiefOnly, _name, _forward(_name))
