"""The batches that callbacks count are the updates that training made."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tfbig.callbacks import BackupAndRestore, BatchSizeSchedule
from tfbig.callbacks._batch_count import BatchCount

X, Y = np.ones((20, 4)), np.ones((20, 1))


def build(steps_per_execution=2):
    model = tfbig.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    return model


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)


def unknown(lengths=(5, 5)):
    lengths = iter(lengths)

    def batches():
        for _ in range(next(lengths)):
            yield X[:4], Y[:4]

    spec = tf.TensorSpec((None, 4)), tf.TensorSpec((None, 1))
    return tf.data.Dataset.from_generator(batches, output_signature=spec)


class Count(keras.callbacks.Callback):
    """Counts, and asks the optimizer."""

    def __init__(self):
        super().__init__()
        self.count = BatchCount()
        self.seen = []

    def iterations(self):
        return int(self.model.optimizer.iterations.numpy())

    def on_train_begin(self, logs=None):
        self.before = self.iterations()

    def on_train_batch_begin(self, batch, logs=None):
        self.count.begin(batch)

    def on_train_batch_end(self, batch, logs=None):
        updates = self.count.end(self.model)
        before, self.before = self.before, self.iterations()
        assert updates == self.before - before
        self.seen.append(self.count.done)


DATA = {
    "arrays": (lambda: {"x": X, "y": Y, "batch_size": 4}, [2, 4, 5, 2, 4, 5]),
    "dataset": (lambda: {"x": dataset()}, [2, 4, 5, 2, 4, 5]),
    # Keras's own count of batches goes beyond `steps_per_epoch`, and so does training.
    "steps_per_epoch": (
        lambda: {"x": dataset().repeat(), "steps_per_epoch": 5},
        [2, 4, 6, 2, 4, 6],
    ),
    "data that end": (lambda: {"x": dataset(), "steps_per_epoch": 5}, [2, 4, 5, 2, 4, 5]),
    "unknown length": (lambda: {"x": unknown()}, [2, 4, 5, 2, 4, 5]),
    "unknown length, data that end": (
        lambda: {"x": unknown(), "steps_per_epoch": 7},
        [2, 4, 5, 2, 4, 5],
    ),
    "unknown length, longer in the second epoch": (
        lambda: {"x": unknown([3, 5])},
        [2, 3, 2, 4, 5],
    ),
    "resized": (
        lambda: {"x": X, "y": Y, "callbacks": [BatchSizeSchedule({0: 4})]},
        [2, 4, 5, 2, 4, 5],
    ),
    "resized, of unknown length": (
        lambda: {"x": dataset().filter(lambda *_: True), "callbacks": [BatchSizeSchedule({0: 4})]},
        [2, 4, 5, 2, 4, 5],
    ),
    "resized, steps_per_epoch": (
        lambda: {
            "x": dataset().repeat(),
            "steps_per_epoch": 5,
            "callbacks": [BatchSizeSchedule({0: 4})],
        },
        [2, 4, 6, 2, 4, 6],
    ),
}


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("kind", DATA)
def test_an_execution_counts_the_updates_that_it_made(kind):
    make, expected = DATA[kind]
    arguments, count = make(), Count()
    callbacks = [*arguments.pop("callbacks", ()), count]
    build().fit(**arguments, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    assert count.seen == expected


def test_an_epoch_that_resumes_counts_from_there(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    arguments = {"x": X, "y": Y, "batch_size": 4, "verbose": 0}
    with pytest.raises(KeyboardInterrupt):
        build().fit(callbacks=[BackupAndRestore(tmp_path, save_freq=2), Interrupt()], **arguments)
    count = Count()
    build(steps_per_execution=1).fit(callbacks=[count, BackupAndRestore(tmp_path)], **arguments)
    assert count.seen == [3, 4, 5]
