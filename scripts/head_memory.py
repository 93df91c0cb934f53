"""Draws docs/images/head_memory.png: what the last layer and the loss take, by the vocabulary.

    python scripts/head_memory.py --markdown=table.md

A small GPT-2 of KerasHub with random weights, its default loss and metric, makes updates of 2,048
tokens: with all logits at once, and with `head_chunk_size`. The memory is what TensorFlow's
allocator counts at the peak of an update beyond what was there before; the same for a body with a
vocabulary of 16 is subtracted, so that the rest is that of the last layer, the loss and the table.
Both models train in turn in one process, each vocabulary in one of its own, since a process that
has used much memory gives it out in larger pieces than are asked for. Needs keras-hub and
tfbig[plots]; takes a minute on two cores.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pathlib
from collections.abc import Callable

import command_line
from absl import flags
from benchmarks import markdown, peaks, provenance

PROGRAM = "head_memory.py"
ROOT = pathlib.Path(__file__).parents[1]

_PNG = flags.DEFINE_string(
    "png", str(ROOT / "docs" / "images" / "head_memory.png"), "File to draw to, a .png."
)
_MARKDOWN = flags.DEFINE_string("markdown", None, "File for the table, a .md.")
_VOCABULARIES = flags.DEFINE_list("vocabularies", ["5000", "20000", "50000"], "Kinds of tokens.")
_CHUNK = flags.DEFINE_integer("chunk", 256, "Tokens at a time.", lower_bound=1)
_UPDATES = flags.DEFINE_integer("updates", 21, "Updates to take the time of.", lower_bound=1)

BATCH, LENGTH, WIDTH = 8, 256, 256


def _updates_of(vocabulary: int, chunk: int | None) -> Callable[[], object]:
    """A function that makes an update, made once already."""
    import keras
    import keras_hub
    import numpy as np

    import tfbig

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=vocabulary,
        num_layers=1,
        num_heads=4,
        hidden_dim=WIDTH,
        intermediate_dim=WIDTH,
        max_sequence_length=LENGTH,
    )
    model = tfbig.extend(
        keras_hub.models.GPT2CausalLM(backbone, preprocessor=None), head_chunk_size=chunk
    )
    # The losses and metrics of KerasHub; an optimizer without state, which is not measured here.
    model.compile(keras.optimizers.SGD(), jit_compile=False)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (BATCH, LENGTH))
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    y = np.roll(tokens, -1, axis=1)

    def update() -> object:
        return model.train_on_batch(x, y)

    update()
    return update


def _measured(vocabulary: int, chunk: int, repetitions: int) -> list[peaks.Measured]:
    with command_line.quiet_start():
        updates = [_updates_of(vocabulary, size) for size in (None, chunk)]
    return peaks.measure(updates, repetitions)


def _measure(vocabulary: int) -> list[peaks.Measured]:
    """MiB at the peak and seconds of an update, with all logits at once and in chunks."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        task = executor.submit(_measured, vocabulary, _CHUNK.value, _UPDATES.value)
        return task.result()


def _draw(vocabularies: list[int], found: list[tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for values, label in zip(
        zip(*found, strict=True),
        ("all logits at once", f"head_chunk_size={_CHUNK.value}"),
        strict=True,
    ):
        axes.plot(vocabularies, values, marker="o", label=label)
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("peak of last layer and loss, MiB")
    axes.set_ylim(bottom=0)
    axes.set_title(f"An update of {BATCH * LENGTH:,} tokens, width {WIDTH}")
    axes.legend()
    figure.savefig(_PNG.value, dpi=120)
    pyplot.close(figure)


def _run() -> int:
    command_line.check_file(_PNG.value, "png")
    if _MARKDOWN.value is not None:
        command_line.check_file(_MARKDOWN.value, "markdown")
    try:
        with command_line.quiet_start():
            import keras_hub  # noqa: F401  # Slow, and not an extra of tfbig.
            import matplotlib  # noqa: F401
    except ImportError as e:
        raise command_line.UsageError(
            f"{e.name} is missing: pip install keras-hub 'tfbig[plots]'"
        ) from None
    origin = provenance.collect(__file__, ("tensorflow", "keras", "keras-hub", "tfbig"), [])
    body = _measure(16)
    rows, found = [], []
    vocabularies = [int(v) for v in _VOCABULARIES.value]
    for vocabulary in vocabularies:
        whole, chunked = (
            (peak - before, seconds)
            for (peak, seconds), (before, _) in zip(_measure(vocabulary), body, strict=True)
        )
        found.append((whole[0], chunked[0]))
        rows.append((f"{vocabulary:,}", *peaks.in_columns(whole, chunked, digits=3)))
        print(" ".join(rows[-1]), flush=True)
    _draw(vocabularies, found)
    if _MARKDOWN.value is not None:
        names = ("vocabulary", *peaks.COLUMNS)
        title = f"Peak of the last layer and the loss; chunks of {_CHUNK.value} tokens"
        markdown.write(_MARKDOWN.value, origin, [markdown.Table(title, names, rows)], [])
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "nothing is written")
