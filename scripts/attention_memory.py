"""Prints what updates of long sequences take, with and without `attention_chunk_size`.

    python scripts/attention_memory.py --markdown=table.md

A small decoder of Keras's own layers makes updates of one sequence. The memory is what TensorFlow's
allocator counts at the peak of an update beyond what was there before. Both models train in turn in
one process. Takes two minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable

import command_line
from absl import flags
from benchmarks import markdown, peaks, provenance

PROGRAM = "attention_memory.py"

_MARKDOWN = flags.DEFINE_string("markdown", None, "File for the table, a .md.")
_LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "Tokens of a sequence.")
_CHUNK = flags.DEFINE_integer("chunk", 256, "Tokens at a time.", lower_bound=1)
_UPDATES = flags.DEFINE_integer("updates", 5, "Updates to take the time of.", lower_bound=1)
_COMPILED = flags.DEFINE_bool("compiled", False, "Whether XLA compiles the updates.")

TOKENS, WIDTH, HEADS, LAYERS = 256, 256, 4, 2


def _updates_of(length: int, chunk: int | None) -> Callable[[], object]:
    """A function that makes an update, made once already."""
    import keras
    import numpy as np
    from keras import layers

    import tfbig

    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(TOKENS, WIDTH)(inputs)
    for _ in range(LAYERS):
        y = layers.LayerNormalization()(x)
        x += layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        x += layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, "gelu")(layers.LayerNormalization()(x)))
    model = tfbig.Model(inputs, layers.Dense(TOKENS)(x), attention_chunk_size=chunk)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # An optimizer without state, which is not measured here.
    model.compile(keras.optimizers.SGD(), loss, jit_compile=_COMPILED.value)
    tokens = np.random.default_rng(0).integers(0, TOKENS, (1, length))

    def update() -> object:
        return model.train_on_batch(tokens, np.roll(tokens, -1, axis=1))

    update()
    return update


def _run() -> int:
    if _MARKDOWN.value is not None:
        command_line.check_file(_MARKDOWN.value, "markdown")
    with command_line.quiet_start():
        import tfbig  # noqa: F401  # Slow.
    origin = provenance.collect(__file__, ("tensorflow", "keras", "tfbig"), [])
    rows = []
    for length in map(int, _LENGTHS.value):
        updates = [_updates_of(length, chunk) for chunk in (None, _CHUNK.value)]
        whole, chunked = peaks.measure(updates, _UPDATES.value)
        rows.append((f"{length:,}", *peaks.in_columns(whole, chunked, digits=2)))
        print(" ".join(rows[-1]), flush=True)
    if _MARKDOWN.value is not None:
        names = ("tokens", *peaks.COLUMNS)
        title = f"Peak of an update of one sequence; attention of {_CHUNK.value} tokens at a time"
        markdown.write(_MARKDOWN.value, origin, [markdown.Table(title, names, rows)], [])
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "nothing is written")
