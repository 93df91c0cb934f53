"""`scales`: what a parametrized model multiplies, for people to read."""

import collections
import dataclasses

import keras

from tfbig import _types
from tfbig.mup._width import width_of

__all__ = ("Scales", "scales")


@dataclasses.dataclass(frozen=True)
class Scales:
    """What is multiplied at a weight.

    Attributes:
        kind: "hidden" if inputs and outputs of the layer grow with the width, "output" if only its
            inputs do, "vector" if only its outputs do, "fixed" if neither does.
        fan_in: How many times as many inputs as in the base model, if they grow; else 1.
        fan_out: How many times as many outputs as in the base model, if they grow; else 1.
        initial: What the first value was multiplied by.
        learning_rate: What the learning rate is multiplied by. Weight decay is not.
        gradient: What the gradient is multiplied by before the optimizer sees it, so that
            `epsilon` means the same at every width.
    """

    kind: str
    fan_in: float
    fan_out: float
    initial: float
    learning_rate: float
    gradient: float


def scales(model: keras.Model, optimizer: _types.Optimizer | None = None) -> dict[str, Scales]:
    """What is multiplied at each weight of a parametrized model, by the path of the weight.

    Args:
        model: A model.
        optimizer: The optimizer. Defaults to that of `compile`, then to an Adam.

    Returns:
        A dictionary from paths to `Scales`, in the order of `model.weights`. Where layers share a
        name, as those of a clone inside a model do, the second weight of a path is "path #2".

    Example:

    >>> def build(width):
    ...     hidden = keras.layers.Dense(width, "relu")
    ...     return keras.Sequential([keras.Input((8,)), hidden, keras.layers.Dense(1)])
    >>> model = tfbig.mup.build(build, width=64, base_width=16)
    >>> list(tfbig.mup.scales(model).values())[0].kind
    'vector'
    """
    optimizer = optimizer or getattr(model, "optimizer", None) or keras.optimizers.Adam()
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    found: dict[str, Scales] = {}
    times = collections.Counter[str]()
    for variable in model.weights:
        times[variable.path] += 1
        number = times[variable.path]
        path = variable.path if number == 1 else f"{variable.path} #{number}"
        width = width_of(variable)
        if width is None:
            found[path] = Scales("fixed", 1.0, 1.0, 1.0, 1.0, 1.0)
            continue
        update = width.update_scale(optimizer, variable)
        found[path] = Scales(
            width.kind,
            width.fan_in,
            width.fan_out,
            width.initial,
            update.learning_rate,
            update.gradient,
        )
    return found
