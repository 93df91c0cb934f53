"""Gradient accumulation inside one `train_step`."""

import warnings

from tfbig import _cut, _reduction, _step

__all__ = ("GradientAccumulationMixin",)


class GradientAccumulationMixin(_step.TrainStep):
    """Gradient accumulation for a `keras.Model`.

    `fit(batch_size=B)`, or the batch of the dataset, is the effective batch: all
    samples of one update, over all replicas. It is cut into micro-batches inside
    one `train_step`, so callbacks, `optimizer.iterations`, learning-rate
    schedules, moving averages and `steps_per_epoch` count updates. The gradient
    that is applied is that of the whole effective batch, up to the order of
    floating-point sums.

    To be placed before the Keras class: `class M(tfbig.GradientAccumulationMixin,
    keras.Model)`.

    Args:
        gradient_accumulation_steps: int >= 1, micro-batches per replica and
            update. A share of fewer samples is cut into single samples.
        micro_batch_size: int >= 1, samples per replica and forward pass. At most
            one of the two; neither means `gradient_accumulation_steps=1`.
        log_grad_norm: bool, whether the logs hold `grad_norm`, the global norm of
            the gradient before clipping. Defaults to False.
        recompute: True, or a list of layers or of their names, or a function that says
            of a layer whether it is meant: the layers whose activations are not kept
            for the backward pass but computed again in it, from the same values and the
            same random numbers. Gradients are the same; memory is saved for the time of
            another forward pass. True means the outermost layers that have variables,
            such as the blocks of a transformer, and looks into models inside of the
            model. Worth most for layers of many operations. Defaults to None.

    Raises:
        InvalidOptionError: If an option is not valid.
        UnsupportedModelError: If a layer cannot be recomputed.

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

    _batch_cut = _cut.Cut(gradient_accumulation_steps=1)
    _cut_of_evaluation: _cut.Cut | None = None
    _warned_of: tuple | None = None

    def __init__(self, *args, gradient_accumulation_steps=None, micro_batch_size=None, **kwargs):
        if gradient_accumulation_steps is None and micro_batch_size is None:
            gradient_accumulation_steps = 1
        cut = _cut.Cut(gradient_accumulation_steps, micro_batch_size)
        super().__init__(*args, **kwargs)
        self._batch_cut = cut

    @property
    def gradient_accumulation_steps(self):
        """Micro-batches per replica and update; None if their size is given."""
        return self._batch_cut.gradient_accumulation_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value):
        self._set_cut(_cut.Cut(gradient_accumulation_steps=value))

    @property
    def micro_batch_size(self):
        """Samples per replica and forward pass; None if their number is given."""
        return self._batch_cut.micro_batch_size

    @micro_batch_size.setter
    def micro_batch_size(self, value):
        self._set_cut(_cut.Cut(micro_batch_size=value))

    def _set_cut(self, cut):
        self._batch_cut = cut
        self._cut_of_evaluation = None
        self._rebuild_step()

    def _options(self):
        return super()._options() | {
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "micro_batch_size": self.micro_batch_size,
        }

    def _cut(self):
        return self._batch_cut

    def _evaluation_cut(self):
        # No more samples at a time than in training. A number of micro-batches
        # says nothing about a batch of another size, so what it came to in the
        # last training is taken; before any, the batch is not cut.
        if self.micro_batch_size is not None:
            return self._batch_cut
        return self._cut_of_evaluation or _cut.Cut(gradient_accumulation_steps=1)

    def _prepare_training(self, batch_size):
        steps, cut = self.gradient_accumulation_steps, self._batch_cut
        if not (steps is None or steps == 1 or batch_size is None):
            share = -(-batch_size // _reduction.replicas_of(self))
            cut = _cut.Cut(micro_batch_size=-(-share // min(steps, share)))
            if steps > share:
                self._warn_of_few_samples(batch_size, share)
        if cut != self._cut_of_evaluation:
            self._cut_of_evaluation = cut
            self.test_function = None

    def _warn_of_few_samples(self, batch_size, share):
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
