"""Keras saves, clones and wraps models without the state and options of tfbig; here both stay."""

import contextlib
import functools
import importlib
import inspect
import json
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import h5py
import keras
from keras.src.backend.tensorflow.trackable import KerasAutoTrackable
from keras.src.legacy.saving import legacy_h5_format, saving_utils
from keras.src.models import cloning as _cloning
from keras.src.models import functional as _functional
from keras.src.models import model as _model
from keras.src.saving import object_registration, saving_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils import python_utils

from tfbig import _types
from tfbig._keras.variables import native

# Any: a dictionary or an HDF5 group; Keras uses its `keys` and items.
_Store: TypeAlias = Any

# A class that Keras exports under no public name.
Functional: TypeAlias = _functional.Functional

# Whether the arguments of a model's constructor are those of a functional model.
are_functional_arguments = _model.functional_init_arguments


class ExtendedConfig:
    """A `get_config` that adds to that of the classes after `owner`.

    Keras records constructor arguments by itself if `get_config` is the default one. It tells by an
    attribute of the method, so the extended method must have the same attribute.

    Args:
        owner: function that returns the class which holds the method.
        additions: name of the method that returns what is added, a dictionary.
    """

    def __init__(self, owner: Callable[[], type], additions: str) -> None:
        self.owner = owner
        self.additions = additions

    def __get__(self, instance: keras.Model | None, cls: type | None = None) -> object:
        if instance is None:
            return self
        inherited = getattr(super(self.owner(), instance), "get_config")  # noqa: B009

        def get_config() -> _types.Config:
            return {**inherited(), **getattr(instance, self.additions)()}

        vars(get_config)["_is_default"] = python_utils.is_default(inherited)
        return get_config


class SavedState(KerasAutoTrackable, KerasSaveable):  # type: ignore[misc]  # Keras has no types.
    """Variables that are saved with the model but are not among its weights.

    An attribute of this type goes into `.keras` files, `save_weights` and `tf.train.Checkpoint`;
    `model.weights` stays what it is for the plain Keras model.
    """

    _names: tuple[str, ...] = ()

    def _obj_type(self) -> str:
        return "Metric"  # Keras skips private attributes of this type.

    def variables(self) -> list[_types.KerasVariable]:
        """The variables, in the order of their names."""
        return [getattr(self, name) for name in self._names]

    def save_own_variables(self, store: _Store) -> None:
        for name in self._names:
            store[name] = getattr(self, name).numpy()

    def load_own_variables(self, store: _Store) -> None:
        # Files of the plain Keras model have none of them.
        for name in self._names:
            if name in store.keys():  # noqa: SIM118  A store is no dictionary.
                getattr(self, name).assign(store[name])


class SeedStates(SavedState):
    """The states of a model's seed generators, which Keras does not save.

    Without them a resumed run would draw its dropout masks from the start again.
    """

    def __init__(self, model: keras.Model) -> None:
        # Any: mypy would have the reference be of a model.
        self._model: Any = weakref.ref(model)

    def variables(self) -> list[_types.KerasVariable]:
        return list(self._states().values())

    def _states(self) -> dict[str, _types.KerasVariable]:
        # Looked up late: a layer may make its generator in `build`.
        layers = self._model()._flatten_layers()
        generators = [g for layer in layers for g in getattr(layer, "_seed_generators", ())]
        return {str(k): g.state for k, g in enumerate(generators)}

    def save_own_variables(self, store: _Store) -> None:
        for name, state in self._states().items():
            store[name] = state.numpy()

    def load_own_variables(self, store: _Store) -> None:
        for name, state in self._states().items():
            if name in store.keys():  # noqa: SIM118  A store is no dictionary.
                state.assign(store[name])

    def _trackable_children(self, *args: object, **kwargs: object) -> dict[str, _types.Variable]:
        return {name: native(state) for name, state in self._states().items()}


def track_for_checkpoint(model: keras.Model, name: str, value: object) -> None:
    """Makes `value` part of `tf.train.Checkpoint(model=model)`.

    Keras sets the optimizer inside `compile`, where tracking is off.
    """
    model._track_trackable(value, name=name, overwrite=True)


def after_cloning(finish: Callable[[keras.Model, keras.Model], keras.Model]) -> None:
    """Has every clone of `keras.models.clone_model` replaced by `finish(original, clone)`.

    Keras clones a Sequential subclass into a plain Sequential, and a Functional subclass without
    its constructor arguments.
    """

    def wrap(clone: _types.AnyFunction) -> _types.AnyFunction:
        @functools.wraps(clone)
        def cloned(model: keras.Model, *args: object, **kwargs: object) -> keras.Model:
            return finish(model, clone(model, *args, **kwargs))

        return cloned

    for name in ("_clone_functional_model", "_clone_sequential_model"):
        setattr(_cloning, name, wrap(getattr(_cloning, name)))


