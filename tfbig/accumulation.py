"""Gradient accumulation inside one `train_step`."""

import warnings
from collections.abc import Mapping
from typing import Any

from tfbig import _keras, _types, errors
from tfbig._update import automatic_size, capacity, replicas, train_step
from tfbig._update.batch_split import BatchSplit
from tfbig._update.option import Option

__all__ = ("GradientAccumulationMixin",)

# The two options that say how a batch is split, in the order of `_split_of`.
_SPLIT = ("gradient_accumulation_steps", "micro_batch_size")

_PASSED_ON = "{name}=self.{name} to tfbig.accumulate_gradients"


def _checked_steps(value: Any) -> int | None:
    if value is None:
        return None
    return BatchSplit(gradient_accumulation_steps=value).gradient_accumulation_steps


def _checked_size(value: Any) -> int | str | None:
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    return BatchSplit(micro_batch_size=value).micro_batch_size


def _steps(model: "GradientAccumulationMixin") -> int | None:
    return None if model._automatic_size else model._given_split.gradient_accumulation_steps


def _size(model: "GradientAccumulationMixin") -> int | None:
    if model._automatic_size:
        return model._automatic_size.size
    return model._given_split.micro_batch_size


def _restart(model: "GradientAccumulationMixin") -> None:
    model._split_of_last_training = None
    model._rebuild_step()


def _search_again(model: "GradientAccumulationMixin") -> None:
    if model._automatic_size:
        model.micro_batch_size = "auto"


