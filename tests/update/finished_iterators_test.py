"""Training, evaluation and prediction do not wait for the end of iterators, whatever the data."""

import functools
import gc
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.ops import gen_dataset_ops

import tfbig
from tests.conftest import make_strategy
from tfbig._keras import finished_iterators

# Keras's own, at the end of data whose number of batches it was not told.
pytestmark = pytest.mark.filterwarnings("ignore:Your input ran out of data")

X = np.arange(20, dtype="float32")[:, None]
BATCHES = 5  # Of four samples each.


class Ends:
    """On which threads the resources of iterators end.

    Attributes:
        made: how many were made.
        threads: the names of the threads on which those that ended did.
    """

    def __init__(self):
        self.made = 0
        self.threads = []

    def recorded(self, make):
        @functools.wraps(make)
        def make_recorded(*args, **kwargs):
            resource = make(*args, **kwargs)
            self.made += 1
            # Runs where the last reference is dropped, and with it the resource.
            weakref.finalize(resource, self._end)
            return resource

        return make_recorded

    def _end(self):
        self.threads.append(threading.current_thread().name)

    def all_of_them(self):
        """The names of the threads, once all iterators have ended."""
        deadline = time.monotonic() + 60
        while len(self.threads) < self.made and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.threads) == self.made > 0
        return set(self.threads)


@pytest.fixture
def ends(monkeypatch):
    found = Ends()
    for name in ("anonymous_iterator_v3", "anonymous_multi_device_iterator_v3"):
        monkeypatch.setattr(gen_dataset_ops, name, found.recorded(getattr(gen_dataset_ops, name)))
    # Threads change as often as possible, also in the middle of the end of an iterator.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield found
    sys.setswitchinterval(interval)


def linear(sequential=tfbig.Sequential, strategy="default", **kwargs):
    with make_strategy(strategy).scope():
        model = sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", **kwargs)
    return model


def dataset():
    slices = tf.data.Dataset.from_tensor_slices((X, X))
    return slices.map(lambda *pair: pair, num_parallel_calls=tf.data.AUTOTUNE).batch(4)


def of_unknown_length():
    return dataset().filter(lambda *_: True)


def generator():
    while True:
        yield X[:4], X[:4]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        return X[index * 4 : index * 4 + 4], X[index * 4 : index * 4 + 4]


ARRAYS = {"x": X, "y": X, "batch_size": 4}
# The arguments of `fit`, of which generators are made anew.
FITS = {
    "arrays": lambda: ARRAYS,
    "split": lambda: ARRAYS | {"validation_split": 0.2},
    "validation": lambda: ARRAYS | {"validation_data": dataset()},
    "dataset": lambda: {"x": dataset(), "validation_data": (X, X)},
    "unknown-length": lambda: {"x": of_unknown_length()},
    "class-weight": lambda: {"x": dataset(), "class_weight": dict.fromkeys(range(20), 1.0)},
    "endless": lambda: {"x": dataset().repeat(), "steps_per_epoch": 3},
    "generator": lambda: {"x": generator(), "steps_per_epoch": 3},
    "py-dataset": lambda: {"x": Batches()},
}


def fit(model, arguments, **kwargs):
    return model.fit(**{"epochs": 3, "verbose": 0, "shuffle": False} | arguments, **kwargs)


@pytest.mark.parametrize("arguments", FITS.values(), ids=FITS)
@pytest.mark.parametrize("steps", [1, 2], ids=["one-step", "two-steps"])
def test_fit_lets_no_iterator_end_on_its_thread(ends, arguments, steps):
    fit(linear(steps_per_execution=steps), arguments())
    assert threading.current_thread().name not in ends.all_of_them()


@pytest.mark.parametrize("name", ["arrays", "dataset"])
def test_fit_on_replicas_lets_no_iterator_end_on_its_thread(ends, name):
    fit(linear(strategy="mirrored_2"), FITS[name]())
    assert threading.current_thread().name not in ends.all_of_them()


@pytest.mark.parametrize("make", [lambda: X, dataset, lambda: Batches()])
def test_evaluate_and_predict_let_no_iterator_end_on_their_thread(ends, make):
    model, data = linear(), make()
    model.evaluate(data, *([X] if data is X else []), verbose=0)
    model.predict(data, verbose=0)
    model.evaluate(dataset().repeat(), steps=2, verbose=0)
    model.predict(dataset().repeat(), steps=2, verbose=0)
    assert threading.current_thread().name not in ends.all_of_them()


