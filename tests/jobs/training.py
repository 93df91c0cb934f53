"""Trains a small model with everything that a backup has to hold.

    training.py DIRECTORY BACKUP_DIR [--save_freq N] [--seconds S] [--strategy KIND] ...

Leaves all weights and optimizer variables of the chief in DIRECTORY/end.npz, its last logs in
end.json, and those of all epochs since it was started in history.json. A line "update N" is printed
after each update.
"""

import argparse
import json
import os
import pathlib
import signal
import time

import keras
import numpy as np
import tensorflow as tf

import tfbig
from tfbig.distribute import _sharded_weights

SAMPLES, BATCH, EPOCHS = 60, 16, 4
UPDATES = EPOCHS * 4


class Progress(keras.callbacks.Callback):
    """Prints each update, makes it last, and dies after one of them."""

    def __init__(self, seconds, last):
        super().__init__()
        self.seconds, self.last = seconds, last

    def on_train_batch_end(self, batch, logs=None):
        update = int(self.model.optimizer.iterations.numpy())
        print("update", update, flush=True)
        if update == self.last:
            os._exit(1)
        time.sleep(self.seconds)


class TerminateInValidation(keras.callbacks.Callback):
    """Sends SIGTERM to this worker in its first validation, once in a run of restarts."""

    def __init__(self, marker):
        super().__init__()
        self.marker = marker

    def on_test_batch_begin(self, batch, logs=None):
        if not self.marker.exists():
            self.marker.touch()
            signal.raise_signal(signal.SIGTERM)


def arrays():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(SAMPLES, n)).astype(keras.config.floatx()) for n in (4, 2)]


def data(kind, sizes, batch_size):
    """Arguments of fit: arrays that Keras shuffles, or a dataset that shuffles itself."""
    x, y = arrays()
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": None if sizes else batch_size}
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(SAMPLES)
    if kind == "steps":
        # Each epoch ends within the data, which go on in the next.
        return {"x": dataset.batch(batch_size).repeat(), "steps_per_epoch": 3}
    if kind == "unknown":
        dataset = dataset.filter(lambda x, y: x[0] < 10)
    return {"x": dataset.batch(batch_size)}


def build(options):
    # Those of this model are smaller than what is divided else.
    _sharded_weights.SMALLEST = 1
    of_replicas = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)]
    model = tfbig.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(options.width, "relu"),
            *([] if options.exact else of_replicas),
            keras.layers.Dense(options.units),
        ],
        gradient_accumulation_steps=2,
        shard=options.shard,
        pipeline=tfbig.distribute.Pipeline(["CPU:0", "CPU:1"]) if options.pipeline else None,
        log_gradient_noise_scale=options.sizes == "noise_scale",
        loss_scale=tfbig.DynamicLossScale(initial_scale=2.0**10, growth_interval=3),
    )
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 4 * options.epochs)
    model.compile(
        keras.optimizers.AdamW(schedule, use_ema=True)
        if options.optimizer == "adamw"
        else keras.optimizers.SGD(schedule, momentum=0.9),
        "mse",
        metrics=["mae"],
        steps_per_execution=options.steps_per_execution,
    )
    return model


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("backup_dir")
    parser.add_argument("--save_freq", default="3")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--data", default="arrays")
    parser.add_argument("--steps_per_execution", type=int, default=1)
    parser.add_argument("--width", type=int, default=8, help="units of the hidden layer")
    parser.add_argument("--units", type=int, default=2)
    parser.add_argument("--terminate_in_validation", action="store_true")
    parser.add_argument("--shard")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--pipeline", action="store_true", help="two stages")
    parser.add_argument("--save_on_background", action="store_true")
    parser.add_argument("--batch_size", type=int, default=BATCH)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--keep", type=int, default=1, help="backups")
    parser.add_argument("--monitor", help="directory of a TrainingMonitor")
    parser.add_argument("--last", type=int, help="the update after which the program dies")
    parser.add_argument(
        "--sizes",
        type=json.loads,
        help="""of a BatchSizeSchedule: '[[0, 8], ...]' or '"noise_scale"'""",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="in float64, without layers whose outputs depend on the number of replicas",
    )
    return parser.parse_args()


def main():
    options = parse()
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(5)
    if options.exact:
        keras.config.set_floatx("float64")
    if options.pipeline:
        (cpu,) = tf.config.list_physical_devices("CPU")
        device = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [device, device])
    devices = 2 if options.strategy == "mirrored" else None
    strategy = tfbig.distribute.get_strategy(options.strategy, devices=devices, timeout=60)
    with strategy.scope():
        model = build(options)
    callbacks = [Progress(options.seconds, options.last)]
    if options.sizes == "noise_scale":
        callbacks.append(
            tfbig.callbacks.BatchSizeSchedule("noise_scale", bounds=(4, 24), interval=4)
        )
    elif options.sizes:
        callbacks.append(
            tfbig.callbacks.BatchSizeSchedule(dict(options.sizes), learning_rate="square_root")
        )
    if options.monitor:
        callbacks.append(tfbig.callbacks.TrainingMonitor(options.monitor, frequency=1, plot=False))
    if options.terminate_in_validation and not tfbig.distribute.is_chief(strategy):
        callbacks.append(TerminateInValidation(options.directory / "terminated"))
    save_freq = options.save_freq if options.save_freq == "epoch" else int(options.save_freq)
    backup = tfbig.callbacks.BackupAndRestore(
        options.backup_dir,
        save_freq,
        save_on_background=options.save_on_background,
        keep=options.keep,
    )
    history = model.fit(
        **data(options.data, options.sizes, options.batch_size),
        epochs=options.epochs,
        verbose=0,
        callbacks=[backup, *callbacks],
        validation_data=arrays(),
        validation_batch_size=BATCH,
    )
    # All workers take part in reading what is divided over them.
    values = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
    if tfbig.distribute.is_chief(strategy):
        np.savez(options.directory / "end.npz", *values)
        logs = {k: v[-1] for k, v in history.history.items()}
        (options.directory / "end.json").write_text(json.dumps(logs))
        (options.directory / "history.json").write_text(json.dumps(history.history))


if __name__ == "__main__":
    main()
