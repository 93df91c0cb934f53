"""What plain Keras and TensorFlow do on several workers.

    plain_keras.py DIRECTORY CASE...

Leaves what came of each case.
"""

import signal
import sys

import keras
import numpy as np
import tensorflow as tf

from tests import job


def compiled(strategy, **kwargs):
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")]
        )
        model.compile(**{"optimizer": "sgd", "loss": "mse"} | kwargs)
    return model


def fit_builds(strategy):
    """Keras reduces the first batch over the workers to learn its shape."""
    model = compiled(strategy, metrics=["mae"])
    model.fit(np.ones((6, 1)), np.ones((6, 1)), batch_size=3, verbose=0)


def fit_logs(strategy):
    """Everything is built; what remains is the reduction of the logs."""
    model = compiled(strategy)
    model.optimizer.build(model.trainable_variables)
    model._symbolic_build(data_batch=(np.ones((2, 1)), np.ones((2, 1))))
    model._maybe_symbolic_build = lambda **_: None
    model.fit(np.ones((8, 1)), np.ones((8, 1)), batch_size=4, verbose=0)


def scaled(strategy):
    """A loss scale, with an infinite sample on worker 1 alone."""
    with strategy.scope():
        w = keras.Variable([1.0])
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0))
        optimizer.build([w])

    @tf.function
    def step(x):
        def replica_step(x):
            gradient = tf.convert_to_tensor(x) * tf.ones_like(w.value)
            optimizer.apply([gradient], [w])

        strategy.run(replica_step, args=(x,))

    index = strategy.cluster_resolver.task_id
    step(np.float32("inf") if index else np.float32(1))


def sigterm(strategy):
    """SIGTERM, which the server that the strategy starts handles."""
    del strategy
    signal.raise_signal(signal.SIGTERM)


def main(directory, *cases):
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    result = {}
    for case in cases:
        try:
            globals()[case](strategy)
            result[case] = "done"
        except (ValueError, tf.errors.OpError) as e:
            result[case] = f"{type(e).__name__}: {e}"
    job.leave(directory, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
