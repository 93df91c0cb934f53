"""`Model`, `Sequential` and `extend`: Keras models with both mixins."""

from typing import Any, Unpack

import keras

from tfbig import _keras, _types, errors
from tfbig._update import step_options, train_step, training_checks
from tfbig._update.batch_split import BatchSplit
from tfbig._update.option import declared, signature
from tfbig.accumulation import GradientAccumulationMixin
from tfbig.loss_scaling import DynamicLossScale, DynamicLossScalingMixin

__all__ = ("Model", "Sequential", "extend")

_OPTIONS = declared(GradientAccumulationMixin) | declared(DynamicLossScalingMixin)


class ModelArguments(step_options.Options, total=False):
    """Keyword arguments of `Model`: the options, and those of `keras.Model`."""

    inputs: _types.Structure
    outputs: _types.Structure
    name: str | None
    trainable: bool
    dtype: Any  # A str, a dtype policy, or a config of one.


class SequentialArguments(step_options.Options, total=False):
    """Keyword arguments of `Sequential`: the options, and those of `keras.Sequential`."""

    layers: list[_types.Layer] | None
    trainable: bool
    name: str | None


@keras.saving.register_keras_serializable(package="tfbig")
class Model(GradientAccumulationMixin, DynamicLossScalingMixin, keras.Model):
    """`keras.Model` with gradient accumulation and dynamic loss scaling.

    Made as a `keras.Model` is: from inputs and outputs, or by subclassing. The
    options are keyword arguments of the constructor and properties.

    Args:
        gradient_accumulation_steps: See `GradientAccumulationMixin`.
        micro_batch_size: See `GradientAccumulationMixin`.
        memory_budget: See `GradientAccumulationMixin`.
        loss_scale: See `DynamicLossScalingMixin`.
        log_grad_norm: See `GradientAccumulationMixin`.
        recompute: See `GradientAccumulationMixin`.
        exchange_dtype: See `GradientAccumulationMixin`.
        log_gradient_noise_scale: See `GradientAccumulationMixin`.
        **kwargs: Those of `keras.Model`.

    Example:

    >>> x = keras.Input((4,))
    >>> model = tfbig.Model(x, keras.layers.Dense(1)(x), micro_batch_size=8)
    >>> model.micro_batch_size, model.gradient_accumulation_steps
    (8, None)
    """

    def __init__(self, *args: Any, **kwargs: Unpack[ModelArguments]):
        # Keras would put Functional among the bases of this class itself, for the whole process,
        # and models that are not functional could not be made any more.
        if _keras.saving.is_functional(args, kwargs) and not isinstance(
            self, _keras.saving.Functional
        ):
            self.__class__ = _functional_class(type(self))
        super().__init__(*args, **kwargs)

    # What a notebook and the API reference show; an editor reads `ModelArguments`.
    vars(__init__)["__signature__"] = signature(_OPTIONS)


def _functional_class(cls: type[Model]) -> type[Model]:
    """The subclass of a subclass of `Model` that is made from inputs and outputs."""
    if cls not in _FUNCTIONAL:
        made = type(
            cls.__name__,
            (cls, FunctionalModel),
            {
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__doc__": cls.__doc__,
            },
        )
        _keras.saving.register_as(made, _keras.saving.registered_name(cls))
        _FUNCTIONAL[cls] = made
    return _FUNCTIONAL[cls]


@keras.saving.register_keras_serializable(package="tfbig")
class FunctionalModel(Model, _keras.saving.Functional):
    """What `tfbig.Model(inputs, outputs)` makes."""


@keras.saving.register_keras_serializable(package="tfbig")
class Sequential(GradientAccumulationMixin, DynamicLossScalingMixin, keras.Sequential):
    """`keras.Sequential` with gradient accumulation and dynamic loss scaling.

    Args:
        layers: As for `keras.Sequential`.
        gradient_accumulation_steps: See `GradientAccumulationMixin`.
        micro_batch_size: See `GradientAccumulationMixin`.
        memory_budget: See `GradientAccumulationMixin`.
        loss_scale: See `DynamicLossScalingMixin`.
        log_grad_norm: See `GradientAccumulationMixin`.
        recompute: See `GradientAccumulationMixin`.
        exchange_dtype: See `GradientAccumulationMixin`.
        log_gradient_noise_scale: See `GradientAccumulationMixin`.
        **kwargs: Those of `keras.Sequential`.

    Example:

    >>> model = tfbig.Sequential([keras.layers.Dense(1)], gradient_accumulation_steps=4)
    >>> model.gradient_accumulation_steps
    4
    """

    def __init__(self, *args: Any, **kwargs: Unpack[SequentialArguments]):
        super().__init__(*args, **kwargs)

    vars(__init__)["__signature__"] = signature(_OPTIONS)


