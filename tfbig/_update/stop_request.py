"""SIGTERM as a request to stop, on which all workers act after the same update."""

import contextlib
import signal
import threading
import types
import warnings
from collections.abc import Iterator

import keras
import tensorflow as tf

from tfbig import _keras, _types
from tfbig.distribute import _workers

__all__ = ("StopRequest",)


class StopRequest:
    """A request to stop, made by a SIGTERM to any worker.

    With several workers it travels with the gradients of an update, so that all stop after the
    same one. All workers must construct it at the same point of the program.

    Args:
        strategy: the strategy of the model.
        is_shared: whether there are other workers.

    Attributes:
        is_made: whether this process has received SIGTERM.
        is_handled: whether training has acted on the request.
    """

    def __init__(self, strategy: _types.Strategy, is_shared: bool) -> None:
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

    def reset(self) -> None:
        """Forgets an earlier request."""
        self.is_made = self.is_handled = False
        if self.is_shared:
            _keras.variables.assign_all([self._sent, self._received], [0.0, 0.0])

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGTERM makes the request; afterwards it does what it did before."""
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "BackupAndRestore does not see SIGTERM: Python delivers signals to the main "
                "thread, and `fit` runs in another. Call it in the main thread.",
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

    def _make(self, number: int, frame: types.FrameType | None) -> None:
        # Nothing more: a graph may be under construction when the signal arrives.
        self.is_made = True

    def send(self) -> None:
        """Lets the next update carry the request, if it is made. To be called before the update."""
        if self.is_made and self.is_shared:
            _keras.variables.assign_all([self._sent], [1.0])

    def sent(self) -> _types.Tensor:
        """float32 scalar, 1 if this worker sends the request. In replica context."""
        return tf.convert_to_tensor(self._sent.value)

    def receive(self, total: _types.Tensor) -> None:
        """Keeps the number of replicas that sent the request, a scalar. In replica context."""
        _keras.variables.native(self._received).assign(tf.cast(total, "float32"))

    def is_agreed(self) -> bool:
        """Whether all workers stop after the last update."""
        if self.is_handled:
            return False
        if not self.is_shared:
            return self.is_made
        return bool(_keras.variables.values_of([self._received])[0] > 0)

    def agree(self, workers: _workers.Workers) -> bool:
        """Whether any worker has the request; all ask at the same point, between updates."""
        return not self.is_handled and "stop" in workers.exchange(
            "whether to stop", "stop" if self.is_made else "continue"
        )
