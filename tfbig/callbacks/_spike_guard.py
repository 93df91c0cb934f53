"""Updates that stand out are skipped, and training goes back: `tfbig.callbacks.SpikeGuard`."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from tfbig import _integers, _keras, _log, _numbers, _types, errors
from tfbig._update import fit_context
from tfbig.callbacks import _snapshot
from tfbig.callbacks._backup_and_restore import BackupAndRestore
from tfbig.callbacks._batch_count import BatchCount
from tfbig.callbacks._spike_state import SpikeSettings, SpikeState
from tfbig.distribute import _workers

__all__ = ("SpikeGuard",)


class SpikeGuard(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Skips updates that stand out, and takes training back if that does not help.

    An update whose gradient norm, before clipping, is more than `factor` times the median of the
    last `window` accepted updates is skipped, on all replicas: weights, the optimizer's variables,
    `optimizer.iterations` and non-trainable state such as moving statistics stay as they are, to
    the bit, as if the model had never seen that batch. So is an update whose norm or loss is not
    finite. Metrics count its batch, if its loss is finite. Replicas exchange nothing more for it.

    After `patience` skipped updates in a row, training goes back to an earlier state, and continues
    with the next batch. What goes back: weights and other variables of the model, optimizers,
    `optimizer.iterations` and with it a learning-rate schedule, the loss scale, the states of
    random generators, and what the guard knows of earlier norms. What does not: the data, so the
    batches since then are left out, and the batches and epochs that `fit` counts; metrics; counts,
    such as `skipped_updates`; a learning rate that callbacks set. The end is thus that of
    training that never saw these batches.

    The earlier state is a copy in the memory of the host, taken at the start of `fit` and every
    `snapshot_every` updates. It takes as much memory as the weights and the optimizer's variables,
    for a moment twice as much: a copy replaces the one before only when the next update is
    ordinary. No copy is older than the `fit`: training never goes back beyond the state that `fit`
    began with, or resumed from, even if the weights were bad then. What the guard knows of earlier
    norms, and its counts, go on in a further `fit`.

    Logs hold `spikes`, how many updates were skipped so far, and `rollbacks`, how often training
    went back. Updates that the loss scale skips are not among them, and do not count for
    `patience`.

    With `steps_per_execution`, each update is judged by itself; training goes back after the
    execution. With several workers, all must have the callback. State that is divided (`shard`) is
    copied in pieces. A `train_step` of your own passes `update_guard=self.update_guard` to
    `tfbig.apply_gradients`. `BackupAndRestore` also backs up what the guard knows. Of a backup that
    was made without a guard, or with another `window`, the guard restores nothing.

    Args:
        factor: > 1, how many times the median is too much. Defaults to 5.
        window: >= 3, how many accepted updates the median is of. Defaults to 100.
        grad_norm: whether to look at the norm of the gradient. Defaults to True.
        loss: whether to look at the loss, too, or instead. Defaults to False. For a negative
            median, the loss may be as far above it as for a positive one.
        warm_up: >= 1, accepted updates before any is skipped, except those that are not finite.
            Defaults to None: `window`.
        patience: >= 1, skipped updates in a row after which training goes back. Defaults to 5.
        rollback_factor: > 1: training also goes back if the loss of two updates in a row, skipped
            or not, is more than so many times its median. Defaults to None: it does not.
        max_rollbacks: >= 0, how often training may go back and continue. The next time, it goes
            back, and `fit` raises `SpikeError`. Defaults to 3.
        snapshot_every: >= 1, updates after which the state is copied. None: no copies; training
            goes back to the last backup of the `BackupAndRestore` among the callbacks. Defaults to
            100.

    Attributes:
        spikes: Number of updates skipped so far.
        rollbacks: How often training went back so far.

    Raises:
        InvalidOptionError: If an argument is not valid; at the start of `fit`, if two guards are
            among the callbacks, or no `BackupAndRestore` and `snapshot_every` is None.
        UnsupportedModelError: At the start of `fit`, if the model is not a tfbig model; before the
            first update, if it has a `train_step` of its own that does not use the guard.

    Example:

    >>> x, y = np.ones((80, 4)), np.ones((80, 1))
    >>> y[40:44] = 1e6
    >>> model = tfbig.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> guard = tfbig.callbacks.SpikeGuard(factor=10, window=3)
    >>> history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[guard])
    >>> history.history["spikes"], guard.rollbacks
    ([1], 0)

    Reference:
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, section 5.1, where
        people restarted training before a spike and left out the batches around it.
    """

    # It sets `update_guard` of the model.
    guards_updates = True

    def __init__(
        self,
        factor: float = 5.0,
        window: int = 100,
        *,
        grad_norm: bool = True,
        loss: bool = False,
        warm_up: int | None = None,
        patience: int = 5,
        rollback_factor: float | None = None,
        max_rollbacks: int = 3,
        snapshot_every: int | None = 100,
    ) -> None:
        super().__init__()
        updates = "an integer >= 1, a number of updates"
        self.window = _integers.checked(
            "window", window, least=3, rule="an integer >= 3, a number of updates"
        )
        self.warm_up = _integers.checked_or_none("warm_up", warm_up, rule=f"{updates}, or None")
        self.patience = _integers.checked("patience", patience, rule=updates)
        self.max_rollbacks = _integers.checked("max_rollbacks", max_rollbacks, least=0)
        self.snapshot_every = _integers.checked_or_none(
            "snapshot_every", snapshot_every, rule=f"{updates}, or None"
        )
        _check_factor("factor", factor)
        if rollback_factor is not None:
            _check_factor("rollback_factor", rollback_factor)
        if not (grad_norm or loss):
            raise errors.InvalidOptionError(
                "SpikeGuard must look at the gradient norm, the loss, or both. Received: "
                f"grad_norm={grad_norm!r}, loss={loss!r}. Leave the callback out to skip nothing."
            )
        self.factor = factor
        self.grad_norm = grad_norm
        self.loss = loss
        self.rollback_factor = rollback_factor
        # Of the last model; a further `fit` of it goes on with it.
        self._state: SpikeState | None = None
        self._model_of_state: keras.Model | None = None
        self._is_running = False
        self._source: _snapshot.Source | None = None
        self._batches = BatchCount()

    @property
    def spikes(self) -> int:
        """Number of updates skipped so far."""
        return 0 if self._state is None else self._state.number("spikes")

    @property
    def rollbacks(self) -> int:
        """How often training went back so far."""
        return 0 if self._state is None else self._state.number("rollbacks")

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if not hasattr(model, "update_guard"):
            raise errors.UnsupportedModelError(
                "tfbig.callbacks.SpikeGuard needs a tfbig model. Received: "
                f"{type(model).__name__}. Use tfbig.extend(model)."
            )

    # Any: the arguments of `fit` are of all types.
    @contextlib.contextmanager
    def around_fit(self, model: keras.Model, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Entered by `fit` of a tfbig model; the callback works only within it."""
        other = model.update_guard
        if isinstance(other, SpikeState) and other.number("is_active"):
            raise errors.InvalidOptionError(
                "`callbacks` must hold only one SpikeGuard. Received: two. Let one look at both: "
                "grad_norm=True, loss=True."
            )
        backups = [
            callback
            for callback in fit_context.callbacks_of(arguments.get("callbacks"))
            if isinstance(callback, BackupAndRestore)
        ]
        if self.snapshot_every is None and not backups:
            raise errors.InvalidOptionError(
                "Without `snapshot_every`, SpikeGuard goes back to a backup, and needs a "
                "tfbig.callbacks.BackupAndRestore among the callbacks. Received: none. Add one, or "
                "pass the number of updates after which the state is copied."
            )
        self._backup = backups[0] if backups else None
        settings = self._settings()
        self._workers = _workers.Workers.of(model.distribute_strategy)
        others = {"max_rollbacks": self.max_rollbacks, "snapshot_every": self.snapshot_every}
        self._workers.agree("SpikeGuard", {"settings": f"{settings}, {others}"})
        is_of_model = self._state is not None and self._model_of_state is model
        if not is_of_model or self._running_state.settings != settings:
            with model.distribute_strategy.scope():
                self._state = SpikeState(settings)
            # Those of the guards before it.
            self._state.count_undone(model.left_out_updates)
            self._model_of_state = model
        # It stays when `fit` ends, so that a further one need not be traced again.
        model.update_guard = self._state
        self._running_state.set_active(True)
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False
            self._source = None
            self._running_state.set_active(False)

    def _settings(self) -> SpikeSettings:
        return SpikeSettings(
            factor=self.factor,
            window=self.window,
            grad_norm=bool(self.grad_norm),
            loss=bool(self.loss),
            warm_up=self.window if self.warm_up is None else self.warm_up,
            patience=self.patience,
            rollback_factor=self.rollback_factor,
        )

    @property
    def _running_state(self) -> SpikeState:
        assert self._state is not None
        return self._state

    def on_train_begin(self, logs: _types.Logs | None = None) -> None:
        if not self._is_running:
            raise errors.InvalidOptionError(
                "SpikeGuard must be among the `callbacks` passed to `fit`, by itself or in a list. "
                "Received: it was added in another way."
            )
        kept = self._running_state.counters()
        scale = getattr(self.model, "loss_scale_state", None)
        if scale is not None:
            kept.append(scale.skipped_updates)
        if self.snapshot_every is None:
            assert self._backup is not None
            self._source = _snapshot.BackupSource(self.model, kept, self._backup)
        else:
            self._source = _snapshot.Snapshots(self.model, kept, self.snapshot_every)
        self._count_left_out()

    def on_train_batch_begin(self, batch: int, logs: _types.Logs | None = None) -> None:
        self._batches.begin(batch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        state, source = self._running_state, self._source
        assert source is not None
        updates = self._batches.end(self.model)
        if state.number("is_due"):
            self._go_back(source)
        else:
            source.passed(updates, state.is_calm())
        self._count_left_out()
        self._log(logs)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._log(logs)

    def _log(self, logs: dict[str, Any] | None) -> None:
        if logs is not None:
            logs |= {"spikes": self.spikes, "rollbacks": self.rollbacks}

    def _count_left_out(self) -> None:
        state = self._running_state
        self.model.left_out_updates = state.number("spikes") + state.number("undone")

    def _go_back(self, source: _snapshot.Source) -> None:
        """Gives the model its earlier state; raises if that was allowed no more."""
        state = self._running_state
        reason = "its loss has risen" if state.number("risen_losses") else "updates stand out"
        before = self._iterations()
        source.restore()
        undone = before - self._iterations()
        state.went_back(undone)
        if self._workers.is_chief:
            _log.logger().info(
                "tfbig: training goes back by %d updates, because %s, and leaves their batches "
                "out (rollback %d)",
                undone,
                reason,
                state.number("rollbacks"),
            )
        if state.number("rollbacks") > self.max_rollbacks:
            raise errors.SpikeError(
                f"Training had to go back {state.number('rollbacks')} times, because {reason}; "
                f"max_rollbacks={self.max_rollbacks}. {self.spikes} updates were skipped. The "
                "weights are those that it went back to. Look at the data, lower the learning "
                f"rate, clip gradients, or raise `factor`. Received: factor={self.factor}."
            )

    def _iterations(self) -> int:
        """Updates of the optimizer that has most, as `TrainingMonitor` counts them."""
        optimizers = [optimizer for _, optimizer in _keras.optimizer.optimizers_of(self.model)]
        return max((int(o.iterations.numpy()) for o in optimizers), default=0)


def _check_factor(name: str, value: object) -> None:
    number = _numbers.as_number(value)
    if number is None or not 1 < number < math.inf:
        raise errors.InvalidOptionError(
            f"`{name}` must be a finite number > 1, a multiple of the median. Received: "
            f"{name}={value!r}."
        )
