"""A record of training in numbers and plots: `tfbig.callbacks.TrainingMonitor`."""

import importlib.util
import math
import os
import pathlib
import resource
import sys
import time
import warnings

import keras

from tfbig import _integers, _keras, _types, errors
from tfbig.callbacks import (
    _batch_count,
    _flops,
    _goodput,
    _goodput_file,
    _monitor_events,
    _monitor_file,
    _monitor_plot,
    _readings,
    _update_count,
)
from tfbig.distribute import _workers

__all__ = ("TrainingMonitor",)

_PNG = "training.png"
_SKIPPED = "skipped_updates"

# The columns that every model has; those of its logs follow, and what is known of some models only.
COLUMNS = (
    "update",
    "epoch",
    "seconds",
    "samples_per_second",
    "update_seconds",
    "input_seconds",
    "learning_rate",
    "device_mib",
    "host_mib",
    "state_mib",
)

# Seconds between rows, long enough that the cost of a row does not show.
_INTERVAL = 1.0

# The plots are redrawn at the end of an epoch if drawing takes at most this share of the time since
# they were last drawn. The first drawing, which imports matplotlib, is assumed to take so many
# seconds.
_DRAWING_SHARE, _FIRST_DRAWING = 0.01, 1.0

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class TrainingMonitor(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Records training: a CSV file, a page of plots, and TensorBoard events.

    A row has, as means over the updates since the previous row: samples per second, seconds per
    update, and how many of these were spent waiting for data (`input_seconds`; the rest is
    computation and exchange, which only a profiler can separate). The waiting time is not known
    with deterministic operations, nor are samples per second for data of unknown batch size: a
    Python generator, a `PyDataset`, a dataset with batches of several sizes. Then follow the
    learning rate, the peak memory (MiB) on the first device of this process and of the process
    itself, what a replica holds of weights and optimizer state (`state_mib`; less with `shard`),
    and the logs: loss and metrics of the epoch so far, `loss_scale` and `skipped_updates` while
    scaling is on, `grad_norm` and `gradient_noise_scale` if the model logs them; entries that are
    not a single number are left out. With `pipeline`, `device_mib` and `state_mib` are those of
    the stage that has most, and `bubble` is the share of the time of forward and backward passes
    in which stages had nothing to do. With `BatchSizeSchedule`, they are joined by `batch_size`,
    that of the last update, and the learning rate is what its rule makes of it. `update` counts
    updates since the model was made, including those that were skipped or taken back; with an
    optimizer that the model does not hold, only updates of a `fit` with the callback count, and the
    learning rate is not known. Times exclude validation and the first update of a `fit`, which is
    traced. The last batch of an epoch counts as a full one.

    Where they are known, a row also has tokens per second; the floating-point operations that
    training needs for a sample (`flops_per_sample`): those of the matrix products and convolutions
    of the forward pass, three times; and which share of what the devices could make at most that
    is (`mfu`, model FLOPs utilization), as well as with what `recompute` computes twice (`hfu`).

    goodput.csv has the share of the wall time that went into updates that count, and those of the
    time lost, by cause; together they are 1. See docs/monitoring.md.

    With several workers, all may have the callback; the chief writes.

    Args:
        directory: str or path, the directory of training.csv and training.png. Training that
            resumes appends its rows, and replaces those of updates that an interruption lost.
            Before training that starts anew, existing files are renamed to training.1.csv and
            training.1.png, or the first free number, with a warning.
        frequency: the number of updates between rows. Defaults to None: about a second.
        tensorboard: whether events for TensorBoard are written to the directory. Defaults to None:
            if it is installed.
        plot: whether training.png is drawn when training ends. Defaults to None: if matplotlib is
            installed. It is also drawn during training, at the end of an epoch, at intervals of at
            least 100 times what drawing takes. `draw()` draws it at once, for instance after a
            Ctrl-C.
        tokens: the number of tokens of a sample, as a mean. Defaults to None: if the model has an
            embedding, the length of its first input of integers `(batch, length)`, padding
            included; unknown if the length varies.
        peak_flops: the floating-point operations that a device makes in a second at most, in the
            dtype of the model. Defaults to None: what the maker of the GPU or TPU has published,
            unknown for others and for the CPU.
        enabled: False turns the callback off. Defaults to True.

    Raises:
        InvalidOptionError: If an argument is not valid, or a package is needed and not installed;
            at the start of `fit`, if the directory cannot be made, if two callbacks have the same
            one, or if it holds a training.csv that is damaged or not of a monitor, which is kept.

    Example:

    >>> import tempfile
    >>> model = tfbig.Sequential([keras.Input((4,)), keras.layers.Dense(1)], loss_scale=8.0)
    >>> model.compile("sgd", "mse")
    >>> monitor = tfbig.callbacks.TrainingMonitor(tempfile.mkdtemp(), frequency=2, plot=False)
    >>> history = model.fit(
    ...     np.ones((32, 4)), np.ones((32, 1)), batch_size=8, verbose=0, callbacks=[monitor]
    ... )
    >>> [(row["update"], row["loss_scale"]) for row in monitor.rows]
    [(2, 8.0), (4, 8.0)]
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        frequency: int | None = None,
        tensorboard: bool | None = None,
        plot: bool | None = None,
        tokens: float | None = None,
        peak_flops: float | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if not str(directory) or "://" in str(directory):
            raise errors.InvalidOptionError(
                "`directory` must be a directory of a file system; mount other storage. Received: "
                f"directory={str(directory)!r}."
            )
        # The program may change into another directory.
        self.directory = pathlib.Path(directory).absolute()
        rule = "an integer >= 1, a number of updates, or None"
        self.frequency = _integers.checked_or_none("frequency", frequency, rule=rule)
        self.tensorboard = _is_wanted("tensorboard", tensorboard, "tensorboard")
        self.plot = _is_wanted("plot", plot, "matplotlib")
        self.tokens = _flops.check("tokens", tokens)
        self.peak_flops = _flops.check("peak_flops", peak_flops)
        self.enabled = enabled
        self.rows: list[_monitor_file.Row] = []
        self._events: _monitor_events.Events | None = None
        self._is_running = False
        self._batches = _batch_count.BatchCount()

    @property
    def measures_stages(self) -> bool:
        """Whether `fit` of a model with a pipeline has to measure how long stages wait."""
        return self.enabled

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if self.enabled and not hasattr(model, "input_clock"):
            raise errors.UnsupportedModelError(
                "tfbig.callbacks.TrainingMonitor needs a tfbig model. Received: "
                f"{type(model).__name__}. Use tfbig.extend(model)."
            )

    def on_train_begin(self, logs: _types.Logs | None = None) -> None:
        self._is_running = (
            bool(self.enabled) and _workers.Workers.of(self.model.distribute_strategy).is_chief
        )
        if not self._is_running:
            return
        # Another monitor may have made one.
        clock = self.model.input_clock = self.model.input_clock or _keras.input_clock.InputClock()
        name = os.path.realpath(self.directory)
        if name in clock.readers:
            raise errors.InvalidOptionError(
                "`callbacks` must hold only one TrainingMonitor of a directory. Received: two of "
                f"{self.directory}. Use another directory."
            )
        self._wait = clock.reader(name)
        self._count = _update_count.UpdateCount(self.model)
        self._epoch = 0
        self._left_out: int | None = None
        # Read now, because a validation within `fit` changes it.
        self._batch_size = self.model.batch_size_of_updates
        self._file = _monitor_file.RowsFile(self.directory, COLUMNS)
        self._goodput_file = _goodput_file.GoodputFile(self.directory)
        self._meter = _goodput.Goodput(
            _goodput_file.is_synchronous(self.model), self._write_goodput, self._close
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.rows = self._rows_before()
            self._goodput_file.begin(self.model, self._count.updates, self._meter)
        except OSError as e:
            raise errors.InvalidOptionError(
                "`directory` must be one that can be made, and written to. Received: "
                f"directory={str(self.directory)!r} ({e}). Use another directory."
            ) from e
        self._seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0
        self._events = _monitor_events.Events(self.directory) if self.tensorboard else None
        self.model.goodput_meters = (*self.model.goodput_meters, self._meter)
        with self._meter.spending("tracing"):
            self._rates = _flops.Rates(self.model, self.tokens, self.peak_flops)
        stage_clock = self.model.stage_clock
        self._bubble = None if stage_clock is None else stage_clock.reader()
        self._begin = self._last = self._drawn = time.perf_counter()
        self._drawing = _FIRST_DRAWING
        self._is_traced = False
        self._restart()

    def _rows_before(self) -> list[_monitor_file.Row]:
        """The rows of the training that resumes; those of another are kept under another name."""
        rows = self._file.read()
        if rows and self._count.updates == 0:
            # Not an error: a job that failed before its first backup restarts like this.
            others = [self._goodput_file.file.path, self.directory / _PNG]
            kept = self._file.put_aside(others)
            warnings.warn(
                f"Training starts anew; the {len(rows)} rows in {self.directory} are kept as "
                f"{kept}.",
                stacklevel=3,
            )
            return []
        # Interrupted training resumes from its backup, and repeats the updates that came after it.
        return [row for row in rows if row["update"] <= self._count.updates]

    def on_epoch_begin(self, epoch: int, logs: _types.Logs | None = None) -> None:
        if self._is_running:
            self._epoch = epoch
            self._restart()

    def on_train_batch_begin(self, batch: int, logs: _types.Logs | None = None) -> None:
        if self._is_running:
            self._batches.begin(batch)
            self._leave_out()
            self._meter.begin_update()

    def on_train_batch_end(self, batch: int, logs: _types.Logs | None = None) -> None:
        if not self._is_running:
            return
        updates = self._batches.end(self.model)
        self._count.updates += updates
        self._last = time.perf_counter()
        waited = self._wait()
        self._meter.end_update(updates, waited, self.model.times_traced, (logs or {}).get(_SKIPPED))
        if self._is_traced:
            self._updates += updates
            self._waited += waited
        else:
            # Most of the time so far went into tracing.
            self._is_traced = True
            self._restart()
        if self._is_due(updates):
            self._write(logs or {})

    def _is_due(self, updates: int) -> bool:
        """Whether to write a row, after so many updates in one execution."""
        if self.frequency is not None:
            now = self._count.updates
            return now // self.frequency > (now - updates) // self.frequency
        return self._updates > 0 and self._last - self._since >= _INTERVAL

    def on_epoch_end(self, epoch: int, logs: _types.Logs | None = None) -> None:
        if not self._is_running:
            return
        self._meter.turn_to("other")
        if self._updates or not self.rows:
            self._write({k: v for k, v in (logs or {}).items() if not k.startswith("val_")})
        self._write_goodput()
        since = time.perf_counter() - self._drawn
        if self._drawing <= _DRAWING_SHARE * since:
            self.draw()

    def on_test_begin(self, logs: _types.Logs | None = None) -> None:
        if self._is_running:
            self._meter.turn_to("validation")

    def on_test_end(self, logs: _types.Logs | None = None) -> None:
        if self._is_running:
            self._meter.turn_to("other")

    def on_train_end(self, logs: _types.Logs | None = None) -> None:
        if not self._is_running:
            return
        self._is_running = False
        self._count.correct()
        self._write_goodput(has_ended=True)
        if self._events is not None:
            self._events.close()
        self.draw()

    def draw(self) -> None:
        """Draws training.png from the rows so far, if there are any and plots are wanted."""
        if not (self.plot and self.rows):
            return
        begin = time.perf_counter()
        path = self.directory / _PNG
        try:
            _monitor_plot.draw(self.rows, path.with_suffix(".tmp"), self._goodput_file.rows)
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as e:
            _monitor_file.warn(path, e)
        self._drawn = time.perf_counter()
        self._drawing = self._drawn - begin

    def _restart(self) -> None:
        """Starts the means of the next row."""
        self._since, self._updates, self._waited = time.perf_counter(), 0, 0.0
        sizes = self.model.sizes_of_updates
        self._samples_before = 0 if sizes is None else sizes.samples

    def _samples_of_update(self) -> float | None:
        """The mean number of samples of an update since `_restart`; None if it is not known."""
        sizes = self.model.sizes_of_updates
        if sizes is None:
            size: int | None = self._batch_size
            return size
        return float(sizes.samples - self._samples_before) / self._updates

    def _write(self, logs: _types.Logs) -> None:
        # The columns win over metrics of the same name.
        row = _readings.numbers(logs) | self._measured()
        self.rows.append(row)
        try:
            self._file.write(self.rows)
        except OSError as e:
            _monitor_file.warn(self._file.path, e)
        self._meter.read_skipped()
        if self._events is not None:
            values = {k: v for k, v in row.items() if k != "update"}
            self._events.write(values, self._count.updates)
        self._restart()

    def _write_goodput(self, has_ended: bool = False) -> None:
        if not self._is_running and not has_ended:
            return
        self._leave_out()
        self._count.correct()
        try:
            row = self._goodput_file.write(self._meter, self._count.updates, self._epoch, has_ended)
        except OSError as e:
            _monitor_file.warn(self._goodput_file.file.path, e)
            return
        if self._events is not None:
            shares = {name: row[name] for name in _goodput_file.SHARES}
            self._events.write(shares, self._count.updates, "goodput/")

    def _leave_out(self) -> None:
        """Tells the meter of updates that `SpikeGuard` has skipped or taken back since then."""
        left_out = self.model.left_out_updates
        # What a backup or another `fit` has left out is known before the first batch.
        if self._left_out is not None:
            self._meter.leave_out(left_out - self._left_out)
        self._left_out = left_out

    def _close(self) -> None:
        """Called when `fit` has ended, also by an exception."""
        self._write_goodput()
        self._is_running = False

    def _measured(self) -> _monitor_file.Row:
        """The values of `COLUMNS`, and what is known of some models only."""
        optimizer = self._count.correct()
        seconds = waited = samples = None
        if self._updates:
            # Until the last update: what follows it in an epoch, such as validation, is left out.
            seconds = (self._last - self._since) / self._updates
            # Not known with deterministic operations.
            waited = self._waited / self._updates if math.isfinite(self._waited) else None
            samples = self._samples_of_update()
        rate = samples / seconds if samples and seconds is not None else None
        values: tuple[float | None, ...] = (
            self._count.updates,
            self._epoch,
            self._seconds_before + self._last - self._begin,
            rate,
            seconds,
            waited,
            _readings.learning_rate(optimizer) if optimizer else None,
            _readings.device_mib(self.model),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT / 2**20,
            _readings.state_mib(self.model),
        )
        bubble = {} if self._bubble is None else {"bubble": self._bubble()}
        return dict(zip(COLUMNS, values, strict=True)) | self._rates.row(rate) | bubble


def _is_wanted(name: str, value: bool | None, package: str) -> bool:
    """The value of an option that needs a package; by default, whether it is installed."""
    is_installed = importlib.util.find_spec(package) is not None
    if value and not is_installed:
        raise errors.InvalidOptionError(
            f"`{name}` needs {package}, which is not installed. Received: {name}={value!r}. "
            f"pip install {package}"
        )
    return is_installed if value is None else bool(value)
