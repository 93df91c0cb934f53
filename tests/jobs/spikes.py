"""Trains with a `SpikeGuard`; some batches have huge targets.

    spikes.py DIRECTORY SHARD

Leaves the weights at the end, and what the guard did.
"""

import json
import sys

import keras

import tfbig
from tests import job
from tests.callbacks import spike_guard_test


def main(directory, shard):
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(1)
    strategy = tfbig.distribute.get_strategy("multi_worker", timeout=60)
    with strategy.scope():
        model = tfbig.Sequential(
            spike_guard_test.layers(), gradient_accumulation_steps=2, shard=json.loads(shard)
        )
        model.compile(spike_guard_test.OPTIMIZERS["adam"](), "mse")
    guard = tfbig.callbacks.SpikeGuard(factor=20, window=3, patience=3, snapshot_every=4)
    x, y = spike_guard_test.batches("ggggggsggsssggg")
    spike_guard_test.fit(model, x, y, guard)
    result = {
        "weights": [w.tolist() for w in model.get_weights()],
        "iterations": int(model.optimizer.iterations.numpy()),
        "spikes": guard.spikes,
        "rollbacks": guard.rollbacks,
    }
    job.leave(directory, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
