"""Language: a GPT-like decoder reads the source of Python's standard library.

It is measured in bits per byte on held-out files, which does not depend on the tokenizer, and must
beat a 5-gram model of the same text.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import command_line
import numpy as np
from absl import flags

from tasks import five_gram, standard_library, task, tokens

if TYPE_CHECKING:
    import keras
    from training.settings import Settings

Tokenizer = tokens.Bytes | tokens.BytePairs

DEFAULTS = task.Defaults(batch_size=32, epochs=3, learning_rate=0.01, jit_compile=True)

_PARAMETERS = flags.DEFINE_string(
    "parameters",
    "1M",
    "language: about so many parameters in the decoder's blocks, from 1M to 1B: 12 depth width^2, "
    "with a width of 64 depth.",
)
_TOKENIZER = flags.DEFINE_enum(
    "tokenizer", "bpe", ["bpe", "bytes"], "language: what a token is. bpe needs tfbig[language]."
)
_VOCABULARY = flags.DEFINE_integer(
    "vocabulary", 1024, "language: tokens of --tokenizer=bpe.", lower_bound=300
)
_WINDOW = flags.DEFINE_integer("window", 128, "language: tokens of a sample.", lower_bound=8)
_CORPUS_BYTES = flags.DEFINE_integer(
    "corpus_bytes", 2_000_000, "language: bytes of text to train on.", lower_bound=10_000
)
_HELD_OUT_BYTES = flags.DEFINE_integer(
    "held_out_bytes", 200_000, "language: bytes of text to measure on.", lower_bound=1_000
)
FLAGS = ("parameters", "tokenizer", "vocabulary", "window", "corpus_bytes", "held_out_bytes")

_SAMPLES, _SAMPLE_TOKENS, _TEMPERATURE = 3, 96, 0.7


def _number(text: str) -> float | None:
    """The number that a text such as 25M means; None unless it is from 1M to 1B."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", text)
    number = match and float(match[1]) * {"M": 1e6, "B": 1e9}[match[2]]
    return number if number and 1e6 <= number <= 1e9 else None


flags.register_validator(
    "parameters",
    lambda text: _number(text) is not None,
    "it must be a number from 1M to 1B, such as 25M or 0.5B",
)


def size(parameters: float) -> tuple[int, int]:
    """Width and depth of a decoder whose blocks have about so many parameters.

    A block has 12 width^2 of them. The width is about 64 times the depth, as in GPT-2 and its
    successors, rounded to a multiple of 32, the width of a head.
    """
    depth = max(2, round((parameters / (12 * 64**2)) ** (1 / 3)))
    width = max(32, 32 * round(math.sqrt(parameters / (12 * depth)) / 32))
    return width, depth


