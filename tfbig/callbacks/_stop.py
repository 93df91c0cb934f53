"""SIGTERM as a request to stop, known to all workers after the same update."""

import contextlib
import signal
import threading
import warnings

import keras
import tensorflow as tf

from tfbig import _keras

__all__ = ("StopRequest",)


class StopRequest:
    """A request to stop, made by SIGTERM to any worker.

    With several workers it travels with the gradients of an update, so that all stop
    after the same one. To be made on all workers at once.

    Args:
        strategy: The strategy of the model.
        is_shared: bool, whether there are other workers.
    """

    def __init__(self, strategy, is_shared):
        self.is_made = self.is_handled = False
        self.is_shared = is_shared
        if is_shared:
            with strategy.scope():
                self._sent, self._received = (
                    keras.Variable(
                        0.0, dtype="float32", trainable=False, aggregation="only_first_replica"
                    )
                    for _ in range(2)
                )

    def reset(self):
        """Forgets an earlier request."""
        self.is_made = self.is_handled = False
        if self.is_shared:
            _keras.variables.assign_all([self._sent, self._received], [0.0, 0.0])

    @contextlib.contextmanager
    def listening(self):
        """Within it, SIGTERM makes the request; afterwards it does what it did before."""
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "BackupAndRestore does not see SIGTERM: Python hands signals to the main thread, "
                "and fit runs in another.",
                stacklevel=2,
            )
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._make)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
            if self.is_made and not self.is_handled:
                # It came after the last update.
                signal.raise_signal(signal.SIGTERM)

    def _make(self, number, frame):
        # Nothing more: a graph may be under construction where the signal arrives.
        self.is_made = True

    def send(self):
        """Lets the next update carry the request, if it is made. Called before it."""
        if self.is_made and self.is_shared:
            _keras.variables.assign_all([self._sent], [1.0])

    def sent(self):
        """float32 scalar, 1 if this worker sends the request. In replica context."""
        return tf.convert_to_tensor(self._sent.value)

    def receive(self, total):
        """Keeps how many replicas sent it. In replica context."""
        _keras.variables.native(self._received).assign(tf.cast(total, "float32"))

    def is_agreed(self):
        """Whether all workers stop after the update that was."""
        if self.is_handled:
            return False
        return (
            _keras.variables.values_of([self._received])[0] > 0 if self.is_shared else self.is_made
        )

    def agree(self, workers):
        """Whether any worker has the request; all ask at the same place, between updates."""
        return not self.is_handled and "stop" in workers.exchange(
            "whether to stop", "stop" if self.is_made else "go on"
        )
