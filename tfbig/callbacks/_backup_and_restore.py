"""Callbacks: backups that a training goes on from, effects of the chief alone, a record."""

import contextlib
import signal
import sys
import warnings
from typing import Any

import keras

from tfbig import _keras, errors
from tfbig.callbacks import _backup, _stop
from tfbig.distribute import _workers

__all__ = ("PREEMPTED", "BackupAndRestore", "ChiefOnly")

# Exit code of a program that was preempted and has a backup. Kubeflow restarts a
# replica with a code over 127, and reserves this one for programs.
PREEMPTED = 138


class BackupAndRestore(keras.callbacks.Callback):
    """Backs a training up, and goes on from there when the program starts again.

    An interrupted and resumed training ends with the weights of the uninterrupted
    one: model, optimizer (and others that the model holds), loss scale,
    metrics and the states of random generators are restored, and the epoch goes on with
    the batch that comes next. Arrays are shuffled in each epoch by a seed that the backup
    keeps; a `tf.data.Dataset` of your own must shuffle by a seed, as after
    `keras.utils.set_random_seed`. Not restored is what other callbacks count, such as the
    patience of `EarlyStopping` and `ReduceLROnPlateau`, and what is drawn from a
    generator that the model does not hold.

    Restores before and backs up after what the other callbacks of `fit` do.

    On several workers every one has the callback, with the same directory, that all
    can read. The chief writes.

    The backup is one file, replaced in one step after it is complete. If it cannot be
    written, training goes on with a warning and the previous one stays.

    SIGTERM, by which machines are preempted, takes a backup after the running update,
    on all workers the same, wherever the signal arrived; then the program ends
    with exit code 138 (`tfbig.callbacks.PREEMPTED`), or with 143, as by the signal
    itself, if that backup could not be written. In a validation it is taken after the
    running batch, on several workers after the validation.

    Args:
        backup_dir: str or path, where the backup is kept: a directory of a file system,
            not a URL. Not for anything else.
        save_freq: "epoch", or int, after how many updates a backup is taken.
            Defaults to "epoch". With `steps_per_execution` they are taken after the
            execution that reaches the number.
        on_preemption: "exit": as above. A function without arguments: it is called
            after the backup, instead of the exit, and training ends as with
            `model.stop_training`. None: SIGTERM is left alone. Defaults to "exit".
        delete_checkpoint: bool, whether the backup is removed when training has
            ended. Defaults to True, as in Keras. With False, a `fit` that has ended,
            also by `EarlyStopping`, does nothing when run again, and goes on when
            run with more epochs.

    Raises:
        InvalidOptionError: If an argument is not valid.
        BackupError: At the start of `fit`, if there is a backup of another model, or
            a damaged one. It is kept.

    Example:

    >>> import tempfile
    >>> model = tfbig.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> backup = tfbig.callbacks.BackupAndRestore(tempfile.mkdtemp(), save_freq=100)
    >>> history = model.fit(
    ...     np.ones((16, 4)), np.ones((16, 1)), epochs=3, verbose=0, callbacks=[backup]
    ... )
    >>> history.epoch
    [0, 1, 2]
    """

    def __init__(
        self, backup_dir, save_freq="epoch", *, on_preemption="exit", delete_checkpoint=True
    ):
        super().__init__()
        if not str(backup_dir):
            raise errors.InvalidOptionError("`backup_dir` must not be empty. Received: ''.")
        if "://" in str(backup_dir):
            raise errors.InvalidOptionError(
                "`backup_dir` must be a directory of a file system; mount the storage. Received: "
                f"backup_dir={str(backup_dir)!r}."
            )
        is_number = isinstance(save_freq, int) and not isinstance(save_freq, bool)
        if save_freq != "epoch" and not (is_number and save_freq >= 1):
            raise errors.InvalidOptionError(
                "`save_freq` must be 'epoch' or an integer >= 1, a number of updates. "
                f"Received: save_freq={save_freq!r}."
            )
        if on_preemption not in ("exit", None) and not callable(on_preemption):
            raise errors.InvalidOptionError(
                "`on_preemption` must be 'exit', a function or None. Received: "
                f"on_preemption={on_preemption!r}."
            )
        self.backup_dir = backup_dir
        self.save_freq = save_freq
        self.on_preemption = on_preemption
        self.delete_checkpoint = delete_checkpoint
        self._stop: Any = None

    def set_model(self, model):
        super().set_model(model)
        if not hasattr(model, "stop_request"):
            raise errors.UnsupportedModelError(
                "tfbig.callbacks.BackupAndRestore needs a model of tfbig. Received: "
                f"{type(model).__name__}. Use tfbig.extend(model), or "
                "keras.callbacks.BackupAndRestore."
            )

    @contextlib.contextmanager
    def around_fit(self, model, arguments):
        """Called by `fit` of a tfbig model; the callback works in here only."""
        self._first_epoch = arguments.get("initial_epoch") or 0
        self._workers = _workers.Workers.of(model.distribute_strategy)
        self._backup = self._read()
        self._seed = self._backup.seed if self._backup else self._new_seed()
        self._epoch = self._batch = self._since_backup = 0
        self._metrics = self._metrics_of_training = []
        is_shared = self._workers.count > 1
        # With other workers it is part of the step, which is not to be traced anew.
        self._stop = model.stop_request or _stop.StopRequest(model.distribute_strategy, is_shared)
        self._stop.reset()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_keras.shuffling.reseeded_shuffling(self._seed))
                # On several workers the request travels with tfbig's own step.
                is_carried = not is_shared or _keras.replica_step.has_global_logs(model.train_step)
                if self.on_preemption is not None and not is_carried:
                    warnings.warn(
                        "BackupAndRestore leaves SIGTERM alone: on several workers it needs the "
                        f"`train_step` of tfbig. Received: that of {type(model).__name__}.",
                        stacklevel=4,
                    )
                elif self.on_preemption is not None:
                    stack.enter_context(self._stop.listening())
                    if is_shared:
                        model.stop_request = self._stop
                yield
        finally:
            _keras.epoch_iterator.set_initial_epoch(model, 0)
            self._stop = self._data = self._backup = None

    def _read(self):
        """The backup, which must be the same on all workers."""
        backup = _backup.read(self.backup_dir)
        seen = f"epoch {backup.epoch}, batch {backup.batch}" if backup else "none"
        settings = {
            "backup": f"{seen}, in {self.backup_dir}",
            "delete_checkpoint": str(self.delete_checkpoint),
            "on_preemption": "a function" if callable(self.on_preemption) else self.on_preemption,
        }
        self._workers.agree("BackupAndRestore", settings)
        return backup

    def _new_seed(self):
        return int(self._workers.exchange("a seed", str(_keras.shuffling.new_seed()))[0])

    def before_others(self):
        """A callback that restores, to stand before all others."""
        return keras.callbacks.LambdaCallback(on_train_begin=lambda logs: self._restore())

    def on_train_begin(self, logs=None):
        if self._stop is None:
            raise errors.InvalidOptionError(
                "BackupAndRestore must be among the `callbacks` that `fit` is called with, by "
                "itself or in a list. Received: it came in another way."
            )
        self._restore()  # Unless that is done.

    def _restore(self):
        self._data = _keras.epoch_iterator.of_fit(self.model)
        backup, self._backup = self._backup, None
        # Before training, also where there is no backup yet: it says what cannot be in one.
        state = _backup.State(self.model)
        if backup is None:
            return
        if backup.described != state.described:
            raise errors.BackupError(
                f"The backup in {self.backup_dir} is of another model, optimizer or loss scale: "
                f"{_first_difference(backup.described, state.described)}. It is left as it is. "
                "Use another directory, or the model that it was made of."
            )
        _keras.variables.assign_all(state.variables, backup.arrays)
        self._epoch, self._batch = backup.epoch, backup.batch
        self._first_epoch = backup.first_epoch
        if backup.ended_of is not None and self.params["epochs"] <= backup.ended_of:
            _keras.epoch_iterator.set_initial_epoch(self.model, self.params["epochs"])
            return
        self._metrics = backup.arrays[len(backup.arrays) - len(state.metrics) :]
        _keras.epoch_iterator.set_initial_epoch(self.model, self._epoch)
        complete = backup.epoch - backup.first_epoch
        _keras.epoch_iterator.resume(self._data, complete, backup.batch, backup.num_batches)

    def on_epoch_begin(self, epoch, logs=None):
        if self._epoch != epoch:  # With initial_epoch.
            self._epoch, self._batch = epoch, 0
        if self._batch:
            # Keras has just reset them.
            _keras.variables.assign_all(_backup.State(self.model).metrics, self._metrics)
        self._metrics = []

    def on_train_batch_begin(self, batch, logs=None):
        self._stop.send()

    def on_train_batch_end(self, batch, logs=None):
        done = batch + 1
        self._since_backup += done - self._batch
        self._batch = done
        if self._stop.is_agreed():
            self._preempt()
        elif self.save_freq != "epoch" and self._since_backup >= self.save_freq:
            self._write()

    # Of a validation within `fit`; by itself `evaluate` is left alone.

    def on_test_begin(self, logs=None):
        if self._stop is not None:
            # Which a validation resets.
            self._metrics_of_training = _keras.variables.values_of(
                _backup.State(self.model).metrics
            )

    def on_test_batch_end(self, batch, logs=None):
        if self._stop is not None and not self._stop.is_shared and self._stop.is_agreed():
            self._preempt()

    def on_test_end(self, logs=None):
        if self._stop is not None and self._stop.agree(self._workers):
            self._preempt()
        self._metrics_of_training = []

    def on_epoch_end(self, epoch, logs=None):
        self._epoch, self._batch = epoch + 1, 0
        if self.save_freq == "epoch" and not self._stop.is_handled:
            self._write()

    def on_train_end(self, logs=None):
        if self._stop.is_handled:
            return
        # Not before all are here: one that failed now would start from nothing.
        if self._stop.agree(self._workers):
            self._preempt(ended=True)
        elif not self.delete_checkpoint:
            self._write(ended=True)
        elif self._workers.is_chief:
            _backup.remove(self.backup_dir)

    def _write(self, ended=False):
        """Writes a backup, on the chief; returns whether that went well."""
        self._since_backup = 0
        if not self._workers.is_chief:
            return True
        state = _backup.State(self.model)
        arrays = _keras.variables.values_of(state.variables)
        if self._metrics_of_training:
            arrays[-len(state.metrics) :] = self._metrics_of_training
        backup = _backup.Backup(
            first_epoch=self._first_epoch,
            epoch=self._epoch,
            batch=self._batch,
            num_batches=_keras.epoch_iterator.batches_per_epoch(self._data),
            seed=self._seed,
            ended_of=self.params["epochs"] if ended else None,
            described=state.described,
            arrays=arrays,
        )
        try:
            _backup.write(self.backup_dir, backup)
        except OSError as e:
            warnings.warn(
                f"The backup in {self.backup_dir} could not be written: {e}. Training goes on; "
                "the previous backup, if there is one, is intact.",
                stacklevel=2,
            )
            return False
        return True

    def _preempt(self, ended=False):
        """Ends training with a backup of this moment."""
        self._stop.is_handled = True
        written = str(self._write(ended))
        # A worker that ends takes the others with it, so the chief must be done.
        is_written = self._workers.exchange("the backup at a preemption", written)[0] == "True"
        if self.on_preemption != "exit":
            self.model.stop_training = True
            self.on_preemption()
            return
        when = "at its end" if ended else f"after batch {self._batch} of epoch {self._epoch + 1}"
        what = "the backup is" if is_written else "no backup could be written"
        print(f"tfbig: preempted {when}; {what} in {self.backup_dir}", file=sys.stderr, flush=True)
        sys.exit(PREEMPTED if is_written else 128 + signal.SIGTERM)