def extend(model_or_class, **options):
    """Adds both mixins to a Keras class or to a model that exists.

    A `compile` of the class's own stays as it is, with its arguments and defaults. So do a
    `test_step`, and a `train_step`, which trains as before, on one replica and without options.
    With options or on several replicas `fit` raises `UnsupportedModelError`, since such a step
    knows nothing of them. In float16, Keras goes on to scale its loss.

    Args:
        model_or_class: A subclass of `keras.Model`; or a model, built or not,
            compiled or not. It is left as it is.
        **options: Those of `tfbig.Model`. Only for a model; a class takes them in
            its constructor.

    Returns:
        For a class, a subclass with the mixins, the same each time. For a model,
        a model with the same layers, variables, compile settings and optimizer.
        A `LossScaleOptimizer` around the optimizer is taken off, unless the class has a
        `train_step` of its own; its settings become the loss scale, if none is given.

    Raises:
        InvalidOptionError: If the argument is not a Keras model, or an option is
            not valid.

    Example:

    >>> plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model = tfbig.extend(plain, gradient_accumulation_steps=4)
    >>> model.layers[0] is plain.layers[0]
    True
    """
    if isinstance(model_or_class, type):
        if not issubclass(model_or_class, keras.Model) or options:
            raise errors.InvalidOptionError(
                "`extend` takes a subclass of keras.Model without options, which go to the "
                f"constructor of the class. Received: {model_or_class.__name__}, options="
                f"{options}."
            )
        return _extended_class(model_or_class)
    if not isinstance(model_or_class, keras.Model):
        raise errors.InvalidOptionError(
            "`extend` takes a keras.Model or a subclass of it. Received: an object of type "
            f"{type(model_or_class).__name__}."
        )
    return _extended_model(model_or_class, options)


# Subclass of `Model` -> its subclass that is functional.
_FUNCTIONAL: dict[type, Any] = {Model: FunctionalModel}

# Keras class -> its subclass with the mixins.
_EXTENDED: dict[type, Any] = {
    keras.Model: Model,
    keras.Sequential: Sequential,
    _keras.saving.Functional: FunctionalModel,
}


def _extended_class(cls):
    mixins = [
        m for m in (GradientAccumulationMixin, DynamicLossScalingMixin) if not issubclass(cls, m)
    ]
    if not mixins:
        return cls
    if cls not in _EXTENDED:
        extended = type(
            f"Extended{cls.__name__}",
            (Extended, *mixins, cls),
            {"__module__": __name__, "__doc__": cls.__doc__, "_extends": cls},
        )
        _keras.saving.register_as(extended, "tfbig>Extended")
        _EXTENDED[cls] = extended
    return _EXTENDED[cls]


@keras.saving.register_keras_serializable(package="tfbig")
class Extended(train_step.TrainStep):
    """Base of the classes that `extend` makes: saves which class it extends."""

    _extends: type

    def _option_config(self):
        cls = self._extends
        extends = {
            "module": cls.__module__,
            "class_name": cls.__name__,
            "registered_name": _keras.saving.registered_name(cls),
        }
        return super()._option_config() | {"extends": extends}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        extends = config.pop("extends")
        if cls is not Extended:
            return super().from_config(config, custom_objects)
        base = (custom_objects or {}).get(extends["class_name"]) or _keras.saving.registered_class(
            extends["registered_name"], extends["module"], extends["class_name"]
        )
        if base is None:
            raise errors.InvalidOptionError(
                "The class that was extended cannot be found. Received: "
                f"{extends['module']}.{extends['class_name']}. Import its module, or pass it "
                "in `custom_objects`."
            )
        return _extended_class(base).from_config(config | {"extends": extends})


def _extended_model(model, options):
    known = declared(Model)
    unknown = options.keys() - known.keys()
    if unknown:
        raise errors.InvalidOptionError(
            f"Unknown options for `extend`: {sorted(unknown)}. Known are {sorted(known)}."
        )
    training_checks.check_strategy()
    if options.get("gradient_accumulation_steps") and options.get("micro_batch_size"):
        BatchSplit(options["gradient_accumulation_steps"], options["micro_batch_size"])
    optimizer = getattr(model, "optimizer", None)
    reached = None
    cls = _extended_class(type(model))
    # A step of the class's own goes on to be scaled by Keras.
    is_own = cls._owner_of_extended_train_step() is not None
    if isinstance(optimizer, _keras.optimizer.LossScaleOptimizer) and not is_own:
        if optimizer.built and "loss_scale" not in options:
            reached = optimizer
        initial = optimizer.initial_scale
        scale = DynamicLossScale(
            initial_scale=initial,
            growth_interval=optimizer.dynamic_growth_steps,
            max_scale=max(initial, DynamicLossScale().max_scale),
        )
        options = {"loss_scale": scale} | options
        optimizer = optimizer.inner_optimizer
    extended = _keras.saving.with_class(model, cls)
    step_options.set_options(extended, options)
    _keras.compiling.recompile(extended, optimizer)
    if reached is not None:
        extended.loss_scale_state.loss_scale.assign(reached.dynamic_scale)
        extended.loss_scale_state.finite_updates.assign(reached.step_counter)
    return extended


def _keep_options(original, clone):
    """Gives a clone of `keras.models.clone_model` the class and the options back."""
    if not isinstance(original, train_step.TrainStep):
        return clone
    if not isinstance(clone, train_step.TrainStep):
        clone = _keras.saving.with_class(clone, type(original))
    step_options.set_options(clone, original._options())
    _keras.compiling.recompile(clone)
    return clone


_keras.saving.after_cloning(_keep_options)
