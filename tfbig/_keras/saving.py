"""Saving, cloning, compiling: state and options that Keras would leave behind."""

import functools
import importlib
import inspect
import typing
import weakref

import keras
from keras.src.backend.tensorflow.trackable import KerasAutoTrackable
from keras.src.models import cloning as _cloning
from keras.src.models import model as _model
from keras.src.models.functional import Functional as Functional
from keras.src.saving import object_registration
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils import python_utils

from tfbig._keras.variables import native


class ConfigWith:
    """A `get_config` that adds to that of the classes after `owner`.

    Keras records constructor arguments by itself if `get_config` is the default
    one, which it tells by an attribute of the method; so what is added must have
    the attribute of what it is added to.

    Args:
        owner: Function that returns the class which holds the method.
        additions: Name of the method that returns what is added, a dictionary.
    """

    def __init__(self, owner, additions):
        self.owner = owner
        self.additions = additions

    def __get__(self, instance, cls=None):
        if instance is None:
            return self
        inherited = getattr(super(self.owner(), instance), "get_config")  # noqa: B009

        def get_config():
            return {**inherited(), **getattr(instance, self.additions)()}

        vars(get_config)["_is_default"] = python_utils.is_default(inherited)
        return get_config


class SavedState(KerasAutoTrackable, KerasSaveable):
    """Variables that are saved with the model but are not among its weights.

    An attribute of this type goes into `.keras` files, `save_weights` and
    `tf.train.Checkpoint`; `model.weights` stays what the plain Keras model has.
    """

    _names: tuple[str, ...] = ()

    def _obj_type(self):
        return "Metric"  # Which private attributes Keras passes over.

    def variables(self):
        """The variables, in the order of their names."""
        return [getattr(self, name) for name in self._names]

    def save_own_variables(self, store):
        for name in self._names:
            store[name] = getattr(self, name).numpy()

    def load_own_variables(self, store):
        # Files of the plain Keras model have none of it.
        for name in self._names:
            if name in store.keys():  # noqa: SIM118  A store is no dictionary.
                getattr(self, name).assign(store[name])


class SeedStates(SavedState):
    """The states of a model's seed generators, which Keras saves nowhere.

    Without them a resumed run would draw its dropout masks from the start again.
    """

    def __init__(self, model):
        self._model: typing.Any = weakref.ref(model)

    def variables(self):
        return list(self._states().values())

    def _states(self):
        # Looked up late: a layer may make its generator in `build`.
        layers = self._model()._flatten_layers()
        generators = [g for layer in layers for g in getattr(layer, "_seed_generators", ())]
        return {str(k): g.state for k, g in enumerate(generators)}

    def save_own_variables(self, store):
        for name, state in self._states().items():
            store[name] = state.numpy()

    def load_own_variables(self, store):
        for name, state in self._states().items():
            if name in store.keys():  # noqa: SIM118  A store is no dictionary.
                state.assign(store[name])

    def _trackable_children(self, *args, **kwargs):
        return {name: native(state) for name, state in self._states().items()}


def track_for_checkpoint(model, name, value):
    """Makes `value` part of `tf.train.Checkpoint(model=model)`.

    Keras sets the optimizer inside `compile`, where tracking is off.
    """
    model._track_trackable(value, name=name, overwrite=True)


def after_cloning(finish):
    """Has `finish(original, clone)` make every clone of `keras.models.clone_model`.

    Keras clones a Sequential subclass into a plain Sequential, and a Functional
    subclass without its constructor arguments.
    """

    def wrap(clone):
        @functools.wraps(clone)
        def cloned(model, *args, **kwargs):
            return finish(model, clone(model, *args, **kwargs))

        return cloned

    for name in ("_clone_functional_model", "_clone_sequential_model"):
        setattr(_cloning, name, wrap(getattr(_cloning, name)))


is_functional = _model.functional_init_arguments


def with_class(model, cls):
    """A model of another class around the same layers, variables and state.

    Keras has no way to put a subclass around a model of any kind (functional,
    sequential, subclassed). The copy is shallow, but for what tracking appends
    to.
    """
    copy = cls.__new__(cls)
    # Keras wraps these methods of every layer; the model's would build the model.
    own = {n: copy.__dict__[n] for n in ("build", "quantize") if n in copy.__dict__}
    copy.__dict__.update(model.__dict__)
    copy.__dict__.update(own)
    for name, value in model.__dict__.items():
        if name.startswith("_self_") and isinstance(value, list | dict):
            copy.__dict__[name] = value.copy()
    copy.train_function = copy.test_function = copy.predict_function = None
    return copy


def register_as(cls, name):
    """Saves objects of `cls` under a registered name that is another class's."""
    object_registration.GLOBAL_CUSTOM_NAMES[cls] = name


def registered_name(cls):
    return object_registration.get_registered_name(cls)


def registered_class(name, module, class_name):
    """The class that was saved under these names, or None."""
    found = object_registration.get_registered_object(name)
    if found is None:
        found = getattr(importlib.import_module(module), class_name, None)
    return found


def compile_settings(model):
    """The settings of `compile` as a dictionary of what JSON takes."""

    def serialized(value):
        if inspect.isroutine(value):
            return value.__qualname__
        try:
            return keras.saving.serialize_keras_object(value)
        except Exception:  # Of an object of the user.
            return type(value).__name__

    config = model._compile_config.config if model._compile_config is not None else {}
    return {name: serialized(value) for name, value in config.items()}