def save_beside_config(
    key: str,
    saved: Callable[[keras.Model], Any],  # Any: what JSON can hold.
    restore: Callable[[keras.Model, Any], None],
) -> None:
    """Adds something to the `.keras` files of all models that have it.

    A config holds what a class takes in its constructor, and a model of any class may have this.

    Args:
        key: name of the addition in the file.
        saved: function of a model: the addition, or None.
        restore: function of a loaded model without weights, and the addition.
    """
    serialize, load = saving_lib._serialize_model_as_json, saving_lib._model_from_config

    @functools.wraps(serialize)
    def with_addition(model: keras.Model) -> tuple[str, str]:
        config, metadata = serialize(model)
        addition = saved(model) if isinstance(model, keras.Model) else None
        if addition is not None:
            config = json.dumps(json.loads(config) | {key: addition})
        return config, metadata

    @functools.wraps(load)
    def loaded(config: str, *args: object, **kwargs: object) -> keras.Model:
        model = load(config, *args, **kwargs)
        addition = json.loads(config).get(key)
        if addition is not None:
            restore(model, addition)
        return model

    saving_lib._serialize_model_as_json, saving_lib._model_from_config = with_addition, loaded


def has_state_of_built(optimizer: keras.optimizers.Optimizer, path: str | os.PathLike[str]) -> bool:
    """Whether a file of weights has more variables of an optimizer than it has before it is built.

    Keras saves an optimizer that has applied no gradients as it is. One that is built warns that it
    cannot load that.

    Args:
        optimizer: One that is not built.
        path: What `save_weights` wrote; in a format other than Keras's, the answer is no.
    """
    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path) as file:
        return len(file.get("optimizer/vars", ())) > len(optimizer.variables)


def before_saving_hdf5(look: Callable[[keras.Model], object]) -> None:
    """Has a function look at every model that is saved as an HDF5 file, which has a config alone.

    Args:
        look: function of the model.
    """
    save = legacy_h5_format.save_model_to_hdf5

    @functools.wraps(save)
    def saved(model: keras.Model, *args: object, **kwargs: object) -> object:
        look(model)
        return save(model, *args, **kwargs)

    legacy_h5_format.save_model_to_hdf5 = saved


def named_as_registered_in_hdf5(cls: type[keras.Model]) -> None:
    """Has HDF5 files name models of a class as `.keras` files do.

    Keras writes the class's own name, by which it finds no class of a package, or one of its own.

    Args:
        cls: the class; those derived from it, too.
    """
    metadata = saving_utils.model_metadata

    @functools.wraps(metadata)
    def named(model: keras.Model, *args: object, **kwargs: object) -> _types.Config:
        found: _types.Config = metadata(model, *args, **kwargs)
        if isinstance(model, cls):
            found["model_config"]["class_name"] = registered_name(type(model))
        return found

    saving_utils.model_metadata = named


def with_class(model: keras.Model, cls: type[keras.Model]) -> keras.Model:
    """A model of another class around the same layers, variables and state.

    Keras cannot put a subclass around a model of any kind (functional, sequential, subclassed).
    The copy is shallow, except for the lists and dictionaries that tracking appends to.
    """
    copy: keras.Model = cls.__new__(cls)  # type: ignore[call-overload]  # Keras has no types.
    # Keras wraps these methods of every layer; those of `model` would build `model`.
    own = {n: copy.__dict__[n] for n in ("build", "quantize") if n in copy.__dict__}
    copy.__dict__.update(model.__dict__)
    copy.__dict__.update(own)
    for name, value in model.__dict__.items():
        if name.startswith("_self_") and isinstance(value, list | dict):
            copy.__dict__[name] = value.copy()
    copy.train_function = copy.test_function = copy.predict_function = None
    return copy


def register_as(cls: type, name: str) -> None:
    """Saves objects of `cls` under a registered name that is another class's."""
    object_registration.GLOBAL_CUSTOM_NAMES[cls] = name


def pickled_as(cls: type[keras.Model]) -> _types.AnyFunction:
    """A `__reduce__` for a class made while the program runs, which `pickle` does not find.

    Keras pickles a model as a `.keras` file, which names the class of the model, and the name of
    a class, which only says how to read it.

    Args:
        cls: a class that `pickle` finds by its name.
    """

    def reduced(self: keras.Model) -> tuple[_types.AnyFunction, tuple[object, ...]]:
        _, file = KerasSaveable.__reduce__(self)
        return cls._unpickle_model, file

    return reduced


def registered_name(cls: type) -> str:
    """The name under which Keras saves objects of `cls`."""
    return str(object_registration.get_registered_name(cls))


def registered_class(name: str, module: str, class_name: str) -> type | None:
    """The class that was saved under these names, or None."""
    found: type | None = None
    # By either name, users may pass it in `custom_objects`.
    for key in (name, class_name):
        found = found or object_registration.get_registered_object(key)
    if found is None:
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), class_name, None)
    return found


def compile_settings(model: keras.Model) -> _types.Config:
    """The settings of `compile`, as values that JSON can hold."""

    def serialized(value: object) -> object:
        if inspect.isroutine(value):
            return value.__qualname__
        try:
            return keras.saving.serialize_keras_object(value)
        except Exception:  # The user's object may raise any.
            return type(value).__name__

    config = model._compile_config.config if model._compile_config is not None else {}
    return {name: serialized(value) for name, value in config.items()}
