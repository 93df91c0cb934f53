"""`Model`, `Sequential` and `extend`: Keras models with both mixins."""

from collections.abc import Mapping
from typing import Any, TypeVar, Unpack, overload

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
class Model(GradientAccumulationMixin, DynamicLossScalingMixin, keras.Model):  # type: ignore[misc]
    """`keras.Model` with gradient accumulation and dynamic loss scaling.

    Construct it like a `keras.Model`: from inputs and outputs, or by subclassing. Each option is
    a keyword argument of the constructor, and a property that can be set later.

    Args:
        **kwargs: Arguments of `keras.Model`, and the options that
            `GradientAccumulationMixin` and `DynamicLossScalingMixin` document.

    Example:

    >>> x = keras.Input((4,))
    >>> model = tfbig.Model(x, keras.layers.Dense(1)(x), micro_batch_size=8)
    >>> model.micro_batch_size, model.gradient_accumulation_steps
    (8, None)
    """

    def __init__(self, *args: Any, **kwargs: Unpack[ModelArguments]):
        # Keras would add Functional to the bases of this class itself, for the whole process;
        # models that are not functional could then no longer be made.
        if _keras.saving.are_functional_arguments(args, kwargs) and not isinstance(
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
                "__reduce__": _keras.saving.pickled_as(cls),
            },
        )
        _keras.saving.register_as(made, _keras.saving.registered_name(cls))
        _FUNCTIONAL[cls] = made
    return _FUNCTIONAL[cls]


@keras.saving.register_keras_serializable(package="tfbig")
class FunctionalModel(Model, _keras.saving.Functional):  # type: ignore[misc]
    """What `tfbig.Model(inputs, outputs)` makes."""


@keras.saving.register_keras_serializable(package="tfbig")
class Sequential(GradientAccumulationMixin, DynamicLossScalingMixin, keras.Sequential):  # type: ignore[misc]
    """`keras.Sequential` with gradient accumulation and dynamic loss scaling.

    Args:
        layers: As for `keras.Sequential`.
        **kwargs: Arguments of `keras.Sequential`, and the options that
            `GradientAccumulationMixin` and `DynamicLossScalingMixin` document.

    Example:

    >>> model = tfbig.Sequential([keras.layers.Dense(1)], gradient_accumulation_steps=4)
    >>> model.gradient_accumulation_steps
    4
    """

    def __init__(self, *args: Any, **kwargs: Unpack[SequentialArguments]):
        super().__init__(*args, **kwargs)

    vars(__init__)["__signature__"] = signature(_OPTIONS)


_Class = TypeVar("_Class", bound=type[keras.Model])


@overload
def extend(model_or_class: _Class) -> _Class: ...


@overload
def extend(model_or_class: keras.Model, **options: Unpack[step_options.Options]) -> Model: ...


def extend(model_or_class: Any, **options: Unpack[step_options.Options]) -> Any:
    """Adds both mixins to a Keras class or to an existing model.

    A `compile`, `test_step` or `train_step` that the class defines is kept, with its arguments and
    defaults. Such a `train_step` trains as before, but only on one replica and without options;
    otherwise `fit` raises `UnsupportedModelError`. In float16, Keras keeps scaling its loss.

    Args:
        model_or_class: A subclass of `keras.Model`; or a model, built or not, compiled or not. It
            is left unchanged.
        **options: Options of `tfbig.Model`, for a model only; a class takes them in its
            constructor.

    Returns:
        For a class, a subclass with the mixins, always the same one. For a model, a model with
        the same layers, variables, compile settings and optimizer. If the optimizer is wrapped in
        a `LossScaleOptimizer`, the wrapper is removed and its settings become the loss scale,
        unless one is given or the class has a `train_step` of its own.

    Raises:
        InvalidOptionError: If the argument is not a Keras model, or an option is not valid.

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
    return _extended_model(model_or_class, dict(options))


# Subclass of `Model` -> its subclass that is functional.
_FUNCTIONAL: dict[type, type[Model]] = {Model: FunctionalModel}

# Keras class -> its subclass with the mixins.
_EXTENDED: dict[type, type[train_step.TrainStep]] = {
    keras.Model: Model,
    keras.Sequential: Sequential,
    _keras.saving.Functional: FunctionalModel,
}


def _extended_class(cls: type[keras.Model]) -> type[train_step.TrainStep]:
    mixins = [
        m for m in (GradientAccumulationMixin, DynamicLossScalingMixin) if not issubclass(cls, m)
    ]
    if not mixins:
        return cls
    if cls not in _EXTENDED:
        extended = type(
            f"Extended{cls.__name__}",
            (Extended, *mixins, cls),
            {
                "__module__": __name__,
                "__doc__": cls.__doc__,
                "__reduce__": _keras.saving.pickled_as(cls),
                "_extends": cls,
            },
        )
        _keras.saving.register_as(extended, "tfbig>Extended")
        _EXTENDED[cls] = extended
    return _EXTENDED[cls]


@keras.saving.register_keras_serializable(package="tfbig")
class Extended(train_step.TrainStep):
    """Base of the classes that `extend` makes: saves which class it extends."""

    _extends: type

    def _option_config(self) -> _types.Config:
        cls = self._extends
        extends = {
            "module": cls.__module__,
            "class_name": cls.__name__,
            "registered_name": _keras.saving.registered_name(cls),
        }
        return super()._option_config() | {"extends": extends}

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None
    ) -> keras.Model:
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


def _extended_model(model: keras.Model, options: dict[str, Any]) -> train_step.TrainStep:
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
    cls = _extended_class(type(model))
    wrapper = None
    # A step of the class's own goes on to be scaled by Keras.
    is_own = cls._owner_of_extended_train_step() is not None
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and not is_own:
        if "loss_scale" not in options:
            wrapper = optimizer
            options = {"loss_scale": _settings_of(wrapper), **options}
        optimizer = optimizer.inner_optimizer
    extended: train_step.TrainStep = _keras.saving.with_class(model, cls)
    step_options.set_options(extended, options)
    if options.get("pipeline") is not None or options.get("shard") is not None:
        # What was traced before the variables moved.
        model.train_function = model.test_function = model.predict_function = None
    _keras.compiling.recompile(extended, optimizer)
    state = extended.loss_scale_state
    if wrapper is not None and wrapper.built and state is not None:
        state.loss_scale.assign(wrapper.dynamic_scale)
        state.finite_updates.assign(wrapper.step_counter)
    return extended


def _settings_of(wrapper: keras.optimizers.LossScaleOptimizer) -> DynamicLossScale:
    """The loss scale that does what Keras's wrapper of an optimizer does."""
    return DynamicLossScale(
        initial_scale=wrapper.initial_scale,
        growth_interval=wrapper.dynamic_growth_steps,
        max_scale=max(wrapper.initial_scale, DynamicLossScale().max_scale),
    )


def _keep_options(original: keras.Model, clone: keras.Model) -> keras.Model:
    """Gives a clone that `keras.models.clone_model` made the class and options of the original."""
    if not isinstance(original, train_step.TrainStep):
        return clone
    if not isinstance(clone, train_step.TrainStep):
        clone = _keras.saving.with_class(clone, type(original))
    step_options.set_options(clone, original._options())
    _keras.compiling.recompile(clone)
    return clone


_keras.saving.after_cloning(_keep_options)
_keras.saving.named_as_registered_in_hdf5(train_step.TrainStep)
