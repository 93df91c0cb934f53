"""GAN: a generator makes digits that a discriminator should take for scanned ones.

Two networks, two optimizers, and a custom `train_step` on `tfbig.accumulate_gradients` and
`tfbig.apply_gradients`. A classifier of scanned digits judges what is generated.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import command_line
import digits_data
import numpy as np
from absl import flags
from training import curves

from tasks import task

if TYPE_CHECKING:
    from training.settings import Settings

    from tasks.adversaries import Adversaries

DEFAULTS = task.Defaults(batch_size=128, epochs=300, learning_rate=0.001)
FLAGS = ()

_NOISE = 32  # Values from which a digit is made.
_JUDGED = 1000  # Generated digits that are judged.


def load(settings: Settings) -> task.Task:
    """The task.

    Raises:
        MissingExtraError: Without scikit-learn.
        UsageError: With --micro_batch_size=auto or --pipeline.
    """
    import keras

    from tasks import adversaries, digit_score

    if flags.FLAGS.micro_batch_size == "auto":
        raise command_line.UsageError(
            "--micro_batch_size=auto needs the train_step of tfbig. Received: --task=gan, which "
            "has its own. Give a number."
        )
    if flags.FLAGS.pipeline > 1:
        raise command_line.UsageError(
            "--pipeline cuts a Functional or Sequential model into stages. Received: --task=gan, "
            "whose model is neither. Leave --pipeline out."
        )
    try:
        (real, labels), (held_out, _) = digits_data.load()
    except ModuleNotFoundError:
        raise command_line.MissingExtraError("--task=gan", "sklearn") from None
    score = digit_score.DigitScore(real, labels)
    seen = np.random.default_rng(1).standard_normal((_JUDGED, _NOISE)).astype(real.dtype)

    def make_model(**options: Any) -> Adversaries:
        return adversaries.Adversaries(noise=_NOISE, **options)

    def judge(model: Adversaries) -> float:
        return score.of(_generated(model, seen))

    class Judge(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            logs["val_score"] = judge(self.model)

    def conclude(model: Adversaries, path: pathlib.Path) -> list[str]:
        noise = np.random.default_rng(0).random(held_out.shape)
        scores = f"of scanned digits {score.of(held_out):.2f}, of noise {score.of(noise):.2f}"
        lines = ["", f"score {scores}"]
        if curves.can_draw():
            images = _generated(model, seen[:64])
            _draw(images, path / "samples.png")
            lines.append(f"samples.png holds {len(images)} generated digits")
        return lines

    return task.Task(
        train=(real,),
        validation=None,
        make_model=make_model,
        # A constant rate, since neither network approaches a minimum.
        make_optimizer=lambda rate, updates: keras.optimizers.Adam(rate, beta_1=0.5),
        measure="val_score",
        bar=0.8 * score.of(held_out),
        curves=("generator_loss", "discriminator_loss", "score"),
        callbacks=[Judge()],
        conclude=conclude,
    )


def _generated(model: Adversaries, noise: np.ndarray) -> np.ndarray:
    return np.asarray(model.generator(noise, training=False), "float32")


def _draw(images: np.ndarray, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = int(len(images) ** 0.5)
    rows = [
        np.hstack(list(np.pad(row[..., 0], ((0, 0), (1, 1), (1, 1)))))
        for row in images[: side * side].reshape(side, side, *images.shape[1:])
    ]
    pyplot.imsave(path, np.kron(np.vstack(rows), np.ones((6, 6))), cmap="gray", vmin=0, vmax=1)
