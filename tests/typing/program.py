"""A program as people write it; `typing_test.py` has a type checker read it.

A line with a comment `error: rule` must be reported for that rule, every other line must not.
"""

from typing import assert_type

import keras
import numpy as np

import tfbig
from tfbig import tuners

x, y = np.ones((8, 4)), np.ones((8, 1))
inputs = keras.Input((4,))
outputs = keras.layers.Dense(1)(inputs)

model = tfbig.Model(
    inputs,
    outputs,
    name="net",
    gradient_accumulation_steps=4,
    loss_scale=tfbig.DynamicLossScale(initial_scale=2.0**10),
    log_grad_norm=True,
    log_gradient_noise_scale=False,
    recompute=True,
    exchange_dtype="bfloat16",
)
assert_type(model, tfbig.Model)
model.compile("adam", "mse")
history = model.fit(
    x, y, batch_size=8, epochs=2, callbacks=[tfbig.callbacks.BackupAndRestore("backup")]
)
assert_type(history, keras.callbacks.History)
model.fit(x, y, epoch=2)  # error: reportCallIssue
model.evaluate(x, y)
model.predict(x)
model.save("model.keras")
assert_type(model.gradient_accumulation_steps, int | None)
assert_type(model.micro_batch_size, int | None)
assert_type(model.loss_scale, float | None)
assert_type(model.skipped_updates, int)
assert_type(model.log_grad_norm, bool)
model.micro_batch_size = 2
tfbig.Model(inputs, outputs, gradient_accumulation_step=4)  # error: reportCallIssue
tfbig.Model(inputs, outputs, micro_batch_size=4.5)  # error: reportArgumentType
tfbig.Model(inputs, outputs, loss_scale=[2.0])  # error: reportArgumentType

sequential = tfbig.Sequential([keras.layers.Dense(1)], micro_batch_size="auto", memory_budget=2**30)
sequential.add(keras.layers.Dense(1))
sequential.fit(x, y)
tfbig.Sequential([], recomputed=True)  # error: reportCallIssue


class Net(tfbig.Model):
    """A subclass with an argument of its own."""

    def __init__(self, units: int):
        super().__init__(micro_batch_size=4)
        self.dense = keras.layers.Dense(units)

    def call(self, x):
        return self.dense(x)


net = Net(3)
assert_type(net, Net)
net.fit(x, y)
assert_type(net.micro_batch_size, int | None)

extended = tfbig.extend(keras.Sequential([keras.layers.Dense(1)]), micro_batch_size=4)
assert_type(extended, tfbig.Model)
extended.fit(x, y)
assert_type(tfbig.extend(keras.Sequential), type[keras.Sequential])
tfbig.extend(extended, micro_batchsize=4)  # error: reportCallIssue

report = tfbig.check_equivalence(extended, x, y)
assert_type(report.is_equivalent, bool)
assert_type(report.causes, list[str])

tuner = tuners.RandomSearch(lambda hp: extended, objective="val_loss", max_trials=2)
tuner.search(x, y)
best = tuner.get_best_models()[0]
best.fit(x, y)
assert_type(tuner.get_best_models(num_models=2), list[keras.Model])

oracle = tuners.oracles.RandomSearchOracle("val_loss", max_trials=2, seed=0, storage="memory")
assert_type(tuners.Tuner(oracle, lambda hp: extended).oracle, tuners.Oracle)
tuners.oracles.GridSearchOracle("val_loss", max_trial=2)  # error: reportCallIssue
tuners.SklearnTuner(oracle, lambda hp: None, scoring="r2").search(x, y, groups=None)