def test_an_interrupted_fit_lets_no_iterator_end_on_its_thread(ends):
    def interrupt(batch, logs):
        raise KeyboardInterrupt

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(linear(), {"x": dataset()}, callbacks=[callback])
    gc.collect()  # The traceback.
    assert threading.current_thread().name not in ends.all_of_them()


def test_an_epoch_over_arrays_makes_one_iterator(ends):
    # Keras makes another one, which it does not read.
    fit(linear(), ARRAYS)
    assert ends.made == 3


def test_plain_keras_is_as_ever(ends):
    # Also shows that the tests above can fail.
    fit(linear(keras.Sequential), {"x": dataset()})
    assert ends.all_of_them() == {threading.current_thread().name}
    assert is_tuned(linear(keras.Sequential), ARRAYS)


def is_tuned(model, arguments):
    """Whether tf.data tunes the dataset that `fit` reads."""
    found = []

    class Look(finished_iterators.TFEpochIterator):
        """To see the dataset of a model that does not keep it."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self._distributed_dataset.options().autotune.enabled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras.src.backend.tensorflow.trainer.TFEpochIterator", Look)
        fit(model, arguments)
    (enabled,) = found
    return enabled is not False


@pytest.mark.parametrize(
    ("name", "expected"),
    [("arrays", False), ("generator", False), ("py-dataset", False), ("class-weight", True)],
)
def test_only_datasets_of_users_are_tuned(name, expected):
    assert is_tuned(linear(), FITS[name]()) is expected


def test_few_iterators_wait_at_the_same_time():
    wakes, asleep = threading.Event(), []

    class Sleeper:
        def __del__(self):
            asleep.append(self)
            wakes.wait(60)

    class Iterator:
        def __init__(self):
            self.resource = Sleeper()

    releaser = finished_iterators._Releaser()

    def finish(number):
        for _ in range(number):
            releaser.watch(Iterator())

    begin = threading.Thread(target=finish, args=(20,))
    begin.start()
    begin.join(1)
    try:
        assert begin.is_alive()
        assert len(asleep) == finished_iterators._THREADS
    finally:
        wakes.set()
    begin.join(60)
    releaser._stop()
    assert len(asleep) == 20


PROGRAM = """
    import keras, numpy, tensorflow as tf, tfbig, time

    model = tfbig.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensors((numpy.ones((4, 1)), numpy.ones((4, 1)))).repeat()
    sleep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.2))
    for _ in range(3):
        model.fit(data, steps_per_epoch=2, shuffle=False, callbacks=[sleep], verbose=0)
    print("trained")
"""


def test_a_program_ends_when_its_iterators_have_ended():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr[-2000:]


class Gaps(keras.callbacks.Callback):
    """Has an epoch take a number of seconds, and measures the time between epochs.

    Attributes:
        seconds: from the last batch of each epoch to the first of the next, or to the end of `fit`.
    """

    def __init__(self, seconds_per_epoch):
        super().__init__()
        self.pause = seconds_per_epoch / BATCHES
        self.seconds = []
        self._end = None

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.begin()

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(self.pause)
        self._end = time.perf_counter()

    def begin(self):
        if self._end is not None:
            self.seconds.append(time.perf_counter() - self._end)
        self._end = None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arrays", "dataset"])
@pytest.mark.parametrize(("seconds", "fits"), [(1.5, 4), (6.0, 4)])
def test_time_between_epochs(name, seconds, fits):
    arguments = FITS[name]() | {"validation_data": None, "epochs": 5}
    rows = {"plain": keras.Sequential, "tfbig": tfbig.Sequential}
    models = {row: linear(sequential) for row, sequential in rows.items()}
    gaps = {row: Gaps(seconds) for row in rows}
    for model in models.values():
        fit(model, arguments | {"epochs": 1})
    totals = dict.fromkeys(rows, 0.0)
    # In turn, so that other load slows both alike.
    for _ in range(fits):
        for row, model in models.items():
            begin = time.perf_counter()
            fit(model, arguments, callbacks=[gaps[row]])
            totals[row] += time.perf_counter() - begin
            gaps[row].begin()
    for row in rows:
        found = sorted(gaps[row].seconds)
        print(
            f"\n| {name} | {seconds:g} | {row} | {len(found)} | {totals[row]:.1f} | "
            f"{totals[row] / totals['plain']:.2f} | {1000 * statistics.median(found):.0f} | "
            f"{1000 * found[-1]:.0f} |",
            end="",
        )
    # Of plain Keras nothing is asserted: whether it waits is a matter of chance.
    assert max(gaps["tfbig"].seconds) < 0.1
