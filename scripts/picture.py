"""Draws docs/images/same_curve.png: tfbig trains exactly as plain Keras does on the whole batch.

    python scripts/picture.py

A small network learns scanned digits in float64 by SGD with momentum, with an effective batch of
100 samples in a fixed order. Its weights are recorded after each update: with plain Keras on the
whole batch, with tfbig in micro-batches of 16 on one device and on 1, 2 and 4 mirrored replicas,
and with what plain Keras offers instead, whose means of unequal parts are not the mean of the
batch. Each of them runs in a process of its own, because MirroredStrategies of different sizes
collide in one process. Needs tfbig[sklearn,plots]; takes two minutes on two cores.
"""

from __future__ import annotations

import io
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import command_line
import digits_data
from absl import flags

if TYPE_CHECKING:
    import keras
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROGRAM = "picture.py"
ROOT = pathlib.Path(__file__).parents[1]

BATCH, MICRO_BATCH, EPOCHS = 100, 16, 5
# 13 batches of 100 and one of 97: its replicas get different shares, as in most data sets.
SAMPLES = 1_397
MICRO_BATCHES = -(-BATCH // MICRO_BATCH)  # Of each batch: 16 samples each, and a rest.

_PNG = flags.DEFINE_string(
    "png", str(ROOT / "docs" / "images" / "same_curve.png"), "File to draw to, a .png."
)
_RUN = flags.DEFINE_string("run", None, "Internal: what this process trains.")
_WEIGHTS = flags.DEFINE_string("weights", None, "Internal: the file for its weights.")


TOLERANCE = 1e-10  # Of a weight of tfbig: rounding errors in float64, as in the tests.

# Label, mirrored replicas if any, and what trains; the others are compared with the first.
RUNS: dict[str, tuple[str, int | None, str]] = {
    "plain": ("Keras, whole batch", None, "keras"),
    "tfbig": ("tfbig, micro-batches of 16", None, "tfbig"),
    "tfbig_1": ("tfbig, 1 mirrored replica", 1, "tfbig"),
    "tfbig_2": ("tfbig, 2 mirrored replicas", 2, "tfbig"),
    "tfbig_4": ("tfbig, 4 mirrored replicas", 4, "tfbig"),
    "keras_4": ("Keras, 4 mirrored replicas", 4, "keras"),
    "built_in": ("Keras, gradient_accumulation_steps", None, "built_in"),
}

# The palette of Okabe and Ito, which colour-blind people can tell apart.
# Those of tfbig lie on each other, so each shows through the gaps of the next.
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"color": "#C4C4C4", "linewidth": 11, "solid_capstyle": "round", "zorder": 2},
    "tfbig": {"color": "#0072B2", "linewidth": 4.5, "zorder": 4},
    "tfbig_1": {"color": "#56B4E9", "linewidth": 4.5, "linestyle": (0, (4, 4)), "zorder": 5},
    "tfbig_2": {"color": "#009E73", "linewidth": 3, "linestyle": (0, (3, 3)), "zorder": 6},
    "tfbig_4": {"color": "#000000", "linewidth": 2, "linestyle": (0, (1, 3)), "zorder": 7},
    "keras_4": {"color": "#E69F00", "linewidth": 3, "zorder": 3},
    "built_in": {"color": "#D55E00", "linewidth": 3, "zorder": 3},
}


# What the second panel says beside its curves, and where.
NOTES = {
    (16, 3e-1): "Keras, gradient_accumulation_steps",
    (16, 1e-6): "Keras, 4 mirrored replicas:\nfrom the first uneven batch on",
    (16, 3e-15): "tfbig, every curve: rounding errors",
}


# --- One process -------------------------------------------------------------


def _data() -> tuple[np.ndarray, np.ndarray]:
    (x, y), _ = digits_data.load()
    return x[:SAMPLES], y[:SAMPLES]


