"""Trains with `shard` on all workers, and saves on all of them.

    sharding.py DIRECTORY OPTIMIZER/SHARD...

Leaves the deviations from plain Keras on one device, of the programs of the suite's optimizers and
of the files of the last of them.
"""

import pathlib
import sys
import warnings

import keras
import numpy as np

import tfbig
from tests import job
from tests.update import sharding_test as suite
from tfbig import _keras
from tfbig.distribute import _sharded_weights


def deviation(found, expected):
    pairs = zip(found, expected, strict=True)
    assert [np.shape(a) for a in found] == [np.shape(b) for b in expected]
    return max(float(np.max(np.abs(np.subtract(a, b)), initial=0)) for a, b in pairs)


def sharded(strategy, optimizer, shard):
    with strategy.scope():
        model = tfbig.Model(*suite.graph(), shard=shard, **suite.OPTIONS.get(optimizer, {}))
        model.set_weights(suite.initial_weights())
        suite.compile_model(model, optimizer)
    suite.assert_divided(model)
    return model


def trained(strategy, optimizer, shard):
    """The deviation of a model that is trained on all workers."""
    expected_history, expected = suite.plain(optimizer)
    model = sharded(strategy, optimizer, shard)
    history = suite.fit(model)
    # A loss scale adds to it.
    found = [*suite.state(model), *(history[name] for name in expected_history)]
    return deviation(found, [*expected, *expected_history.values()])


def saved(strategy, optimizer, shard, directory):
    """The deviations of what is loaded from files that all workers write, and of what follows."""
    directory.mkdir()
    whole = keras.Model(*suite.graph())
    whole.set_weights(suite.initial_weights())
    suite.compile_model(whole, optimizer)
    suite.fit(whole, epochs=1)
    expected = suite.state(whole)
    model = sharded(strategy, optimizer, shard)
    suite.fit(model, epochs=1)
    model.save(directory / "model.keras")
    model.save_weights(directory / "model.weights.h5")
    one = keras.models.load_model(directory / "model.keras", custom_objects={"Tied": suite.Tied})
    twin = keras.Model(*suite.graph())
    suite.compile_model(twin, optimizer)
    twin.optimizer.build(twin.trainable_variables)
    twin.load_weights(directory / "model.weights.h5")
    loaded = {"model.keras": one, "model.weights.h5": twin}
    deviations = {name: deviation(suite.state(m), expected) for name, m in loaded.items()}
    # With an average of the weights, this is not what two epochs at once are.
    suite.fit(whole, epochs=1)
    expected = suite.state(whole)
    for name, m in {**loaded, "the model": model}.items():
        suite.fit(m, epochs=1)
        deviations[f"{name}, trained on"] = deviation(suite.state(m), expected)
    return deviations


def initial(strategy):
    """Whether weights that are divided from the start have the values that the chief draws."""
    # Else, each worker's pieces would be of another initialization.
    keras.utils.set_random_seed(strategy.cluster_resolver.task_id)
    with tfbig.distribute.sharded_weights(strategy):
        model = tfbig.Model(*suite.graph(), shard="weights")
    keras.utils.set_random_seed(0)
    expected = keras.Model(*suite.graph()).get_weights()
    return deviation(model.get_weights(), expected) == 0


def main(directory, *programs):
    directory = pathlib.Path(directory)
    keras.config.set_floatx("float64")
    warnings.filterwarnings("ignore", "`gradient_accumulation_steps` is larger")
    strategy = tfbig.distribute.get_strategy(timeout=60)
    worker = strategy.cluster_resolver.task_id
    _sharded_weights.SMALLEST = 1
    # Bytes: these models' exchanges have several parts.
    _keras.collectives._PART_BYTES = 64
    deviations = {name: trained(strategy, *name.split("/")) for name in programs}
    files = saved(strategy, *programs[-1].split("/"), directory / f"worker_{worker}")
    results = {"deviations": deviations, "files": files, "is_of_chief": initial(strategy)}
    job.leave(directory, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