def _first_difference(saved, present):
    for k in range(max(len(saved), len(present))):
        pair = [lines[k] if k < len(lines) else "nothing" for lines in (saved, present)]
        if pair[0] != pair[1]:
            return "it holds {!r} where the model has {!r}".format(*pair)
    return "its number of arrays differs"


class ChiefOnly(keras.callbacks.Callback):
    """Callbacks that write files or print, on the chief alone.

    On the other workers of a job they do nothing. What they see is the same on all
    workers: logs are those of all samples. Not for callbacks that change training, such
    as `EarlyStopping`: all workers must have them.

    Args:
        callbacks: A callback, or several.

    Raises:
        InvalidOptionError: If an argument is not a Keras callback.

    Example:

    >>> callback = tfbig.callbacks.ChiefOnly(keras.callbacks.CSVLogger("history.csv"))
    """

    def __init__(self, *callbacks):
        super().__init__()
        self.callbacks = keras.tree.flatten(callbacks)
        for callback in self.callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise errors.InvalidOptionError(
                    f"`callbacks` must be Keras callbacks. Received: {callback!r}."
                )
            if hasattr(callback, "around_fit"):
                raise errors.InvalidOptionError(
                    f"All workers must have this callback. Received: {type(callback).__name__} in "
                    "ChiefOnly. Give it to `fit` itself: it leaves writing to the chief."
                )
        self._active = self.callbacks

    def set_params(self, params):
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        is_chief = _workers.Workers.of(model.distribute_strategy).is_chief
        self._active = self.callbacks if is_chief else []
        for callback in self._active:
            callback.set_model(model)


def _forward(name):
    def call(self, *args, **kwargs):
        for callback in self._active:
            getattr(callback, name)(*args, **kwargs)

    call.__name__ = name
    return call


for _name in (
    *(f"on_{run}_{moment}" for run in ("train", "test", "predict") for moment in ("begin", "end")),
    *(f"on_{run}_batch_{end}" for run in ("train", "test", "predict") for end in ("begin", "end")),
    *(f"on_epoch_{moment}" for moment in ("begin", "end")),
):
    setattr(ChiefOnly, _name, _forward(_name))
