"""Trains a decoder that does not fit on one device, under a limit of memory for each worker.

    python -m tfbig.launch --workers=2 scripts/large_model.py --shard=weights
    python -m tfbig.launch --workers=2 scripts/large_model.py --shard=none

    python scripts/large_model.py --plain

The model has 101 million parameters and is trained with Adam on the bytes of this file. After
TensorFlow is imported, each worker may take 1,900 MiB more, with the stacks of its threads
(RLIMIT_DATA). The first command trains; the second and the third, which is plain Keras on one
device, end for want of memory: with an error, or killed where TensorFlow does not expect it.
"""

import pathlib
import resource
import sys
from typing import Any

import command_line
from absl import flags

PROGRAM = "large_model.py"

_SHARD = flags.DEFINE_enum(
    "shard", "weights", ["none", "optimizer", "weights"], "What is divided over the workers."
)
_PLAIN = flags.DEFINE_bool("plain", False, "Whether to train with plain Keras.")
_LIMIT = flags.DEFINE_integer(
    "limit",
    1900,
    "MiB that a worker may take beyond what imports take; 0 for no limit.",
    lower_bound=0,
)
_BLOCKS = flags.DEFINE_integer("blocks", 8, "Blocks of the decoder.", lower_bound=1)
_UPDATES = flags.DEFINE_integer("updates", 4, "Updates to train.", lower_bound=1)

WIDTH, HEADS, LENGTH, BATCH = 1024, 8, 32, 16


def _kibibytes(name: str) -> int:
    """A field of the process's status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _trained(strategy: Any) -> Any:  # Any: Keras, which is not imported yet, has no types.
    """The model, built under a strategy and trained."""
    import keras
    import numpy as np

    import tfbig

    class Block(keras.layers.Layer):
        """Attention to what came before, and two dense layers."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
            self.wide = keras.layers.Dense(4 * WIDTH, "gelu")
            self.narrow = keras.layers.Dense(WIDTH)
            self.norms = [keras.layers.LayerNormalization() for _ in range(2)]

        def build(self, shape):
            self.attention.build(shape, shape)
            self.wide.build(shape)
            self.narrow.build((*shape[:-1], 4 * WIDTH))
            for norm in self.norms:
                norm.build(shape)

        def call(self, x):
            h = self.norms[0](x)
            x = x + self.attention(h, h, use_causal_mask=True)
            return x + self.narrow(self.wide(self.norms[1](x)))

    is_divided = _SHARD.value == "weights" and not _PLAIN.value
    with tfbig.distribute.sharded_weights(strategy) if is_divided else strategy.scope():
        tokens = keras.Input((LENGTH,), dtype="int32")
        h = keras.layers.Embedding(256, WIDTH)(tokens)
        for _ in range(_BLOCKS.value):
            h = Block()(h)
        outputs = keras.layers.Dense(256)(keras.layers.LayerNormalization()(h))
        if _PLAIN.value:
            model = keras.Model(tokens, outputs)
        else:
            shard = None if _SHARD.value == "none" else _SHARD.value
            model = tfbig.Model(
                tokens, outputs, gradient_accumulation_steps=2, recompute=True, shard=shard
            )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-4), loss)

    text = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8).astype("int32")
    starts = np.arange(_UPDATES.value * BATCH) % (len(text) - LENGTH - 1)
    rows = np.stack([text[i : i + LENGTH + 1] for i in starts])
    model.fit(rows[:, :-1], rows[:, 1:], batch_size=BATCH, verbose=2, shuffle=False)
    return model


def _run() -> int:
    with command_line.quiet_start():
        import tensorflow as tf

        import tfbig

    strategy = tfbig.distribute.get_strategy()
    before = _kibibytes("VmRSS")
    if _LIMIT.value:
        size = 1024 * _kibibytes("VmData") + _LIMIT.value * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    try:
        model = _trained(strategy)
    except (tf.errors.ResourceExhaustedError, MemoryError) as e:
        first_line, *_ = str(e).split("\n")
        print(f"{PROGRAM}: out of memory: {first_line}", file=sys.stderr)
        return 1
    if tfbig.distribute.is_chief(strategy):
        taken = (_kibibytes("VmHWM") - before) / 1024
        print(
            f"{model.count_params():,} parameters; the worker took {taken:,.0f} MiB at its peak, "
            f"{taken * 2**20 / model.count_params():.1f} bytes per parameter"
        )
    return 0


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "training has not begun")
