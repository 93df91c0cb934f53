"""Trains with a loss scale; some batches hold infinite samples of one worker.

    non_finite.py DIRECTORY PRECISION STEPS REPLICA

Leaves, after each update, the logs and a digest of the weights.
"""

import hashlib
import sys

import keras
import numpy as np

import tfbig
from tests import job

BATCH, UPDATES, BAD_UPDATE = 8, 6, 2


class Record(keras.callbacks.Callback):
    """What holds after each update."""

    def __init__(self):
        super().__init__()
        self.updates = []

    def on_train_batch_end(self, batch, logs=None):
        weights = b"".join(w.tobytes() for w in self.model.get_weights())
        self.updates.append(
            {
                "digest": hashlib.sha256(weights).hexdigest(),
                "finite": bool(np.all([np.isfinite(w).all() for w in self.model.get_weights()])),
                "scale": float(logs["loss_scale"]),
                "skipped": int(logs["skipped_updates"]),
                "iterations": int(self.model.optimizer.iterations.numpy()),
            }
        )


def main(directory, precision, steps, replica):
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(precision)
    strategy = tfbig.distribute.get_strategy("multi_worker", timeout=60)
    with strategy.scope():
        model = tfbig.Sequential(
            [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)],
            gradient_accumulation_steps=int(steps),
            # Low enough for float16 not to overflow by itself.
            loss_scale=tfbig.DynamicLossScale(initial_scale=2.0**8),
        )
        model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * UPDATES, 3)).astype("float32")
    y = rng.normal(size=(BATCH * UPDATES, 1)).astype("float32")
    share = BATCH // strategy.num_replicas_in_sync
    # The last sample of this replica's share of one batch.
    x[BAD_UPDATE * BATCH + (int(replica) + 1) * share - 1, 0] = np.inf
    record = Record()
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[record])
    job.leave(directory, record.updates)


if __name__ == "__main__":
    main(*sys.argv[1:])
