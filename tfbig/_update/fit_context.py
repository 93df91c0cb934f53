"""What has to hold before `fit` begins: workers that agree, seeds, callbacks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, _types, errors
from tfbig.distribute import _workers

__all__ = ("arguments_of", "callbacks_of", "described", "measures_stages", "prepare_fit")


# Any: what users pass to `fit`.
def arguments_of(
    fit: _types.AnyFunction, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of `fit` by name.

    The `fit` of an extended class may pass on what it does not know.
    """
    parameters = list(inspect.signature(fit).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        parameters = list(inspect.signature(keras.Model.fit).parameters.values())[1:]
    found = dict(inspect.Signature(parameters).bind(*args, **kwargs).arguments)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name, {})
    return found


@contextlib.contextmanager
def prepare_fit(
    model: keras.Model, arguments: dict[str, Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A context in which `fit` may run.

    A callback with a method `around_fit(model, arguments)`, which returns a context
    manager, is entered here and left however training ends. Keras calls it before all other
    callbacks. If it restores training, Keras calls what its `before_others()` returns before
    them, and the callback itself after them.

    Args:
        model: the model.
        arguments: the arguments of `fit` by name.
        options: the options of the model.

    Yields:
        The arguments to call `fit` with.
    """
    arguments = dict(arguments)
    with _workers_alike(model, arguments, options), _callbacks_entered(model, arguments):
        yield arguments


@contextlib.contextmanager
def _workers_alike(
    model: keras.Model, arguments: dict[str, Any], options: dict[str, Any]
) -> Iterator[None]:
    """Within it, all workers train alike; changes what one of them must be told otherwise."""
    workers = _workers.Workers.of(model.distribute_strategy)
    if workers.count == 1:
        yield
        return
    workers.agree("fit", _fingerprint(model, arguments, options))
    _warn_of_same_samples(arguments.get("x"))
    if not workers.is_chief and arguments.get("verbose", "auto") == "auto":
        arguments["verbose"] = 0
    if not _shuffles_apart(workers, arguments.get("x")):
        yield
        return
    # Workers that shuffle in different orders would not share a batch.
    seed = workers.exchange("a seed", str(_keras.shuffling.new_seed()))[0]
    with _keras.shuffling.reseeded_shuffling(int(seed)):
        yield


@contextlib.contextmanager
def _callbacks_entered(model: keras.Model, arguments: dict[str, Any]) -> Iterator[None]:
    """Within it, callbacks are entered; puts them in the order in which Keras shall call them."""
    callbacks = callbacks_of(arguments.get("callbacks"))
    around = [c for c in callbacks if hasattr(c, "around_fit")]
    restoring = [c for c in around if hasattr(c, "before_others")]
    if len(restoring) > 1:
        # Each would move the data to where training resumes.
        raise errors.InvalidOptionError(
            "`callbacks` must hold only one that restores training. Received: "
            f"{', '.join(type(c).__name__ for c in restoring)}."
        )
    first = [c for c in around if c not in restoring]
    if not any(hasattr(c, "guards_updates") for c in first):
        # That of an earlier `fit`.
        model.update_guard = None
    with contextlib.ExitStack() as stack:
        for callback in around:
            stack.enter_context(callback.around_fit(model, arguments))
        if around and not isinstance(arguments["callbacks"], keras.callbacks.CallbackList):
            others = [c for c in callbacks if c not in around]
            before = [c.before_others() for c in restoring]
            arguments["callbacks"] = [*before, *first, *others, *restoring]
        yield


def _shuffles_apart(workers: _workers.Workers, data: object) -> bool:
    """Whether Keras would shuffle data of this kind in another order on each worker."""
    if _keras.shuffling.global_seed() is None:
        return True
    if not isinstance(data, keras.utils.PyDataset):
        return False
    # Keras shuffles its batches by Python's generator, which `tf.random.set_seed` leaves alone.
    state = hashlib.sha256(repr(random.getstate()).encode()).hexdigest()
    return len(set(workers.exchange("the state of `random`", state))) > 1


def measures_stages(arguments: Mapping[str, Any]) -> bool:
    """Whether a callback of `fit` asks how long the stages of a pipeline wait."""
    callbacks = callbacks_of(arguments.get("callbacks"))
    return any(getattr(c, "measures_stages", False) for c in callbacks)


def callbacks_of(argument: object) -> list[_types.Callback]:
    """The callbacks that `fit` was given, one by one."""
    if isinstance(argument, keras.callbacks.CallbackList):
        return list(argument.callbacks)
    return list(keras.tree.flatten(argument or []))


def _fingerprint(
    model: keras.Model, arguments: dict[str, Any], options: dict[str, Any]
) -> dict[str, str]:
    """What must be the same on all workers, each thing as a text."""
    found: dict[str, Any] = {
        "variables": [
            f"{'x'.join(map(str, v.shape))} {v.dtype}{'' if v.trainable else ' (fixed)'}"
            for v in model.weights
        ]
        if model.built
        else "not built",
        "model": type(model).__name__,
        "layers": described(model.layers),
        "dtype policy": model.dtype_policy.name,
        "floatx": keras.config.floatx(),
        "seed": _keras.shuffling.global_seed(),
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
    }
    found |= {f"option {name}": value for name, value in options.items()}
    found |= {f"compile's {k}": v for k, v in _keras.saving.compile_settings(model).items()}
    for name, value in arguments.items():
        if name == "callbacks":
            # Others may differ: what only writes files is often left to the chief.
            texts = [_described_callback(c, model) for c in callbacks_of(value)]
            value = [text for text in texts if text is not None]
        if name != "verbose":
            found[f"argument {name}"] = keras.tree.map_structure(_described, value)
    return {k: json.dumps(v, default=_described, sort_keys=True) for k, v in found.items()}


def _described_callback(callback: _types.Callback, model: keras.Model) -> str | None:
    """What must be the same of a callback; None if there may be none on another worker."""
    same = getattr(callback, "same_on_all_workers", None)
    if same is not None:
        found: str | None = same(model)
        return found
    return type(callback).__name__ if hasattr(callback, "around_fit") else None


def described(layers: Iterable[_types.Layer]) -> list[list[Any]]:
    """Class and settings of each layer."""
    return [[type(layer).__name__, _settings(layer)] for layer in layers]


def _settings(layer: _types.Layer) -> dict[str, bool | int | float | str]:
    """The settings of a layer that are numbers or texts.

    Without its name, which counts up, and its seed, which may be drawn.
    """
    try:
        config = layer.get_config()
    except Exception:  # Of a layer of the user.
        return {}
    is_simple = (bool, int, float, str)
    return {
        k: v for k, v in config.items() if isinstance(v, is_simple) and k not in ("name", "seed")
    }


def _described(value: object) -> bool | int | float | str | None:
    """A value without its address in memory and its samples."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value):
        return str(value)
    if isinstance(value, np.ndarray | tf.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__


def _warn_of_same_samples(data: object) -> None:
    """Warns of data from which workers would not each read samples of their own."""
    if not isinstance(data, tf.data.Dataset):
        return
    policies = tf.data.experimental.AutoShardPolicy
    policy = data.options().experimental_distribute.auto_shard_policy
    message = None
    if policy == policies.OFF and not _keras.datasets.is_sharded(data):
        message = (
            "The dataset would hand every worker the same samples: its auto_shard_policy is OFF "
            "and it has no `shard`. Leave the policy at DATA, or call dataset.shard("
            "workers, index)."
        )
    elif (
        # Of files, AUTO has each worker read its own.
        (
            policy == policies.DATA
            or (policy == policies.AUTO and not _keras.datasets.reads_files(data))
        )
        and _keras.datasets.shuffles_without_seed(data)
    ):
        message = (
            "The dataset is shuffled without a seed, so each worker shuffles it in an order of its "
            "own, and takes some samples that others take too, while others are never used. Call "
            "dataset.shuffle(n, seed=0), or tf.random.set_seed before."
        )
    if message is not None:
        warnings.warn(message, stacklevel=6)
