"""Trains combinations of the exactness suite on all workers.

    exactness.py DIRECTORY COMBINATION...

A combination is `feature/split/optimizer/batch`. Leaves a digest of each result and, on
the chief, its deviation from plain Keras on one device.
"""

import dataclasses
import hashlib
import sys
import warnings

import keras
import numpy as np

import tfbig
from tests import job
from tests.update import exactness_test as suite
from tfbig import _keras


def digest(result):
    """The same for results that are the same to the bit."""
    leaves = keras.tree.flatten(dataclasses.asdict(result))
    return hashlib.sha256(b"".join(np.asarray(v).tobytes() for v in leaves)).hexdigest()


def main(directory, *combinations):
    keras.config.set_floatx("float64")
    warnings.filterwarnings("ignore", "`gradient_accumulation_steps` is larger")
    strategy = tfbig.distribute.get_strategy(timeout=60)
    result = {"replicas": strategy.num_replicas_in_sync, "digests": {}, "deviations": {}}
    in_one = _keras.collectives._PART_BYTES
    for k, combination in enumerate(combinations):
        # Bytes; the exchange of every other combination has several parts.
        _keras.collectives._PART_BYTES = 64 if k % 2 else in_one
        feature, split, optimizer, batch = combination.split("/")
        keras.backend.clear_session()
        with strategy.scope():
            split_over_workers = suite.train(
                tfbig.Model, feature, optimizer, batch, **suite.SPLITS[split]
            )
        result["digests"][combination] = digest(split_over_workers)
        if tfbig.distribute.is_chief(strategy):
            whole = suite.trained_by_keras(feature, optimizer, batch)
            result["deviations"][combination] = split_over_workers.deviation(whole)
    job.leave(directory, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
