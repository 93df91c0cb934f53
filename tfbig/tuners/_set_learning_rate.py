"""Has a copy of a model go on with a learning rate of its own."""

import keras

from tfbig import _keras, _types

__all__ = ("SetLearningRate",)


class SetLearningRate(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Replaces the learning rates that a backup restores by those of the model's builder.

    Args:
        epoch: The epoch at whose beginning it does so, from 0.
    """

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self._epoch = epoch

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._rates = []
        for _, optimizer in _keras.optimizer.optimizers_of(model):
            inner = getattr(optimizer, "inner_optimizer", optimizer)
            rate = getattr(inner, "_learning_rate", None)
            # A schedule or a function stays, and an optimizer need not have a rate.
            if isinstance(rate, keras.Variable):
                self._rates.append((inner, float(rate.numpy())))

    def on_epoch_begin(self, epoch: int, logs: _types.Logs | None = None) -> None:
        for optimizer, rate in self._rates if epoch == self._epoch else ():
            optimizer.learning_rate = rate
