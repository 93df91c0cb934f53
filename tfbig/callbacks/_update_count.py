"""How many updates a model has made, even with an optimizer that the model does not hold."""

import weakref

import keras

from tfbig import _keras, _types

__all__ = ("UpdateCount",)

# For each model: the updates that it counts, and those seen here. The two differ if `train_step` is
# the user's, with an optimizer that the model does not hold.
_COUNTS: weakref.WeakKeyDictionary[keras.Model, tuple[int, int]] = weakref.WeakKeyDictionary()


class UpdateCount:
    """The updates since the model was made, including those that were skipped or taken back.

    With an optimizer that the model does not hold, only those that were added to `updates`.

    Args:
        model: the tfbig model whose `fit` is beginning.

    Attributes:
        updates: the number of updates. The caller adds those that it sees.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        _, self._before = self._optimizer_and_updates()
        known, seen = _COUNTS.get(model, (self._before, self._before))
        self.updates: int = seen if known == self._before else self._before

    def correct(self) -> _types.Optimizer | None:
        """Replaces the number by what the model counts; returns the optimizer, if it is held."""
        optimizer, updates = self._optimizer_and_updates()
        if updates == self._before:
            optimizer = None  # The model does not hold it; the updates seen here count.
        else:
            self.updates = updates
        _COUNTS[self.model] = updates, self.updates
        return optimizer

    def _optimizer_and_updates(self) -> tuple[_types.Optimizer | None, int]:
        """The optimizer with the most updates, and the updates that the model counts."""
        # Not that of `compile`, which makes one that may never be used.
        optimizers = [optimizer for _, optimizer in _keras.optimizer.optimizers_of(self.model)]
        optimizer = max(optimizers, key=lambda o: int(o.iterations.numpy()), default=None)
        updates = int(optimizer.iterations.numpy()) if optimizer else 0
        # A model without loss scaling has no count of skipped updates.
        left_out = getattr(self.model, "skipped_updates", 0) + self.model.left_out_updates
        return optimizer, updates + left_out
