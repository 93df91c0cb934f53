"""What training does, written down: `tfbig.callbacks.TrainingMonitor`."""

import contextlib
import csv
import importlib.util
import itertools
import math
import os
import pathlib
import resource
import sys
import time
import warnings
import weakref
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, errors
from tfbig.callbacks import _monitor_plot
from tfbig.distribute import _workers

__all__ = ("TrainingMonitor",)

_CSV, _PNG = "training.csv", "training.png"

# The columns that are the same for every model; those of its logs follow.
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
)

# Seconds from one row to the next, so that the rows cost nothing that could be seen.
_INTERVAL = 1.0

# The page is drawn anew at the end of an epoch if that takes no more of the time since it was
# drawn than this; until the first, which imports matplotlib, so many seconds are assumed.
_DRAWING_SHARE, _FIRST_DRAWING = 0.01, 1.0

# ru_maxrss is in KiB on Linux, in bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


# Of models: the updates that they count, and those seen here. The two differ where `train_step` is
# the user's, with an optimizer that the model does not hold.
_COUNTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class TrainingMonitor(keras.callbacks.Callback):
    """Writes down what training does: a CSV file, a page of plots, and TensorBoard's events.

    A row tells, as means over the updates since the row before: samples per second, seconds of
    an update, and how many of these it waited for data (`input_seconds`; the rest is computing and
    exchanging, which only a profiler tells apart). With deterministic operations the waiting is
    not known, nor are samples per second of data that do not tell the size of their batches: a
    Python generator, a `PyDataset`, a dataset of batches of several sizes. Then the learning rate,
    the peaks of memory (MiB) on the first device of this process and of the process itself, and
    the logs: loss and metrics of the epoch so far, `loss_scale` and `skipped_updates` while
    scaling is on, `grad_norm` and `gradient_noise_scale` where the model logs them; what is not
    one number is left out. `update` counts updates since the model was made, skipped ones
    included; with an optimizer that the model does not hold, those of a `fit` with the callback,
    and the learning rate is not known. Times leave out validation and the first update of a `fit`,
    which is traced. The last batch of an epoch counts as a full one.

    On several workers all may have the callback; the chief writes.

    Args:
        directory: str or path, where training.csv and training.png are written. A training that
            goes on adds its rows, and replaces those of updates that an interruption lost. Before
            one that begins anew, what is there is renamed to training.1.csv and training.1.png,
            or the first number that is free, with a warning.
        frequency: int, updates from row to row. Defaults to None: about a second.
        tensorboard: bool, whether events for TensorBoard are written into the directory. Defaults
            to None: if it is installed.
        plot: bool, whether training.png is drawn when training ends. Defaults to None: if
            matplotlib is installed; during it as well, at the end of an epoch after at least 100
            times as long as drawing takes. `draw()` does it at once, as after a Ctrl-C.
        enabled: bool. With False the callback does nothing. Defaults to True.

    Raises:
        InvalidOptionError: If an argument is not valid, what it needs is not installed, or, at
            the start of `fit`, the directory cannot be made, or holds a training.csv that is
            damaged or not of a monitor, which is left as it is, or two callbacks have the same.

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

    def __init__(self, directory, *, frequency=None, tensorboard=None, plot=None, enabled=True):
        super().__init__()
        if not str(directory) or "://" in str(directory):
            raise errors.InvalidOptionError(
                "`directory` must be a directory of a file system; mount other storage. Received: "
                f"directory={str(directory)!r}."
            )
        is_number = isinstance(frequency, int) and not isinstance(frequency, bool)
        if frequency is not None and not (is_number and frequency >= 1):
            raise errors.InvalidOptionError(
                "`frequency` must be an integer >= 1, a number of updates, or None. Received: "
                f"frequency={frequency!r}."
            )
        self.directory = pathlib.Path(directory)
        self.frequency = frequency
        self.tensorboard = _wanted("tensorboard", tensorboard, "tensorboard")
        self.plot = _wanted("plot", plot, "matplotlib")
        self.enabled = enabled
        self.rows: list[dict[str, Any]] = []
        self._events: Any = None
        self._names: tuple[str, ...] = ()
        self._is_running = False

    def set_model(self, model):
        super().set_model(model)
        if self.enabled and not hasattr(model, "input_clock"):
            raise errors.UnsupportedModelError(
                "tfbig.callbacks.TrainingMonitor needs a model of tfbig. Received: "
                f"{type(model).__name__}. Use tfbig.extend(model)."
            )

    def on_train_begin(self, logs=None):
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
        _, self._before = self._optimizer_and_updates()
        known, seen = _COUNTS.get(self.model, (None, None))
        self._epoch, self._update = 0, seen if known == self._before else self._before
        # Of training: a validation within `fit` has another.
        self._batch_size = self.model.batch_size_of_updates
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.rows = self._rows_before()
        except OSError as e:
            raise errors.InvalidOptionError(
                "`directory` must be one that can be made, and written to. Received: "
                f"directory={str(self.directory)!r} ({e}). Use another directory."
            ) from e
        self._seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0
        self._events = None
        if self.tensorboard:
            with self._writing_events():
                self._events = tf.summary.create_file_writer(str(self.directory))
        self._begin = self._last = self._drawn = time.perf_counter()
        self._drawing = _FIRST_DRAWING
        self._is_traced, self._names = False, ()
        self._restart()

    def _optimizer_and_updates(self):
        """The optimizer of the most updates, or None, and the updates that the model counts."""
        # Not that of `compile`, which makes one that may never be used.
        optimizers = [optimizer for _, optimizer in _keras.optimizer.optimizers_of(self.model)]
        optimizer = max(optimizers, key=lambda o: int(o.iterations.numpy()), default=None)
        updates = int(optimizer.iterations.numpy()) if optimizer else 0
        return optimizer, updates + getattr(self.model, "skipped_updates", 0)

    def _count(self):
        """Corrects the update by what the model counts; returns the optimizer, or None."""
        optimizer, updates = self._optimizer_and_updates()
        if updates == self._before:
            optimizer = None  # The model does not hold it; what was seen here counts.
        else:
            self._update = updates
        _COUNTS[self.model] = updates, self._update
        return optimizer

    def _rows_before(self):
        """The rows of the training that goes on; those of another are kept under another name."""
        rows = _read(self.directory / _CSV)
        if rows and self._update == 0:
            # Not an error: a job that failed before its first backup is started again like this.
            warnings.warn(
                f"Training begins anew; the {len(rows)} rows in {self.directory} are kept as "
                f"{_put_aside(self.directory)}.",
                stacklevel=3,
            )
            return []
        # An interrupted training goes on from its backup, and repeats what came after it.
        return [row for row in rows if row["update"] <= self._update]

    def on_epoch_begin(self, epoch, logs=None):
        if self._is_running:
            self._epoch, self._done = epoch, None
            self._restart()

    def on_train_batch_begin(self, batch, logs=None):
        if self._is_running and self._done is None:
            # In the middle of an epoch, if training goes on there.
            self._done = batch

    def on_train_batch_end(self, batch, logs=None):
        if not self._is_running:
            return
        # With steps_per_execution, Keras counts beyond the end of the data.
        end = min(batch + 1, self.params.get("steps") or batch + 1)
        updates = end - self._done
        self._done += updates
        self._update += updates
        self._last = time.perf_counter()
        waited = self._wait()
        if self._is_traced:
            self._updates += updates
            self._waited += waited
        else:
            # What it took was for the most part tracing.
            self._is_traced = True
            self._restart()
        if self.frequency is not None:
            is_due = self._update // self.frequency > (self._update - updates) // self.frequency
        else:
            is_due = self._updates and self._last - self._since >= _INTERVAL
        if is_due:
            self._write(logs)

    def on_epoch_end(self, epoch, logs=None):
        if not self._is_running:
            return
        if self._updates or not self.rows:
            self._write({k: v for k, v in logs.items() if not k.startswith("val_")})
        since = time.perf_counter() - self._drawn
        if self._drawing <= _DRAWING_SHARE * since:
            self.draw()

    def on_train_end(self, logs=None):
        if not self._is_running:
            return
        self._is_running = False
        self._count()
        if self._events is not None:
            with self._writing_events():
                self._events.close()
        self.draw()

    def draw(self):
        """Draws training.png of the rows so far, if there are any and pages are drawn."""
        if not (self.plot and self.rows):
            return
        begin = time.perf_counter()
        path = self.directory / _PNG
        try:
            _monitor_plot.draw(self.rows, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        except OSError as e:
            _warn(path, e)
        self._drawn = time.perf_counter()
        self._drawing = self._drawn - begin

    def _restart(self):
        """The next row's means begin here."""
        self._since, self._updates, self._waited = time.perf_counter(), 0, 0.0

    def _write(self, logs):
        optimizer = self._count()
        seconds = waited = samples = None
        if self._updates:
            # Not until now: what follows an epoch's last update, such as a validation, is left out.
            seconds = (self._last - self._since) / self._updates
            # Not known with deterministic operations.
            waited = self._waited / self._updates if math.isfinite(self._waited) else None
            samples = self._batch_size
        measured: tuple[Any, ...] = (
            self._update,
            self._epoch,
            self._seconds_before + self._last - self._begin,
            samples and samples / seconds,
            seconds,
            waited,
            _learning_rate(optimizer) if optimizer else None,
            _device_mib(self.model.distribute_strategy),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT / 2**20,
        )
        # The columns win over metrics of the same name.
        row = _numbers(logs) | dict(zip(COLUMNS, measured, strict=True))
        self.rows.append(row)
        self._write_csv(row)
        if self._events is not None:
            with self._writing_events(), self._events.as_default():
                for name, value in row.items():
                    if value is not None and name != "update":
                        tf.summary.scalar(name, value, step=row["update"])
                self._events.flush()
        self._restart()

    @contextlib.contextmanager
    def _writing_events(self):
        """Ends the events, and not training, if they cannot be written."""
        try:
            yield
        except (OSError, tf.errors.OpError) as e:
            self._events = None
            _warn(f"TensorBoard's events in {self.directory}", e)

    def _write_csv(self, row):
        # Another column, as after the first epoch of a callback that adds one, is a new file.
        is_new = not row.keys() <= set(self._names)
        if is_new:
            names = [name for r in self.rows for name in r if name not in COLUMNS]
            self._names = (*COLUMNS, *dict.fromkeys(names))
        try:
            _append(self.directory / _CSV, self._names, self.rows if is_new else [row], is_new)
        except OSError as e:
            self._names = ()
            _warn(self.directory / _CSV, e)


