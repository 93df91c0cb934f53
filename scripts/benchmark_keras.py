"""Measures one row of benchmark.py that is written in Keras, in this process."""

import os

import benchmark_models
import benchmark_process


def _limit_threads(threads):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def _batches(x, y, calls, repeats):
    """One effective batch as `calls` batches of `fit`, over and over.

    The memory of the data is that of one effective batch, however many are trained on.
    """
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x, y = (a.reshape(calls, -1, *a.shape[1:]) for a in (x, y))
        return tf.data.Dataset.from_tensor_slices((x, y)).repeat(repeats)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return calls * repeats

        def __getitem__(self, i):
            size = len(x) // calls
            part = slice(i % calls * size, (i % calls + 1) * size)
            return x[part], y[part]

    return Batches()


def _model(row, k, inputs, outputs):
    """The model of a row, compiled."""
    import keras

    if row in ("tfbig", "jit", "recompute"):
        import tfbig

        # Not for all rows: an option that is at fault shall not fail the others.
        options = {"recompute": True} if row == "recompute" else {}
        model = tfbig.Model(inputs, outputs, gradient_accumulation_steps=k, **options)
    else:
        model = keras.Model(inputs, outputs)
    built_in = row in ("built_in", "built_in_jit", "jax")
    model.compile(
        keras.optimizers.Adam(
            benchmark_process.LEARNING_RATE,
            epsilon=benchmark_process.EPSILON,
            gradient_accumulation_steps=k if built_in and k > 1 else None,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=row in ("jit", "built_in_jit", "jax"),
    )
    return model


def measure(task):
    # On a GPU, what is read as peak memory would be the memory of the host.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["KERAS_BACKEND"] = "jax" if task.row == "jax" else "tensorflow"
    if task.row == "jax":
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        _limit_threads(task.threads)
    import keras

    if task.row != "jax":
        import tfbig  # noqa: F401  For all alike, as memory is counted from here.

    keras.utils.set_random_seed(0)
    x, y = benchmark_models.data(task.model, task.batch_size)
    k = task.gradient_accumulation_steps
    # tfbig itself cuts what it is given.
    calls = 1 if task.row in ("whole", "tfbig", "jit", "recompute") else k
    measurement = benchmark_process.Measurement(task)

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if (batch + 1) % calls == 0:
                float(logs["loss"])  # JAX goes on to the next before this one is computed.
                measurement.end_batch()

    model = _model(task.row, k, *benchmark_models.MODELS[task.model]())
    batches = _batches(x, y, calls, task.batches)
    measurement.begin()
    model.fit(batches, shuffle=False, verbose=0, callbacks=[Clock()])
    measurement.answer(model.count_params())


if __name__ == "__main__":
    measure(benchmark_process.read_task())