def load(settings: Settings) -> task.Task:
    """The task.

    Raises:
        MissingExtraError: Without the tokenizer.
        UsageError: With --precision=float64.
    """
    import keras

    import tfbig
    from tasks import bits, transformer

    if flags.FLAGS.precision == "float64":
        raise command_line.UsageError(
            "--precision=float64 does not go with --task=language: Keras's Muon takes a learning "
            "rate that falls in float32 only. Use float32."
        )
    train, held_out = standard_library.documents(_CORPUS_BYTES.value, _HELD_OUT_BYTES.value)
    tokenizer = _tokenizer(train)
    bar = five_gram.FiveGram(train).bits_per_byte(held_out)
    width, depth = size(_number(_PARAMETERS.value))

    def make_model(name: str, **options: Any) -> tfbig.Model:
        layers = transformer.decoder(tokenizer.vocabulary, _WINDOW.value, width, depth)
        return tfbig.Model(*layers, name=name, **options)

    def make_optimizer(learning_rate: float, updates: int) -> keras.optimizers.Optimizer:
        # Muon orthogonalizes the update of a matrix, which in so short a training is worth about
        # as much as twice the text. Embeddings and norms are left to its Adam.
        return keras.optimizers.Muon(
            task.falling(learning_rate, updates, warmup=updates // 20),
            adam_lr_ratio=0.3,
            weight_decay=0.01,
        )

    def conclude(model: keras.Model, path: pathlib.Path) -> list[str]:
        return _conclude(model, path, tokenizer, held_out)

    return task.Task(
        train=windows(train, tokenizer, _WINDOW.value),
        validation=windows(held_out, tokenizer, _WINDOW.value),
        make_model=make_model,
        make_optimizer=make_optimizer,
        # The mask of the logits makes the loss a mean over the tokens without padding.
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        make_metrics=lambda: [
            bits.BitsPerByte(tokenizer.byte_lengths, name="bits_per_byte"),
            bits.Perplexity(name="perplexity"),
        ],
        measure="val_bits_per_byte",
        bar=bar,
        lower_is_better=True,
        curves=("loss", "bits_per_byte"),
        conclude=conclude,
    )


def _tokenizer(documents: list[bytes]) -> Tokenizer:
    if _TOKENIZER.value == "bytes":
        return tokens.Bytes()
    try:
        return tokens.BytePairs(documents, _VOCABULARY.value)
    except ModuleNotFoundError:
        raise command_line.MissingExtraError(
            "--tokenizer=bpe (--tokenizer=bytes does not)", "language"
        ) from None


def windows(
    documents: list[bytes], tokenizer: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents split into windows; the last one of each is padded.

    Returns:
        Tokens, and the tokens that come next, both int32 of shape `(windows, length)`.
    """
    inputs, outputs = [], []
    for document in documents:
        after = tokenizer.encode(document)
        before = np.concatenate([[tokens.START], after[:-1]]).astype("int32")
        padding = (0, -len(after) % length)
        inputs.append(np.pad(before, padding, constant_values=tokens.PADDING))
        outputs.append(np.pad(after, padding, constant_values=tokens.PADDING))
    before, after = (np.concatenate(part).reshape(-1, length) for part in (inputs, outputs))
    return before, after


def _conclude(
    model: keras.Model, path: pathlib.Path, tokenizer: Tokenizer, held_out: list[bytes]
) -> list[str]:
    """Has the model continue the beginnings of held-out files; returns the lines of samples.txt."""
    prompts = [tokenizer.encode(document)[:16] for document in held_out[:_SAMPLES]]
    written = generate(model, prompts, _SAMPLE_TOKENS)
    lines = []
    for prompt, text in zip(prompts, written, strict=True):
        begun, went_on = (tokenizer.decode(part) for part in (prompt, text[len(prompt) :]))
        lines += ["", "--- begun with " + repr(begun.decode(errors="replace")) + ":"]
        lines += went_on.decode(errors="replace").splitlines()
    (path / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def generate(model: keras.Model, prompts: Iterable[Iterable[int]], count: int) -> list[list[int]]:
    """Continues prompts, one token at a time.

    Args:
        model: The decoder.
        prompts: Tokens, fewer than a window.
        count: How many tokens to add to each.

    Returns:
        The tokens of each text, including its prompt.
    """
    import tensorflow as tf

    length = model.input_shape[1]
    random = np.random.default_rng(0)
    texts = [[tokens.START, *map(int, prompt)] for prompt in prompts]
    # One trace, since a window always has the same shape. After the last token comes padding,
    # which no earlier token sees.
    logits_of = tf.function(lambda window: model(window, training=False), autograph=False)
    for _ in range(count):
        ends = [text[-length:] for text in texts]
        window = np.array([end + [tokens.PADDING] * (length - len(end)) for end in ends], "int32")
        logits = logits_of(tf.constant(window)).numpy().astype("float64")
        for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
            scores = logits[row, len(end) - 1] / _TEMPERATURE
            scores[[tokens.PADDING, tokens.START]] = -np.inf
            # The highest score after adding Gumbel noise is a sample from the softmax.
            text.append(int(np.argmax(scores + random.gumbel(size=scores.shape))))
    return [text[1:] for text in texts]