class GradientAccumulationMixin(train_step.TrainStep):
    """Gradient accumulation for a `keras.Model`.

    `fit(batch_size=B)`, or the batch of the dataset, is the effective batch: all
    samples of one update, over all replicas. It is cut into micro-batches inside
    one `train_step`, so callbacks, `optimizer.iterations`, learning-rate
    schedules, moving averages and `steps_per_epoch` count updates. The applied
    gradient is that of the whole effective batch, up to the order of
    floating-point sums.

    Place the mixin before the Keras class: `class M(tfbig.GradientAccumulationMixin,
    keras.Model)`.

    Args:
        gradient_accumulation_steps: int >= 1, micro-batches per replica and update. A replica
            with fewer samples uses micro-batches of one sample.
        micro_batch_size: int >= 1, samples per replica and forward pass; or "auto" for the
            largest size that fits. Give at most one of the two; neither means
            `gradient_accumulation_steps=1`. "auto" runs forward and backward passes on the first
            batch, without training: one sample, two, four ..., then sizes in between. All
            replicas use the same size. If memory runs out later, the update is repeated with
            half the size. `model.micro_batch_size` returns the size that was found; it changes the
            weights only by rounding.
        memory_budget: int, bytes that "auto" may use on a replica for variables, gradients and
            activations. Defaults to None: as much as the device has; on the CPU, half of the
            host's free memory divided by the number of replicas.
        log_grad_norm: bool, whether the logs hold `grad_norm`, the global norm of the gradient
            before clipping. Defaults to False.
        recompute: The layers whose activations are recomputed in the backward pass instead of
            kept, with the same values and random numbers: True, a list of layers or of their
            names, or a function that takes a layer and returns a bool. Gradients stay the same;
            memory is saved at the cost of another forward pass. True means the outermost layers
            that have variables, such as the blocks of a transformer, including those of nested
            models. Most useful for layers made of many operations. Defaults to None.
        head_chunk_size: int >= 1, tokens for which the last layer, the loss and the metrics are
            computed at a time, with their gradients: the logits of all tokens, `(batch, length,
            vocabulary)`, are never held in memory at once. A token is an index of all dimensions
            but the last. The last layer must be a `Dense` with an activation of Keras, or a
            `ReversibleEmbedding`, and losses and metrics functions of Keras that treat each token
            by itself, such as crossentropies and accuracies. `predict` and files are as without
            it. Defaults to None: all at once.
        attention_chunk_size: int >= 1, tokens for which attention is computed at a time. The
            weights of all pairs of tokens, `(batch, heads, length, length)`, are never held in
            memory at once; the backward pass computes them again. For layers that call
            `keras.ops.dot_product_attention`: `MultiHeadAttention` and `GroupQueryAttention`
            without dropout that do not return their weights, and layers of your own that pass it
            no bias. Holds in `fit`, `evaluate` and `predict`. Defaults to None: all at once.
        exchange_dtype: "bfloat16" or "float16": the dtype that gradients are cast to while
            replicas exchange them, after division by the number of samples (or other denominator).
            Halves the traffic and rounds to 2-3 digits in bfloat16, 3-4 in float16. An overflow
            skips the update with loss scaling, and raises without it. Defaults to None: no cast,
            and exact.
        exchange_bucket_bytes: int >= 1. Replicas exchange gradients in buckets of so many bytes,
            one after another, since an exchange copies what it sends; workers of one replica
            each, on CPUs, in parts of which at most so many bytes are under way. Smaller buckets
            take less memory, larger ones fewer messages. Defaults to 32 MiB.
        shard: "optimizer": the optimizer's state is divided over the replicas. Each receives the
            gradient of its piece of the weights, updates that piece, and hands it to all others:
            the same update, with as many bytes exchanged, and of the optimizer's state only its
            share in memory. Optimizers that treat each element by itself, such as Adam, divide each
            variable; others, such as Muon, give each variable to one replica. Files are those of
            an undivided model, and every worker must take part in saving. Under MirroredStrategy
            and MultiWorkerMirroredStrategy; on one replica there is nothing to divide.
            "weights": weights and gradients are divided as well. Layers gather their weights when
            they compute, and recompute their activations; see
            `tfbig.distribute.sharded_weights`. Takes least memory, and exchanges more. Defaults
            to None. Reference: Rajbhandari et al. 2020, "ZeRO", stages 1 (with gradients that
            are scattered, as in stage 2) and 3.
        pipeline: `tfbig.distribute.Pipeline`, the devices that are responsible for a part of the
            layers each. Micro-batches follow one another through these stages, so use at least
            twice as many micro-batches as stages. The layers of a Functional or Sequential model
            are assigned to stages of about the same work, unless they were made within
            `pipeline.stage`. Variables, optimizer state and gradients of a layer stay on its
            stage. Files hold no stages, and load anywhere. Defaults to None.
        log_gradient_noise_scale: bool, whether the logs hold `gradient_noise_scale`, in samples:
            the batch size at which the gradient has as much noise as signal. Much larger batches
            save few updates. Exponentially averaged over roughly the last hundred updates. Needs
            two micro-batches or replicas, so on one replica "auto" uses at most half of the
            batch. Defaults to False. Reference: McCandlish et al. 2018, appendix A.

    Raises:
        InvalidOptionError: If an option is not valid.
        GradientOverflowError: In `fit`, if a gradient overflows in `exchange_dtype`.
        OutOfMemoryError: In `fit`, if not even one sample fits.
        UnsupportedModelError: If a layer cannot be recomputed.
        UnsupportedStrategyError: If state or layers are to be divided over the cores of a TPU.

    Example:

    >>> class Net(tfbig.GradientAccumulationMixin, keras.Sequential):
    ...     pass
    >>> model = Net(
    ...     [keras.Input((4,)), keras.layers.Dense(1)], gradient_accumulation_steps=4
    ... )
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((16, 4)), np.ones((16, 1)), batch_size=8, verbose=0)
    >>> int(model.optimizer.iterations.numpy())
    2
    """

    gradient_accumulation_steps: Option[int | None] = Option(
        default=None,
        check=_checked_steps,
        plain=1,
        doc="Micro-batches per replica and update; None if their size is given.",
        value=_steps,
        changed=_restart,
        asks=lambda _, steps: steps not in (None, 1),
        passed_on=_PASSED_ON.format(name="gradient_accumulation_steps"),
    )
    micro_batch_size: Option[int | None] = Option(
        default=None,
        check=_checked_size,
        doc=(
            "Samples per replica and forward pass; None if their number is given.\n\n"
            'With "auto", None before the first update.'
        ),
        value=lambda model: "auto" if model._automatic_size else _size(model),
        shown=_size,
        changed=_restart,
        passed_on=_PASSED_ON.format(name="micro_batch_size"),
    )
    memory_budget: Option[int | None] = Option(
        default=None,
        check=capacity.checked_budget,
        doc='Bytes that a replica may take with `micro_batch_size="auto"`, or None.',
        changed=_search_again,
    )

    _given_split = BatchSplit(gradient_accumulation_steps=1)
    _automatic_size: automatic_size.AutomaticSize | None = None
    _split_of_last_training: BatchSplit | None = None
    _warned_of: tuple[int | None, int] | None = None

    def _keep_options(self, given: Mapping[str, Any]) -> None:
        # Together they say how a batch is split: to set one is to unset the other.
        if any(name in given for name in _SPLIT):
            split, automatic = _split_of(*(given.get(name) for name in _SPLIT))
            object.__setattr__(self, "_given_split", split)
            object.__setattr__(self, "_automatic_size", automatic)
        super()._keep_options({k: v for k, v in given.items() if k not in _SPLIT})

    def _batch_split(self) -> BatchSplit:
        return self._automatic_size.split if self._automatic_size else self._given_split

    def _evaluation_split(self) -> BatchSplit:
        # No more samples at a time than in training. A number of micro-batches says nothing about
        # a batch of another size, so evaluation uses the size that the last training came to;
        # before any training the batch is not split.
        if self.micro_batch_size is not None:
            return self._batch_split()
        return self._split_of_last_training or BatchSplit(gradient_accumulation_steps=1)

    def _prepare_training(self, batch_size: int | None) -> None:
        if self._automatic_size:
            if batch_size == 1:
                # That is one micro-batch, whatever fits.
                super()._prepare_training(batch_size)
            needs_two = self.log_gradient_noise_scale and replicas.count_of(self) == 1
            self._automatic_size.begin(self._automatic_share(batch_size), needs_two)
            self._check_split("micro_batch_size='auto'")
            return
        super()._prepare_training(batch_size)
        if self.memory_budget is not None:
            raise errors.InvalidOptionError(
                "`memory_budget` is what `micro_batch_size='auto'` keeps to. Received: "
                f"memory_budget={self.memory_budget} with micro_batch_size="
                f"{self.micro_batch_size}. Leave it out, or let the size be found."
            )
        steps, split = self.gradient_accumulation_steps, self._given_split
        if not (steps is None or steps == 1 or batch_size is None):
            share = -(-batch_size // replicas.count_of(self))
            split = BatchSplit(micro_batch_size=-(-share // min(steps, share)))
            if steps > share:
                self._warn_of_few_samples(batch_size, share)
        if split != self._split_of_last_training:
            self._split_of_last_training = split
            self.test_function = None

    def check_train_step(self) -> None:
        """Raises for options that do not go with the `train_step` or with the strategy."""
        super().check_train_step()
        if self._automatic_size and _keras.devices.is_tpu(self.distribute_strategy):
            raise errors.UnsupportedStrategyError(
                "`micro_batch_size='auto'` is not supported on TPUs, which compile a program for "
                "each size. Pass a number of samples: `python -m tfbig.tpu_check "
                "--micro_batch_size=1 --find_micro_batch_size` finds the largest that fits into "
                "memory."
            )

    def _automatic_share(self, batch_size: int | None) -> int | None:
        """Samples per replica for `micro_batch_size="auto"`; None if only the batches tell."""
        if batch_size is None and _keras.epoch_iterator.is_generated(
            _keras.epoch_iterator.of_fit(self)
        ):
            raise errors.InvalidOptionError(
                "`micro_batch_size='auto'` needs a batch size that is known before training. "
                "Received: a generator, whose batches may be of any size. Use "
                "tf.data.Dataset.from_generator(...).rebatch(n), or pass a number of samples as "
                "`micro_batch_size`."
            )
        if getattr(type(self), "train_step", None) is not train_step.TrainStep.train_step:
            raise errors.UnsupportedModelError(
                "`micro_batch_size='auto'` runs the halves of tfbig's own `train_step`. Received: "
                f"{type(self).__name__} with a `train_step` of its own. Pass a number of samples."
            )
        # A dataset does not say how it was batched before a `map`. Its batches do, and a batch
        # larger than all before it starts the search again.
        return None if batch_size is None else -(-batch_size // replicas.count_of(self))

    def _make_train_function(self) -> _types.AnyFunction:
        if not self._automatic_size:
            function: _types.AnyFunction = super()._make_train_function()
            return function
        return automatic_size.TrainFunction(self, self._automatic_size, self.memory_budget)

    def _warn_of_few_samples(self, batch_size: int, share: int) -> None:
        steps = self.gradient_accumulation_steps
        if self._warned_of == (steps, share):
            return
        self._warned_of = (steps, share)
        warnings.warn(
            "`gradient_accumulation_steps` is larger than a replica's share of the batch. "
            f"Received: gradient_accumulation_steps={steps} for {share} samples per replica "
            f"(batch of {batch_size}). {share} micro-batches of one sample are used.",
            stacklevel=5,
        )


def _split_of(
    steps: int | None, size: int | str | None
) -> tuple[BatchSplit, automatic_size.AutomaticSize | None]:
    """How an update is split, and the `AutomaticSize` that replaces it, or None."""
    if steps is None and size is None:
        steps = 1
    if isinstance(size, str) and size == "auto" and steps is None:
        return BatchSplit(gradient_accumulation_steps=1), automatic_size.AutomaticSize()
    return BatchSplit(steps, size), None  # type: ignore[arg-type]  # "auto" with steps raises.
