"""TensorFlow raises one error for all assertions; here its text tells which error is meant."""

import re
from collections.abc import Iterable

import keras

from tfbig import errors

# The messages of assertions in a graph.
NO_SAMPLES = "A batch must hold at least one sample. Received: a batch of 0 samples."
SIZES_DIFFER = "All parts of a batch must hold as many samples as the first."
TOO_MANY_SKIPS = "tfbig: too many skipped updates in a row."
LENGTHS_DIFFER = "tfbig: replicas looked up a table at positions that differ."
OVERFLOW = "tfbig: gradients are not finite after their exchange in half precision."
EXCHANGES_DIFFER = "tfbig: workers exchange different gradients."
# TensorFlow's own.
_NO_SPARSE_SAMPLES = "Serialized sparse should have at least 1 serialized tensor"
_NOT_COMPILED = "Detected unsupported operations when trying to compile"


def error_of(message: str, model: keras.Model) -> Exception | None:
    """The error that an assertion in the graph stands for; None if it is not one of these.

    Args:
        message: text of TensorFlow's error.
        model: the tfbig model that was running.
    """
    if NO_SAMPLES in message:
        return errors.InvalidOptionError(NO_SAMPLES)
    if SIZES_DIFFER in message:
        numbers = re.search(r"\[([\d ]+)\]", message.partition(SIZES_DIFFER)[2])
        return sizes_differ(numbers[1].split() if numbers else [])
    if _NO_SPARSE_SAMPLES in message:
        return errors.UnsupportedStrategyError(
            "tf.data cannot give a worker a sparse batch without samples. Received: a batch of "
            "fewer samples than workers, the last of an epoch. Use drop_remainder=True, or "
            "leave samples out."
        )
    if _NOT_COMPILED in message:
        operations = re.findall(r"(\w+) \(", message.partition(_NOT_COMPILED)[2].split("\n")[0])
        return errors.UnsupportedModelError(
            "XLA must know all operations that it compiles. Received: jit_compile=True, or "
            f"compiled=True, and {', '.join(sorted(set(operations)))}. Sparse and ragged inputs "
            "need operations that it does not know. Use jit_compile=False."
        )
    if LENGTHS_DIFFER in message:
        return errors.UnsupportedModelError(
            "All replicas must look up a table at as many constant positions if an index occurs "
            "several times among them. Received: different numbers, as when each worker pads "
            "sequences to its own longest and looks up relative positions. tfbig cannot tell "
            "which rows of the gradient belong together. Pad the sequences of all workers to one "
            "length."
        )
    if EXCHANGES_DIFFER in message:
        return errors.WorkersDisagreeError(
            "All workers must run the same program. Received: different gradients, as when a "
            "layer or a train_step leaves weights out on some workers."
        )
    if OVERFLOW in message:
        return errors.GradientOverflowError(
            f"A gradient is not finite after the exchange in {model.exchange_dtype}: it "
            "overflows there, or training diverged. Use exchange_dtype='bfloat16' or None, or "
            "a loss scale, which skips such updates."
        )
    if TOO_MANY_SKIPS in message:
        error: Exception = model.loss_scale_state.error(model.trainable_variables)
        return error
    return None


def sizes_differ(sizes: Iterable[object]) -> errors.InvalidOptionError:
    """The error for a batch whose parts hold different numbers of samples."""
    return errors.InvalidOptionError(
        f"{SIZES_DIFFER} Received: {', '.join(map(str, sizes))} samples in inputs, targets and "
        "sample weights. What is not one row for each sample cannot be cut."
    )
