"""What has to hold before `fit` begins: workers that agree, seeds, callbacks."""

import contextlib
import dataclasses
import inspect
import json
import warnings

import keras
import numpy as np
import tensorflow as tf

from tfbig import _keras, errors
from tfbig.distribute import _workers

__all__ = ("arguments_of", "described", "prepare_fit")


def arguments_of(fit, args, kwargs):
    """The arguments of a call of `fit` by name.

    A class that is extended may have a `fit` of its own that hands on what it does
    not know.
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
def prepare_fit(model, arguments, options):
    """Within it, `fit` may run.

    A callback with a method `around_fit(model, arguments)`, which returns a context
    manager, is entered here, and left when training ends in whatever way. It is called
    after all others, and what its `before_others()` returns before them.

    Args:
        model: `keras.Model`.
        arguments: dictionary, the arguments of `fit` by name.
        options: dictionary, the options of the model.

    Yields:
        The arguments to call `fit` with.
    """
    workers = _workers.Workers.of(model.distribute_strategy)
    arguments = dict(arguments)
    with contextlib.ExitStack() as stack:
        if workers.count > 1:
            workers.agree("fit", _fingerprint(model, arguments, options))
            _warn_of_same_samples(arguments.get("x"))
            if not workers.is_chief and arguments.get("verbose", "auto") == "auto":
                arguments["verbose"] = 0
            if _keras.data.global_seed() is None:
                # Workers that shuffle each in its own way would share no batch.
                seed = workers.exchange("a seed", str(_keras.data.new_seed()))[0]
                stack.enter_context(_keras.data.reseeded_shuffling(int(seed)))
        callbacks = _callbacks(arguments.get("callbacks"))
        around = [c for c in callbacks if hasattr(c, "around_fit")]
        if len(around) > 1:
            # Each would move the data to where training goes on.
            raise errors.InvalidOptionError(
                "`callbacks` must hold only one that restores a training. Received: "
                f"{', '.join(type(c).__name__ for c in around)}."
            )
        for callback in around:
            stack.enter_context(callback.around_fit(model, arguments))
        if around and not isinstance(arguments["callbacks"], keras.callbacks.CallbackList):
            others = [c for c in callbacks if c not in around]
            arguments["callbacks"] = [*(c.before_others() for c in around), *others, *around]
        yield arguments


def _callbacks(argument):
    """The callbacks that `fit` was given, one by one."""
    if isinstance(argument, keras.callbacks.CallbackList):
        return argument.callbacks
    return keras.tree.flatten(argument or [])


def _fingerprint(model, arguments, options):
    """What must be the same on all workers, as a dictionary of str."""
    found = {
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
        "seed": _keras.data.global_seed(),
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
    }
    found |= {f"option {name}": value for name, value in options.items()}
    found |= {f"compile's {k}": v for k, v in _keras.saving.compile_settings(model).items()}
    for name, value in arguments.items():
        if name == "callbacks":
            # Others may differ: what only writes files is often left to the chief.
            value = [type(c).__name__ for c in _callbacks(value) if hasattr(c, "around_fit")]
        if name != "verbose":
            found[f"argument {name}"] = keras.tree.map_structure(_described, value)
    return {k: json.dumps(v, default=_described, sort_keys=True) for k, v in found.items()}


def described(layers):
    """Class and settings of each layer."""
    return [[type(layer).__name__, _settings(layer)] for layer in layers]


def _settings(layer):
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


def _described(value):
    """A value of which addresses and samples are left out."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value):
        return str(value)
    if isinstance(value, np.ndarray | tf.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__


def _warn_of_same_samples(data):
    """Warns of data of which workers would not each read their own samples."""
    if not isinstance(data, tf.data.Dataset):
        return
    policies = tf.data.experimental.AutoShardPolicy
    policy = data.options().experimental_distribute.auto_shard_policy
    message = None
    if policy == policies.OFF and not _keras.data.is_sharded(data):
        message = (
            "The dataset would hand every worker the same samples: its auto_shard_policy is OFF "
            "and there is no `shard` in it. Leave the policy at DATA, or call dataset.shard("
            "workers, index)."
        )
    elif (
        # Of files, AUTO has each worker read its own.
        (policy == policies.DATA or (policy == policies.AUTO and not _keras.data.reads_files(data)))
        and _keras.data.shuffles_without_seed(data)
    ):
        message = (
            "The dataset is shuffled without a seed, so in another order on each worker: of what "
            "they share out, some samples come twice and others not at all. Call "
            "dataset.shuffle(n, seed=0), or tf.random.set_seed before."
        )
    if message is not None:
        warnings.warn(message, stacklevel=4)
