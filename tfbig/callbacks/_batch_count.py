"""How many batches of an epoch are done, and how many updates the last execution made."""

import keras

__all__ = ("BatchCount",)


class BatchCount:
    """Counts batches for a callback that passes on what its hooks receive.

    The batch number that Keras passes to `on_train_batch_end` is no count: with
    `steps_per_execution` it may lie beyond the end of the data.

    Attributes:
        done: how many batches of the epoch are done, including those before training resumed.
        is_cut_short: whether the data ended within the last execution.
    """

    def __init__(self) -> None:
        self.done = 0
        self.is_cut_short = False

    def begin(self, batch: int) -> None:
        """To be called in `on_train_batch_begin`, with the number of the batch."""
        # Of data of unknown length, Keras begins an execution beyond their end.
        if not self.is_cut_short or batch < self.done:
            self.done, self.is_cut_short = batch, False

    def end(self, model: keras.Model) -> int:
        """To be called in `on_train_batch_end`; returns the number of updates since `begin`."""
        taken = model.batches_of_execution
        updates = model.steps_per_execution if taken is None else int(taken)
        self.done += updates
        self.is_cut_short = updates < model.steps_per_execution
        return updates
