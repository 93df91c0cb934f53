"""Backups that training resumes from: `tfbig.callbacks.BackupAndRestore`."""

import contextlib
import os
import signal
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Literal

import keras

from tfbig import _integers, _keras, _types, errors
from tfbig._update import fit_context
from tfbig._update.stop_request import StopRequest
from tfbig.callbacks import _backup, _backup_files, _backup_lock, _backup_writer, _goodput
from tfbig.callbacks._batch_count import BatchCount
from tfbig.distribute import _workers

__all__ = ("PREEMPTED", "BackupAndRestore")

# Exit code of a program that was preempted and has a backup: scripts/jobset.yaml and train.sbatch
# start it again, and do not count that as a failure.
PREEMPTED = 138


class BackupAndRestore(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Backs up training, and resumes it when the program starts again.

    Training that is interrupted and resumed ends with the same weights as without the interruption:
    model, optimizer (and others that the model holds), loss scale, metrics and the states of random
    generators are restored, and the epoch resumes at the next batch. Arrays, and the batches of a
    `PyDataset`, are shuffled differently in each epoch, by a seed that is part of the backup. A
    `tf.data.Dataset` of your own must shuffle by a seed, as after `keras.utils.set_random_seed`,
    and so must a `PyDataset` that changes between epochs. Not restored are the counts of other
    callbacks, such as the patience of `EarlyStopping` and `ReduceLROnPlateau`, and random
    generators that the model does not hold. An epoch that resumes keeps its learning rate, whatever
    callbacks set when it begins once more.

    Restores before the other callbacks of `fit` act, and backs up after them. `initial_epoch` is
    where training begins if there is no backup; one of an earlier epoch is refused.

    One training at a time can use a directory. `fit` of another waits for half a minute, and then
    raises. A program that is killed leaves nothing to wait for. Some network file systems have no
    locks, so that this is not noticed there.

    With several workers, all must have the callback, with the same directory, which all can read.
    The chief writes. With `shard`, all workers must be able to write there: each writes its part of
    what is divided over them to a file of its own. Arrays are put together again one by one when
    they are restored, so training may resume on another number of replicas, workers or stages,
    divided or not.

    A backup is replaced atomically once it is complete, with the files of all workers. If it cannot
    be written, training continues with a warning, and the previous backup stays.

    With `save_on_background`, training stops only while the state is copied into the memory of the
    host; a thread writes the copy. From the first backup until `fit` ends, it takes as much memory
    as the state: with Adam in float32, 12 bytes per parameter on the chief; with `shard`, on each
    worker as much as lies there. There is one copy: a backup that is due while the previous one is
    being written waits for it. The running one is finished before a backup at a preemption, which
    is written at once, and before training ends, also by an exception or Ctrl-C.

    SIGTERM, with which machines are preempted, triggers a backup after the running update, on all
    workers the same one, whichever of them received the signal. Then the program ends with exit
    code 138 (`tfbig.callbacks.PREEMPTED`), or with 143, as from the signal itself, if that backup
    could not be written. During a validation, the backup is taken after the running batch; with
    several workers, after the validation.

    Args:
        backup_dir: str or path, the directory of the backup: on a file system, not a URL. Use it
            for nothing else.
        save_freq: "epoch", or the number of updates after which a backup is taken. Defaults to
            "epoch". With `steps_per_execution`, a backup is taken after the execution that reaches
            the number.
        on_preemption: "exit": as above. A function without arguments: it is called after the
            backup, instead of the exit, and training ends as with `model.stop_training`. None:
            SIGTERM is ignored by the callback. Defaults to "exit".
        delete_checkpoint: whether the backup is removed when training has ended. Defaults to True,
            as in Keras. With False, a `fit` that has ended, even by `EarlyStopping`, does nothing
            when run again, and resumes when run with more epochs. A backup that has come further
            than `epochs` stays in either case, with a warning, and nothing is trained.
        save_on_background: whether a thread writes backups while training continues, as above.
            Defaults to False.
        keep: the number of backups that stay, the newest ones: backup.npz, backup-1.npz before it,
            and so on. If the newest is damaged, the error names the next; training resumes from
            that one once the newest is moved away. Defaults to 1.

    Raises:
        InvalidOptionError: If an argument is not valid.
        BackupError: At the start of `fit`, if another training uses the directory, or the backup is
            damaged, belongs to another model, or is of an epoch before `initial_epoch`. It is kept.

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
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: int | Literal["epoch"] = "epoch",
        *,
        on_preemption: Literal["exit"] | Callable[[], object] | None = "exit",
        delete_checkpoint: bool = True,
        save_on_background: bool = False,
        keep: int = 1,
    ) -> None:
        super().__init__()
        if not str(backup_dir):
            raise errors.InvalidOptionError(
                "`backup_dir` must not be empty. Received: ''. Pass the path of a directory."
            )
        if "://" in str(backup_dir):
            raise errors.InvalidOptionError(
                "`backup_dir` must be a directory of a file system; mount the storage. Received: "
                f"backup_dir={str(backup_dir)!r}."
            )
        if on_preemption not in ("exit", None) and not callable(on_preemption):
            raise errors.InvalidOptionError(
                "`on_preemption` must be 'exit', a function or None. Received: "
                f"on_preemption={on_preemption!r}."
            )
        if not isinstance(save_on_background, bool):
            raise errors.InvalidOptionError(
                "`save_on_background` must be True or False. Received: "
                f"save_on_background={save_on_background!r}."
            )
        self.backup_dir = backup_dir
        self.save_freq: int | Literal["epoch"] = "epoch"
        if save_freq != "epoch":
            rule = "'epoch' or an integer >= 1, a number of updates"
            self.save_freq = _integers.checked("save_freq", save_freq, rule=rule)
        self.on_preemption = on_preemption
        self.delete_checkpoint = delete_checkpoint
        self.save_on_background = save_on_background
        self.keep = _integers.checked("keep", keep, rule="an integer >= 1, a number of backups")
        # None outside of `fit`.
        self._request: StopRequest | None = None
        self._writer: _backup_writer.BackupWriter | None = None

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if not hasattr(model, "stop_request"):
            raise errors.UnsupportedModelError(
                "tfbig.callbacks.BackupAndRestore needs a tfbig model. Received: "
                f"{type(model).__name__}. Use tfbig.extend(model), or "
                "keras.callbacks.BackupAndRestore."
            )

    # Any: the arguments of `fit` are of all types.
    @contextlib.contextmanager
    def around_fit(self, model: keras.Model, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Entered by `fit` of a tfbig model; the callback works only within it."""
        # The program may change into another directory meanwhile.
        self._directory = os.path.abspath(self.backup_dir)
        self._workers = _workers.Workers.of(model.distribute_strategy)
        with self._alone(), self._ready(model, arguments):
            yield

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no other training uses the directory."""
        return _backup_lock.held(self._directory, self._workers)

    # Any: the arguments of `fit` are of all types.
    @contextlib.contextmanager
    def _ready(self, model: keras.Model, arguments: Mapping[str, Any]) -> Iterator[None]:
        """A context in which the callback works."""
        self._first_epoch = arguments.get("initial_epoch") or 0
        self._callbacks = fit_context.callbacks_of(arguments.get("callbacks"))
        self._saved = self._read()
        self._writer = self._new_writer()
        self._seed = self._saved.backup.seed if self._saved else self._new_seed()
        self._epoch = self._since_backup = 0
        self._batches = BatchCount()
        # The metrics to restore at the start of the epoch, and those that a validation resets.
        self._metrics: list[_types.Array] = []
        self._metrics_of_training: list[_types.Array] = []
        # The learning rates of an epoch that resumes, and their values.
        self._rates: list[_types.KerasVariable] = []
        self._values_of_rates: list[_types.Array] = []
        # Those of the last batch of the epoch, which may have been another program's.
        self._logs: _types.Logs = {}
        self._is_without_batches = False
        # Whether the backup is of a training that has ended, or has come further than this one may;
        # and whether it has come further.
        self._is_complete = self._is_longer = False
        is_shared = self._workers.count > 1
        # With other workers it is part of the step, which must not be traced again.
        self._request = model.stop_request or StopRequest(model.distribute_strategy, is_shared)
        self._request.reset()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_keras.shuffling.reseeded_shuffling(self._seed))
                # With several workers, tfbig's own step carries the request.
                is_carried = not is_shared or _keras.replica_step.has_global_logs(model.train_step)
                if self.on_preemption is not None and not is_carried:
                    warnings.warn(
                        "BackupAndRestore leaves SIGTERM alone: with several workers it needs "
                        "tfbig's `train_step`. Received: that of "
                        f"{type(model).__name__}.",
                        stacklevel=6,
                    )
                elif self.on_preemption is not None:
                    stack.enter_context(self._request.listening())
                    if is_shared:
                        model.stop_request = self._request
                yield
        finally:
            _keras.epoch_iterator.set_initial_epoch(model, 0)
            if self._saved is not None:
                self._saved.close()
            writer, self._writer = self._writer, None
            self._request = self._data = self._saved = None
            self._callbacks = []
            writer.end()

    @property
    def _running_request(self) -> StopRequest:
        assert self._request is not None
        return self._request

    @property
    def _running_writer(self) -> _backup_writer.BackupWriter:
        assert self._writer is not None
        return self._writer

    def _read(self) -> _backup.SavedBackup | None:
        """The backup, which must be the same on all workers."""
        saved = _backup.read(self._directory)
        backup = saved.backup if saved is not None else None
        seen = f"epoch {backup.epoch}, batch {backup.batch}" if backup else "none"
        is_function = callable(self.on_preemption)
        settings = {
            "backup": f"{seen}, in {self.backup_dir}",
            "delete_checkpoint": str(self.delete_checkpoint),
            "save_on_background": str(self.save_on_background),
            "keep": str(self.keep),
            "on_preemption": "a function" if is_function else str(self.on_preemption),
        }
        try:
            self._workers.agree("BackupAndRestore", settings)
        except BaseException:
            if saved is not None:
                saved.close()
            raise
        return saved

    def _new_writer(self) -> _backup_writer.BackupWriter:
        # Not of the seeds of the program, which are the same when it starts again.
        fit = self._workers.exchange("a name for backups", uuid.uuid4().hex)[0]
        return _backup_writer.BackupWriter(self._directory, self._workers, self.keep, fit)

    def _new_seed(self) -> int:
        return int(self._workers.exchange("a seed", str(_keras.shuffling.new_seed()))[0])

    def before_others(self) -> _types.Callback:
        """A callback that restores, to be called before all others."""
        return keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: self._restore(),
            on_train_batch_end=lambda batch, logs: self._remember(logs),
            on_epoch_end=lambda epoch, logs: self._complete(logs),
        )

    def _remember(self, logs: _types.Logs | None) -> None:
        self._logs, self._is_without_batches = dict(logs or {}), False

    def _complete(self, logs: MutableMapping[str, object]) -> None:
        """Adds what only a batch reports to the logs of an epoch resumed after its last batch."""
        if self._is_without_batches:
            for name, value in self._logs.items():
                logs.setdefault(name, value)
        self._logs, self._is_without_batches = {}, False

    def on_train_begin(self, logs: _types.Logs | None = None) -> None:
        if self._request is None:
            raise errors.InvalidOptionError(
                "BackupAndRestore must be among the `callbacks` passed to `fit`, by itself or in a "
                "list. Received: it was added in another way."
            )
        self._restore()  # Does nothing if `before_others` has restored.

    def _restore(self) -> None:
        self._data = _keras.epoch_iterator.of_fit(self.model)
        saved, self._saved = self._saved, None
        # Raises if a variable cannot be backed up: before training, even without a backup.
        state = _backup.State(self.model)
        if saved is not None:
            with contextlib.closing(saved):
                if not _backup.is_of(state, saved):
                    self.model.build_by_step()
                    state = _backup.State(self.model)
                self._restore_from(saved, state)

    def _restore_from(self, saved: _backup.SavedBackup, state: _backup.State) -> None:
        backup = saved.backup
        is_resized = _keras.resized_batches.of(self._data) is not None
        if is_resized != (backup.resized is not None):
            have = {True: "with a BatchSizeSchedule", False: "without a BatchSizeSchedule"}
            raise errors.BackupError(
                f"The backup in {self.backup_dir} is of a training {have[not is_resized]}, whose "
                f"data stand elsewhere. Received: a `fit` {have[is_resized]}. The file is kept. "
                "Use another directory, or the callbacks that training began with."
            )
        if self._first_epoch > max(backup.epoch, backup.ended_of or 0):
            raise errors.BackupError(
                f"The backup in {self.backup_dir} was taken after {backup.epoch} complete epochs, "
                f"before the epoch that training is to begin with. Received: initial_epoch="
                f"{self._first_epoch}. The file is kept. Leave `initial_epoch` out to resume from "
                "the backup, or use another directory."
            )
        if not is_resized:
            self._check_place(backup)
        if not _backup.assign(state, saved):
            raise errors.BackupError(
                f"The backup in {self.backup_dir} belongs to another model, optimizer or loss "
                f"scale: {_backup.first_difference(state, saved)}. The file is kept. "
                "Use another directory, or the model that the backup was made from."
            )
        _keras.optimizer.forget_swap(self._callbacks)
        self._epoch, self._batches.done = backup.epoch, backup.batch
        self._batches.is_cut_short = backup.is_cut_short
        self._first_epoch = backup.first_epoch
        epochs = self.params["epochs"]
        self._is_longer = (backup.epoch, backup.batch) > (epochs, 0)
        self._is_complete = self._is_longer or epochs <= (backup.ended_of or 0)
        if self._is_longer:
            warnings.warn(
                f"The backup in {self.backup_dir} was taken after batch {backup.batch} of epoch "
                f"{backup.epoch + 1}, and training is to end before. Received: epochs={epochs}. "
                "Nothing is trained, the model is as in the backup, and the backup stays. Pass "
                "more epochs to resume, or use another directory.",
                stacklevel=2,
            )
        if self._is_complete:
            _keras.epoch_iterator.set_initial_epoch(self.model, epochs)
            return
        self._logs, self._is_without_batches = dict(backup.logs), True
        self._metrics = list(saved.arrays(len(backup.described) - len(state.metrics)))
        self._rates = _keras.optimizer.learning_rates_of(self.model)
        self._values_of_rates = _keras.variables.values_of(self._rates)
        _keras.epoch_iterator.set_initial_epoch(self.model, self._epoch)
        complete = backup.epoch - backup.first_epoch
        resized = _keras.resized_batches.of(self._data)
        if resized is not None:
            assert backup.resized is not None
            resized.resume(backup.batch, backup.resized)
        else:
            _keras.epoch_iterator.resume(self._data, complete, backup.batch, backup.num_batches)

    def _check_place(self, backup: _backup.Backup) -> None:
        """Checks that the data have the batch after which the backup was taken."""
        steps, batches = self.model.steps_per_execution, backup.batch
        if batches % steps and batches != backup.num_batches and not backup.is_cut_short:
            raise errors.BackupError(
                f"The backup in {self.backup_dir} was taken after batch {batches} of an epoch, "
                f"where no execution ends. Received: steps_per_execution={steps}. The file is "
                f"kept. Use one that divides {batches}, such as 1, until that epoch has ended."
            )
        there = _keras.epoch_iterator.batches_per_epoch(self._data)
        if batches and None not in (there, backup.num_batches) and there != backup.num_batches:
            warnings.warn(
                f"The backup in {self.backup_dir} was taken after batch {batches} of an epoch of "
                f"{backup.num_batches} batches. Received: data of {there} batches. As many batches "
                "are left out, so this epoch does not use each sample once. Pass the data and the "
                "`batch_size` that training began with.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: _types.Logs | None = None) -> None:
        if self._epoch != epoch:  # With initial_epoch.
            self._epoch, self._batches = epoch, BatchCount()
        if self._batches.done:
            # Keras has just reset them.
            _keras.variables.assign_all(_backup.State(self.model).metrics, self._metrics)
            # Callbacks have set them for this epoch before, and again now: twice, if what they set
            # follows from what they find.
            _keras.variables.assign_all(self._rates, self._values_of_rates)
        self._metrics = []
        self._rates, self._values_of_rates = [], []

    def on_train_batch_begin(self, batch: int, logs: _types.Logs | None = None) -> None:
        self._batches.begin(batch)
        self._running_request.send()

    def on_train_batch_end(self, batch: int, logs: _types.Logs | None = None) -> None:
        self._since_backup += self._batches.end(self.model)
        self._running_writer.report()
        if self._running_request.is_agreed():
            self._preempt()
        elif self.save_freq != "epoch" and self._since_backup >= self.save_freq:
            self._write()

    # The hooks of a validation within `fit`; `evaluate` by itself is not affected.

    def on_test_begin(self, logs: _types.Logs | None = None) -> None:
        if self._request is not None:
            # The validation resets them.
            self._metrics_of_training = _keras.variables.values_of(
                _backup.State(self.model).metrics
            )

    def on_test_batch_end(self, batch: int, logs: _types.Logs | None = None) -> None:
        request = self._request
        if request is not None and not request.is_shared and request.is_agreed():
            self._preempt()

    def on_test_end(self, logs: _types.Logs | None = None) -> None:
        if self._request is not None and self._request.agree(self._workers):
            self._preempt()
        self._metrics_of_training = []

    def on_epoch_end(self, epoch: int, logs: _types.Logs | None = None) -> None:
        self._epoch, self._batches = epoch + 1, BatchCount()
        if self.save_freq == "epoch" and not self._running_request.is_handled:
            self._write()

    def on_train_end(self, logs: _types.Logs | None = None) -> None:
        if self._running_request.is_handled:
            return
        # The backup stays until all workers are here: if one failed now, it would have nothing
        # to resume from.
        if self._running_request.agree(self._workers):
            self._preempt(ended=True)
        elif not self.delete_checkpoint:
            self._write(ended=True, at_once=True)
        else:
            with _goodput.spending_on_backups(self.model.goodput_meters):
                self._running_writer.settle()
            if self._workers.is_chief and not self._is_longer:
                _backup_files.remove(self._directory)

    def wait_until_finished(self) -> None:
        """Waits until the backup that is being written, if there is one, is the newest.

        With several workers, all must call it at the same point.
        """
        if self._writer is None or not self.save_on_background:
            return
        with _goodput.spending_on_backups(self.model.goodput_meters):
            self._writer.settle()
            # The chief may still have been writing.
            self._workers.exchange("the end of a backup", "")

    def _write(self, ended: bool = False, at_once: bool = False) -> bool:
        """Writes a backup, or has it written; returns whether it could be written.

        With several workers, the chief writes, and all write what is divided over them.
        """
        if self._is_complete:
            # Nothing was trained, and the data do not stand where they stood then.
            return True
        with _goodput.backing_up(self.model.goodput_meters):
            self._since_backup = 0
            swapped = _keras.optimizer.swapped_averages(self.model, self._callbacks)
            state = _backup.State(self.model, swapped)
            is_on_background = self.save_on_background and not at_once
            return self._running_writer.write(
                self._described(state, ended), state, self._metrics_of_training, is_on_background
            )

    def _described(self, state: _backup.State, ended: bool) -> _backup.Backup:
        """What a backup of the present state says besides."""
        resized = _keras.resized_batches.of(self._data)
        return _backup.Backup(
            first_epoch=self._first_epoch,
            epoch=self._epoch,
            batch=self._batches.done,
            num_batches=_keras.epoch_iterator.batches_per_epoch(self._data),
            seed=self._seed,
            ended_of=self.params["epochs"] if ended else None,
            described=state.described,
            resized=None if resized is None else resized.state(),
            # A step of the user's own may return arrays.
            logs={k: float(v) for k, v in self._logs.items() if isinstance(v, (int, float))},
            is_cut_short=self._batches.is_cut_short,
        )

    def _preempt(self, ended: bool = False) -> None:
        """Backs up the present state and ends training."""
        self._running_request.is_handled = True
        written = str(self._write(ended, at_once=True))
        # A worker that ends takes the others with it, so all must wait for the chief.
        is_written = self._workers.exchange("the backup at a preemption", written)[0] == "True"
        if callable(self.on_preemption):
            self.model.stop_training = True
            self.on_preemption()
            return
        when = (
            "at its end"
            if ended
            else f"after batch {self._batches.done} of epoch {self._epoch + 1}"
        )
        what = "the backup is" if is_written else "no backup could be written"
        print(f"tfbig: preempted {when}; {what} in {self.backup_dir}", file=sys.stderr, flush=True)
        sys.exit(PREEMPTED if is_written else 128 + signal.SIGTERM)
