"""Options of the step: how the gradient is computed, exchanged and looked at."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import keras
import numpy as np

from tfbig import _keras, errors
from tfbig._update import (
    acceptance,
    attention_option,
    half_precision_exchange,
    head_option,
    noise_scale,
    pipeline_option,
    recomputation,
    replicas,
    shard_option,
)
from tfbig._update.loss_scale import DynamicLossScale
from tfbig._update.option import Option, declared
from tfbig.distribute._pipeline import Pipeline

__all__ = ("Options", "StepOptions", "make_plain", "set_options")


class Options(TypedDict, total=False):
    """The options of a model with both mixins, for editors.

    What each means, and everything else about it, is in its declaration.
    """

    gradient_accumulation_steps: int | None
    micro_batch_size: int | str | None
    memory_budget: int | None
    loss_scale: str | float | DynamicLossScale | None
    log_grad_norm: bool
    log_gradient_noise_scale: bool
    recompute: Any  # True, a list of layers or of names, a function of a layer, or None.
    head_chunk_size: int | None
    attention_chunk_size: int | None
    exchange_dtype: str | None
    exchange_bucket_bytes: int
    shard: str | None
    pipeline: Pipeline | None


@functools.cache
def _settable(cls: type) -> frozenset[str]:
    """Names of the options of a class that are properties which can be set."""
    found = {name: getattr(cls, name) for name in declared(cls)}
    return frozenset(k for k, v in found.items() if isinstance(v, property) and v.fset is not None)


def set_options(model: keras.Model, options: Mapping[str, Any]) -> None:
    """Sets those options of a model that are given as properties."""
    known = declared(type(model))
    for name, value in options.items():
        if value is not None or known[name].is_none_given:
            setattr(model, name, value)


# Modules of classes whose constructors take no arguments of a user's own.
_LIBRARIES = ("tfbig.", "keras.", "tensorflow.", "builtins")

# Keyword arguments that the constructors of Keras's models and layers have.
_ARGUMENTS_OF_KERAS = frozenset(
    ("inputs", "outputs", "name", "trainable", "dtype", "autocast", "activity_regularizer")
)


def _refuse_unknown(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises for arguments that no constructor knows.

    Keras does itself, but ignores them where a model is made from inputs and outputs, as it would a
    misspelled option.

    Args:
        cls: the class of the model.
        args: what is left of the arguments for the constructors after that of `StepOptions`.
        kwargs: the same.
    """
    after = cls.__mro__[cls.__mro__.index(StepOptions) + 1 :]
    others = [c for c in after if "__init__" in vars(c) and not c.__module__.startswith(_LIBRARIES)]
    unknown = kwargs.keys() - _ARGUMENTS_OF_KERAS
    if unknown and not others and _keras.saving.are_functional_arguments(args, kwargs):
        raise errors.InvalidOptionError(
            f"Unknown options for `{cls.__name__}`: {sorted(unknown)}. Known are "
            f"{sorted(declared(cls))}."
        )


def make_plain(model: keras.Model) -> None:
    """Gives a model the options with which it trains as plain Keras does."""
    cls = type(model)
    for name, option in declared(cls).items():
        if option.value(model) != option.plain and name in _settable(cls):  # type: ignore[arg-type]  # As in `__setattr__`.
            setattr(model, name, option.plain)


def _set_noise_scale(model: "StepOptions") -> None:
    if model.compiled:
        model._reset_noise_scale()
    model._rebuild_step()


def _flag(name: str) -> Callable[[object], bool]:
    """The check of an option that is True or False."""

    def checked(value: object) -> bool:
        # None, as elsewhere, for what is not given.
        if isinstance(value, bool | np.bool_ | None):
            return bool(value)
        raise errors.InvalidOptionError(f"`{name}` must be True or False. Received: {value!r}.")

    return checked