def _warn(what, error):
    warnings.warn(f"{what} could not be written: {error}. Training goes on.", stacklevel=3)


def _wanted(name, value, package):
    """Whether what needs a package is wanted: by default if it is installed."""
    is_there = importlib.util.find_spec(package) is not None
    if value and not is_there:
        raise errors.InvalidOptionError(
            f"`{name}` needs {package}, which is not installed. Received: {name}={value!r}. "
            f"pip install {package}"
        )
    return is_there if value is None else bool(value)


def _numbers(logs):
    """The single numbers; a metric may be of several, and a callback may put in anything."""
    found = {}
    for name, value in logs.items():
        with contextlib.suppress(TypeError, ValueError):
            # float takes texts too.
            if np.ndim(value) == 0 and not isinstance(value, str | bytes):
                found[name] = float(value)
    return found


def _learning_rate(optimizer):
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _device_mib(strategy):
    """The peak of the memory of the first device, where TensorFlow counts it, else None."""
    try:
        info = tf.config.experimental.get_memory_info(_keras.devices.devices_of(strategy)[0])
    except (ValueError, tf.errors.OpError):
        return None
    return info["peak"] / 2**20


def _read(path):
    """The rows of a file, or none."""

    def value(name, text):
        if name in ("update", "epoch"):
            return int(text)
        return float(text) if text else None

    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
            if lines and None in lines[-1].values():
                del lines[-1]  # Of a program that was killed while it wrote.
            rows = [{k: value(k, v) for k, v in line.items()} for line in lines]
            if rows and not {"update", "seconds"} <= rows[0].keys():
                raise ValueError("its columns are others")
            return rows
    except (OSError, ValueError, TypeError, csv.Error) as e:
        raise errors.InvalidOptionError(
            f"{path} must be the file of a TrainingMonitor. Received: one that cannot be read "
            f"({e}). Use another directory."
        ) from e


def _put_aside(directory):
    """Renames the files of another training; returns the name of its rows."""
    for number in itertools.count(1):
        names = {name: name.replace(".", f".{number}.") for name in (_CSV, _PNG)}
        if not any((directory / new).exists() for new in names.values()):
            break
    for name, new in names.items():
        if (directory / name).exists():
            (directory / name).rename(directory / new)
    return names[_CSV]


def _append(path, names, rows, is_new):
    """Adds rows to a file; a new one replaces what was there in one step."""
    target = path.with_suffix(".tmp") if is_new else path
    with open(target, "w" if is_new else "a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    if is_new:
        os.replace(target, path)
