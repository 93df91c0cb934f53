"""The effective batch in the course of training: `tfbig.callbacks.BatchSizeSchedule`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import keras

from tfbig import _keras, _types, errors
from tfbig.callbacks import _batch_sizes

__all__ = ("BatchSizeSchedule",)


class BatchSizeSchedule(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
    """Changes the effective batch in the course of training.

    Update n of `fit` gets exactly as many samples as the schedule says, over all replicas, and is
    the update that plain Keras would make of a batch of that size. Only the last batch of an epoch
    may be smaller. An epoch is one pass over the data, so its number of updates changes.

    Updates count from 0, since the model was made, including skipped ones, as in `TrainingMonitor`:
    another `fit` continues the schedule, and so does training that `BackupAndRestore` resumes.

    Data are arrays or a `tf.data.Dataset` of batches of any size, which are joined and cut to the
    sizes of the schedule; the order of samples is that of `fit` without the callback. With several
    workers, arrays only. Each batch is put together when its update begins: the dataset's own
    `prefetch` goes on, but this last step does not overlap with training.

    With `micro_batch_size`, a larger batch takes more micro-batches and no more memory; with
    `gradient_accumulation_steps`, or neither, the micro-batch grows, and with it the memory.
    `batch_size` in the logs is the size of the last update.

    Args:
        sizes: a dictionary `{update: size}`, in which each size holds from its update on and update
            0 must occur. Or a function of the update that returns its size, the same one whenever
            it is asked. Or "noise_scale": the size begins at the smallest of `bounds`. After every
            `interval` updates, it doubles if the gradient noise scale is at least as large as the
            doubled size; it never shrinks. That is decided just before the next update. A
            model that comes from a file continues with the largest such size that its noise scale
            reaches. Needs `log_gradient_noise_scale=True`, and a smallest batch that comes to two
            micro-batches or replicas.
        learning_rate: "linear": the learning rate is multiplied by the size over the first size,
            that of update 0. "square_root": by the square root of that. It multiplies what a
            learning-rate schedule or another callback sets, in all optimizers of the model, for
            gradients as for weight decay; `optimizer.learning_rate` stays without it. Defaults to
            None: the learning rate stays as it is.
        bounds: the smallest and the largest size, for "noise_scale" alone.
        interval: int >= 1, the updates after which "noise_scale" decides. Defaults to 100, over
            which the noise scale is averaged.

    Raises:
        InvalidOptionError: If an argument is not valid; at the start of `fit`, if a size is smaller
            than the number of replicas, if the data cannot be resized, or `fit` is given another
            `batch_size`.
        UnsupportedModelError: If the model is not a tfbig model.
        UnsupportedStrategyError: On a TPU, which compiles a program for each size.

    Example:

    >>> model = tfbig.Sequential([keras.Input((4,)), keras.layers.Dense(1)], micro_batch_size=8)
    >>> model.compile("sgd", "mse")
    >>> schedule = tfbig.callbacks.BatchSizeSchedule({0: 8, 2: 16, 3: 32}, learning_rate="linear")
    >>> history = model.fit(
    ...     np.ones((64, 4)), np.ones((64, 1)), epochs=2, verbose=0, callbacks=[schedule]
    ... )
    >>> history.history["batch_size"], int(model.optimizer.iterations.numpy())
    ([32.0, 32.0], 6)

    Reference: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training"; Smith et al.
    2018, "Don't Decay the Learning Rate, Increase the Batch Size".
    """

    def __init__(
        self,
        sizes: Mapping[int, int] | Callable[[int], int] | Literal["noise_scale"],
        *,
        learning_rate: Literal["linear", "square_root"] | None = None,
        bounds: tuple[int, int] | None = None,
        interval: int | None = None,
    ) -> None:
        super().__init__()
        self._policy = _batch_sizes.policy_of(sizes, bounds, interval)
        if learning_rate not in _batch_sizes.RULES:
            raise errors.InvalidOptionError(
                "`learning_rate` must be 'linear', 'square_root' or None. Received: "
                f"learning_rate={learning_rate!r}."
            )
        self.sizes = sizes
        self.learning_rate = learning_rate
        self.bounds = bounds
        self.interval = interval
        # None outside of `fit`.
        self._running: _batch_sizes.BatchSizes | None = None

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if not hasattr(model, "sizes_of_updates"):
            raise errors.UnsupportedModelError(
                "tfbig.callbacks.BatchSizeSchedule needs a tfbig model. Received: "
                f"{type(model).__name__}. Use tfbig.extend(model)."
            )

    def same_on_all_workers(self, model: keras.Model) -> str:
        """What must be the same on every worker."""
        del model
        return f"BatchSizeSchedule: {self._policy.description()}, {self.learning_rate}"

    # Any: the arguments of `fit` are of all types.
    @contextlib.contextmanager
    def around_fit(self, model: keras.Model, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Entered by `fit` of a tfbig model; the callback works only within it."""
        self._check(model, arguments)
        sizes = _batch_sizes.BatchSizes(model, self._policy, _batch_sizes.RULES[self.learning_rate])
        self._running = model.sizes_of_updates = sizes
        try:
            yield
        finally:
            sizes.end()
            self._running = model.sizes_of_updates = None

    def _check(self, model: keras.Model, arguments: Mapping[str, Any]) -> None:
        """Refuses what no schedule can be combined with."""
        if model.sizes_of_updates is not None:
            raise errors.InvalidOptionError(
                "`callbacks` must hold only one BatchSizeSchedule. Received: two."
            )
        if _keras.devices.is_tpu(model.distribute_strategy):
            raise errors.UnsupportedStrategyError(
                "BatchSizeSchedule is not supported on TPUs, which compile a program for each "
                "size. Use one batch size, or GPUs."
            )
        given, first = arguments.get("batch_size"), self._policy.first
        if given is not None and given != first:
            raise errors.InvalidOptionError(
                "BatchSizeSchedule replaces `batch_size` of `fit`, which must be the size of "
                f"update 0, or be left out. Received: batch_size={given}, and {first} in the "
                "schedule. For validation, use `validation_batch_size`."
            )
        if arguments.get("shuffle") == "batch":
            raise errors.InvalidOptionError(
                "shuffle='batch' shuffles within batches of one size, which a BatchSizeSchedule "
                "does not have. Received: shuffle='batch'. Use shuffle=True."
            )
        if self.learning_rate is not None and not _keras.optimizer.optimizers_of(model):
            raise errors.InvalidOptionError(
                "`learning_rate` multiplies that of the model's optimizers. Received: "
                f"learning_rate={self.learning_rate!r}, for a model that holds none. Make the "
                "optimizer an attribute of the model."
            )
        if isinstance(self._policy, _batch_sizes.FollowNoise):
            self._check_measures_noise(model, self._policy.smallest)

    def _check_measures_noise(self, model: keras.Model, smallest: int) -> None:
        """Refuses a model that does not measure its noise scale, or could not."""
        if not model.log_gradient_noise_scale:
            raise errors.InvalidOptionError(
                "BatchSizeSchedule('noise_scale') follows what the model measures. Received: a "
                "model with log_gradient_noise_scale=False. Set "
                "model.log_gradient_noise_scale = True."
            )
        if model.distribute_strategy.num_replicas_in_sync > 1:
            return
        steps, size = model.gradient_accumulation_steps, model.micro_batch_size
        if model._options().get("micro_batch_size") == "auto":
            # So that it is found again, for a batch that may be smaller than the last.
            model.micro_batch_size = "auto"
            is_split = smallest > 1
        else:
            is_split = smallest > 1 and (steps or 2) > 1 and (size or 1) < smallest
        if not is_split:
            raise errors.InvalidOptionError(
                "The gradient noise scale is measured by comparing micro-batches, of which the "
                f"smallest batch must have two. Received: bounds={self.bounds} with "
                f"gradient_accumulation_steps={steps}, micro_batch_size={size}. Use larger bounds, "
                "or smaller micro-batches."
            )

    def on_train_begin(self, logs: _types.Logs | None = None) -> None:
        if self._running is None:
            raise errors.InvalidOptionError(
                "BatchSizeSchedule must be among the `callbacks` passed to `fit`, by itself or in "
                "a list. Received: it was added in another way."
            )

    def on_epoch_begin(self, epoch: int, logs: _types.Logs | None = None) -> None:
        if self._running is None:
            return
        # After the hooks of `on_train_begin`, which may have restored a backup.
        self._running.begin()
        data = _keras.resized_batches.of(_keras.epoch_iterator.of_fit(self.model))
        assert data is not None
        # All callbacks see it.
        steps = self.params["steps"] = data.steps_of_epoch()
        self._running.agree(steps)