class StepOptions(_keras.trainer.TrainerOverrides):
    """The options of both mixins, and how they are kept.

    Not part of the public interface; `GradientAccumulationMixin` documents them.
    """

    log_grad_norm: Option[bool] = Option(
        default=False,
        check=_flag("log_grad_norm"),
        plain=False,
        doc="Whether logs hold the global norm of the gradient, before clipping.",
        needs_tfbig_in=("train_step",),
        passed_on="log_grad_norm=True to tfbig.apply_gradients",
        logs=("grad_norm",),
    )
    log_gradient_noise_scale: Option[bool] = Option(
        default=False,
        check=_flag("log_gradient_noise_scale"),
        plain=False,
        doc="Whether logs hold the gradient noise scale, in samples.",
        changed=_set_noise_scale,
        needs_tfbig_in=("train_step",),
        logs=("gradient_noise_scale",),
    )
    # What `recomputation.check` returns.
    recompute: Option[Any] = Option(
        default=None,
        check=recomputation.check,
        doc=(
            "Which layers recompute their activations: True, a list, or a predicate; None for none."
        ),
        fits=recomputation.check_fits,
        saved=recomputation.serialized,
        needs_tfbig_in=("train_step",),
    )
    head_chunk_size: Option[int | None] = Option(
        default=None,
        check=head_option.checked,
        doc="Tokens for which the last layer and the loss are computed at a time; None for all.",
        needs_tfbig_in=("train_step", "test_step"),
    )
    attention_chunk_size: Option[int | None] = Option(
        default=None,
        check=attention_option.checked,
        doc="Tokens for which attention is computed at a time; None for all.",
        needs_tfbig_in=("train_step", "test_step"),
    )
    exchange_dtype: Option[str | None] = Option(
        default=None,
        check=half_precision_exchange.checked_dtype,
        doc="The dtype to which gradients are cast for the exchange; None for no cast.",
        passed_on="exchange_dtype=self.exchange_dtype to tfbig.apply_gradients",
    )

    exchange_bucket_bytes: Option[int] = Option(
        default=replicas.BUCKET_BYTES,
        check=replicas.checked_bucket_bytes,
        plain=replicas.BUCKET_BYTES,
        doc="Bytes of a bucket, of which one after another is exchanged between replicas.",
        asks=lambda _, value: value != replicas.BUCKET_BYTES,
        passed_on=("exchange_bucket_bytes=self.exchange_bucket_bytes to tfbig.apply_gradients"),
    )

    shard: Option[str | None] = Option(
        default=None,
        check=shard_option.checked,
        doc="What is divided over the replicas instead of copied to each; None for nothing.",
        changed=shard_option.update,
        passed_on="the model's optimizer to tfbig.apply_gradients",
    )

    pipeline: Option[Pipeline | None] = Option(
        default=None,
        check=pipeline_option.checked,
        doc="The stages that layers lie on, a `tfbig.distribute.Pipeline`; None for none.",
        # Files hold no devices, and load anywhere.
        saved=lambda _model, _value: None,
        changed=pipeline_option.update,
        needs_tfbig_in=("train_step", "test_step"),
        passed_on="the model's variables to tfbig.accumulate_gradients",
    )

    # `NoiseScale`; None where it is not logged.
    noise_scale_state: noise_scale.NoiseScale | None = None

    _update_guard: acceptance.UpdateGuard | None = None
    # Updates that a guard skipped or took back; `optimizer.iterations` does not count them.
    left_out_updates: int = 0

    def __init__(self, *args: Any, **kwargs: Any):
        options = declared(type(self))
        given = {name: v.check(kwargs.pop(name)) for name, v in options.items() if name in kwargs}
        _refuse_unknown(type(self), args, kwargs)
        # Before Keras's constructor, which may compile, as those of KerasHub do.
        self._keep_options(given)
        super().__init__(*args, **kwargs)
        # A constructor in between may have set an option too: that of the caller holds.
        changed = {k: v for k, v in given.items() if options[k].value(self) != v}
        set_options(self, changed)
        if self.built:
            for name in given:
                options[name].fits(self, options[name].value(self))
            shard_option.apply(self)
            pipeline_option.apply(self)

    def _keep_options(self, given: Mapping[str, Any]) -> None:
        """Keeps checked options, which were given together."""
        options = declared(type(self))
        for name, value in given.items():
            options[name].keep(self, value)

    def _reset_noise_scale(self) -> None:
        with self.distribute_strategy.scope():
            self.noise_scale_state = (
                noise_scale.NoiseScale() if self.log_gradient_noise_scale else None
            )

    @property
    def update_guard(self) -> acceptance.UpdateGuard | None:
        """What may leave updates out, in a `fit` with such a callback; None before the first."""
        return self._update_guard

    @update_guard.setter
    def update_guard(self, value: acceptance.UpdateGuard | None) -> None:
        if value is not self._update_guard:
            self._update_guard = value
            self._rebuild_step()

    def _needs_tfbig_in(self, step: str) -> bool:
        """Whether an option, or a guard, asks for what Keras's own step does not do."""
        if step == "train_step" and self.update_guard is not None:
            return True
        options = declared(type(self)).values()
        return any(step in option.needs_tfbig_in and option.is_asked(self) for option in options)

    def _options(self) -> dict[str, Any]:
        """The options as they are saved and handed on."""
        return {name: option.saved(self) for name, option in declared(type(self)).items()}

    def _asked_options(self) -> dict[str, Any]:
        """The options that ask for anything, as they are saved; and a guard."""
        options = declared(type(self)).items()
        asked = {
            name: option.value(self) if (saved := option.saved(self)) is None else saved
            for name, option in options
            if option.is_asked(self)
        }
        return asked | ({} if self.update_guard is None else {"update_guard": self.update_guard})

    def __setattr__(self, name: str, value: Any) -> None:
        # Keras ignores a value that is there already; here a property may show a number that
        # was found, and be set to it.
        # mypy takes a class for its instance, which has a `__hash__` of its own.
        if name in _settable(type(self)):  # type: ignore[arg-type]
            getattr(type(self), name).fset(self, value)
        else:
            super().__setattr__(name, value)

    get_config = _keras.saving.ExtendedConfig(lambda: StepOptions, "_option_config")

    def _option_config(self) -> dict[str, Any]:
        return {k: keras.saving.serialize_keras_object(v) for k, v in self._options().items()}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> keras.Model:
        config = dict(config)
        options = {name: config.pop(name) for name in declared(cls).keys() & config.keys()}
        extra = {} if custom_objects is None else {"custom_objects": custom_objects}
        model = super().from_config(config, **extra)
        set_options(model, options)
        return model
