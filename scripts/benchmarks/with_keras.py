"""Measures one row of benchmark.py that is written in Keras, in this process.

Started as `python -m benchmarks.with_keras`, with `scripts` on the path.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import stage_devices

from benchmarks import floor, models, process, rows

if TYPE_CHECKING:
    import keras
    import numpy as np

STAGES = 2  # Of the row "pipeline".


def configure(names: list[str], threads: int) -> None:
    """Gives TensorFlow the threads and devices of rows; before its first operation.

    Args:
        names: The rows of this process.
        threads: Threads of an operation; stages divide them, unless other rows are there too.
    """
    import tensorflow as tf

    of_operation, operations = threads, threads
    if "pipeline" in names:
        stage_devices.make_logical_cpus(STAGES)
        operations = max(STAGES, threads)
    # A process has one setting, and other rows have one device to use all cores.
    if set(names) == {"pipeline"}:
        of_operation = max(1, threads // STAGES)
    tf.config.threading.set_intra_op_parallelism_threads(of_operation)
    tf.config.threading.set_inter_op_parallelism_threads(operations)


def _batches(x: np.ndarray, y: np.ndarray, calls: int, repeats: int) -> Any:
    """One effective batch as `calls` batches of `fit`, repeated.

    The data take the memory of one effective batch, however many are trained on.

    Returns:
        What `fit` of the Keras backend takes: a `tf.data.Dataset` or a `PyDataset`.
    """
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x, y = (a.reshape(calls, -1, *a.shape[1:]) for a in (x, y))
        return tf.data.Dataset.from_tensor_slices((x, y)).repeat(repeats)

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return calls * repeats

        def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
            size = len(x) // calls
            part = slice(i % calls * size, (i % calls + 1) * size)
            return x[part], y[part]

    return Batches()


def make_model(
    row: str, k: int, inputs: keras.KerasTensor, outputs: keras.KerasTensor
) -> keras.Model:
    """The compiled model of a row, for `k` micro-batches per update."""
    import keras

    if row in rows.OF_TFBIG:
        import tfbig

        # Passed only where it is measured, so that a fault in it fails no other row.
        options: dict[str, Any] = {"recompute": True} if row == "recompute" else {}
        if row == "pipeline":
            options["pipeline"] = tfbig.distribute.Pipeline(stage_devices.names("CPU", STAGES))
        model = tfbig.Model(inputs, outputs, gradient_accumulation_steps=k, **options)
    else:
        model = keras.Model(inputs, outputs)
    built_in = row in ("built_in", "built_in_jit", "jax")
    # Of plain Keras, "auto" means False on a CPU.
    jit_compile: bool | str = "auto" if row in rows.OF_TFBIG and row != "no_jit" else False
    if row in ("jit", "built_in_jit", "jax"):
        jit_compile = True
    model.compile(
        keras.optimizers.Adam(
            process.LEARNING_RATE,
            epsilon=process.EPSILON,
            gradient_accumulation_steps=k if built_in and k > 1 else None,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    return model


def _peak_of_gpu() -> float:
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20


def measure(task: process.Task) -> None:
    """Trains and prints the measurement."""
    if task.hardware == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["KERAS_BACKEND"] = "jax" if task.row == "jax" else "tensorflow"
    if task.row == "jax":
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        configure([task.row], task.threads)
    import keras

    if task.row != "jax":
        import tfbig  # noqa: F401  In every row, since memory is counted from here.

    keras.utils.set_random_seed(0)
    x, y = models.data(task.model, task.batch_size)
    k = task.gradient_accumulation_steps
    # tfbig splits the batch itself.
    calls = 1 if task.row in ("whole", *rows.OF_TFBIG) else k
    measurement = process.Measurement(
        task, process.peak_mib if task.hardware == "cpu" else _peak_of_gpu
    )

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict[str, Any]) -> None:
            if (batch + 1) % calls == 0:
                float(logs["loss"])  # JAX starts the next batch before this one is computed.
                measurement.end_batch()

    model = make_model(task.row, k, *models.MODELS[task.model]())
    batches = _batches(x, y, calls, task.batches)
    measurement.begin()
    model.fit(batches, shuffle=False, verbose=0, callbacks=[Clock()])
    of_products = functools.partial(
        floor.milliseconds_per_sample, task.model, task.micro_batch_size
    )
    measurement.answer(model.count_params(), None if task.row == "jax" else of_products)


if __name__ == "__main__":
    measure(process.read_task())
