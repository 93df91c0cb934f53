"""TensorFlow has stateful operations of a function wait for those before them; here some do not."""

import tensorflow as tf

__all__ = ("run_independently",)


def run_independently(operation: tf.Operation) -> None:
    """Has an operation run whether its result is used or not, without waiting for others.

    Those that it waits for explicitly, or whose results it takes, still come first.
    """
    # Graphs that are no functions have none, and order nothing.
    manager = operation.graph.experimental_acd_manager
    if manager is not None:
        manager.run_independently(operation)
