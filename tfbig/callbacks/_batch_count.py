"""How many batches of an epoch are done, and how many updates the last execution made."""

import keras

from tfbig import _keras

__all__ = ("BatchCount",)


class BatchCount:
    """Counts batches for a callback that passes on what its hooks receive.

    The batch number that Keras passes to `on_train_batch_end` is no count: with
    `steps_per_execution` it may lie beyond the end of the data.

    Attributes:
        done: how many batches of the epoch are done, including those before training resumed.
    """

    def __init__(self) -> None:
        self.done = 0

    def begin(self, batch: int) -> None:
        """To be called in `on_train_batch_begin`, with the number of the batch."""
        self.done = batch

    def end(self, model: keras.Model) -> int:
        """To be called in `on_train_batch_end`; returns the number of updates since `begin`."""
        updates = _keras.epoch_iterator.batches_of_execution(_keras.epoch_iterator.of_fit(model))
        self.done += updates
        return updates