def _model(kind: str) -> keras.Model:
    import keras
    from keras import layers

    import tfbig

    keras.utils.set_random_seed(0)
    network = [
        keras.Input((8, 8, 1)),
        layers.Conv2D(16, 3, activation="relu"),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(10),
    ]
    if kind == "tfbig":
        model = tfbig.Sequential(network, micro_batch_size=MICRO_BATCH)
    else:
        model = keras.Sequential(network)
    model.compile(
        keras.optimizers.SGD(
            0.05,
            momentum=0.9,
            gradient_accumulation_steps=MICRO_BATCHES if kind == "built_in" else None,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return model


def _micro_batches(x: np.ndarray, y: np.ndarray) -> keras.utils.PyDataset:
    """The micro-batches that tfbig computes, as batches of `fit`."""
    import keras

    parts = [
        slice(i, min(i + MICRO_BATCH, begin + BATCH))
        for begin in range(0, len(x), BATCH)
        for i in range(begin, min(begin + BATCH, len(x)), MICRO_BATCH)
    ]

    class MicroBatches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(parts)

        def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
            return x[parts[i]], y[parts[i]]

    return MicroBatches()


def _train(name: str, path: str) -> int:
    """Trains one of `RUNS`; writes the weights before and after each update."""
    with command_line.quiet_start():
        import keras
        import numpy as np
        import tensorflow as tf

        import tfbig

        # MirroredStrategy logs each reduction.
        tf.get_logger().setLevel("ERROR")
        _, replicas, kind = RUNS[name]
        strategy = tfbig.distribute.get_strategy(
            "mirrored" if replicas else "default", devices=replicas
        )
    keras.config.set_floatx("float64")
    x, y = _data()
    with strategy.scope():
        model = _model(kind)
    weights = [_flat(model)]
    calls = MICRO_BATCHES if kind == "built_in" else 1

    def on_end(batch: int, logs: Any) -> None:
        if (batch + 1) % calls == 0:
            weights.append(_flat(model))

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=on_end)
    batches = {"x": x, "y": y, "batch_size": BATCH}
    if kind == "built_in":
        batches = {"x": _micro_batches(x, y)}
    model.fit(**batches, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[callback])
    np.save(path, weights)
    return 0


def _flat(model: keras.Model) -> np.ndarray:
    import numpy as np

    return np.concatenate([w.ravel() for w in model.get_weights()])


# --- The picture -------------------------------------------------------------


def _measured() -> dict[str, np.ndarray]:
    """The weights of each run, as a matrix with a row for each update.

    Raises:
        RuntimeError: If a run is not what the picture says of it.
    """
    import numpy as np

    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in RUNS:
            print(f"{PROGRAM}: {RUNS[name][0]}", file=sys.stderr, flush=True)
            path = pathlib.Path(directory) / f"{name}.npy"
            command = [sys.executable, __file__, f"--run={name}", f"--weights={path}"]
            subprocess.run(command, check=True, timeout=900)
            found[name] = np.load(path)
    plain = found["plain"]
    for name, weights in found.items():
        if weights.shape != plain.shape or not np.array_equal(weights[0], plain[0]):
            raise RuntimeError(
                f"{name} starts with other weights, or has another number of updates"
            )
        if RUNS[name][2] == "tfbig" and not np.allclose(weights, plain, rtol=0, atol=TOLERANCE):
            raise RuntimeError(f"{name} differs from Keras by {np.abs(weights - plain).max():.1e}")
    return found


def _loss_of() -> Callable[[np.ndarray], float]:
    """A function of the weights of any run: their loss over all samples, on one device."""
    with command_line.quiet_start():
        import keras
        import numpy as np
        import tensorflow as tf

        tf.zeros(1)  # Makes the device, on which TensorFlow remarks.
    keras.config.set_floatx("float64")
    x, y = _data()
    model = _model("keras")
    shapes = [w.shape for w in model.get_weights()]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def loss_of(weights: np.ndarray) -> float:
        parts = zip(np.split(weights, ends), shapes, strict=True)
        model.set_weights([part.reshape(shape) for part, shape in parts])
        return float(model.test_on_batch(x, y))

    return loss_of


def _draw(found: dict[str, np.ndarray], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 16, "axes.titlesize": 18})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(16, 6), layout="constrained")
    _draw_losses(left, found)
    _draw_deviations(right, found)
    for axes in (left, right):
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Figure, path: str) -> None:
    """Writes a PNG of 64 colours, a third of the size of one with all of them."""
    from PIL import Image

    with io.BytesIO() as buffer:
        figure.savefig(buffer, dpi=100)
        Image.open(buffer).convert("RGB").quantize(64).save(path, "png", optimize=True)


def _draw_losses(axes: Axes, found: dict[str, np.ndarray]) -> None:
    loss_of = _loss_of()
    for name, weights in found.items():
        axes.plot([loss_of(w) for w in weights], label=RUNS[name][0], **STYLES[name])
    axes.set_ylim(bottom=0)
    axes.set(title="The same effective batch gives the same curve", ylabel="training loss")
    axes.legend(frameon=False, fontsize=15)


def _draw_deviations(axes: Axes, found: dict[str, np.ndarray]) -> None:
    import numpy as np

    for name, weights in found.items():
        if name != "plain":
            deviation = np.abs(weights - found["plain"]).max(axis=1)
            updates = np.arange(1, len(weights))
            # Before the first difference there is nothing to draw on a logarithmic axis.
            shown = np.where(deviation[1:] > 0, deviation[1:], np.nan)
            axes.plot(updates, shown, label=RUNS[name][0], **STYLES[name])
    axes.set_yscale("log")
    axes.set(
        title="Deviation from Keras on the whole batch",
        ylabel="largest weight difference (float64)",
        ylim=(1e-18, 1e1),
    )
    for place, text in NOTES.items():
        axes.text(*place, text)


def _picture() -> int:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    if _RUN.value is not None:
        return _train(_RUN.value, _WEIGHTS.value)
    command_line.check_file(_PNG.value, "png")
    try:
        found = _measured()
    except subprocess.CalledProcessError as e:
        print(f"{PROGRAM}: a run ended with exit code {e.returncode}", file=sys.stderr)
        return 1
    except RuntimeError as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return 1
    _draw(found, _PNG.value)
    print(_PNG.value)
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _picture, "nothing is drawn")
