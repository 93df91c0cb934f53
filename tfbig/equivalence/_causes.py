"""Why a model is not exact: what is known of its layers, and what deviations say of its loss."""

import keras

from tfbig import _keras, _types
from tfbig.equivalence._report import Deviation
from tfbig.equivalence._trainings import Trainings

__all__ = ("in_layers", "in_loss")


def in_loss(trainings: Trainings, deviations: list[Deviation], tolerance: float) -> list[str]:
    """What the deviations tell about the loss and about embedding tables."""
    causes = []
    if trainings.couples_samples(tolerance):
        names = ", ".join(_keras.losses.losses_that_couple_samples(trainings.model))
        causes.append(
            f"The loss couples the samples of a batch{names and f' ({names})'}: for part of a "
            "batch it is a different function. Larger micro-batches come closer; "
            "`loss_denominator` does not help."
        )
    beyond = {d.name: d.kind for d in reversed(deviations) if not d.is_rounding}
    tables = sorted(p for p in trainings.tables if beyond.get(p) == "weight")
    if tables and not {"gradient", "loss"} & set(beyond.values()):
        causes.append(
            f"The gradient of {', '.join(tables)} is right, but the optimizer's update is not: "
            "rows of a table were added up that Keras squares one by one. This happens with "
            "jit_compile=True, and where tfbig warns that it cannot follow a look-up."
        )
    return causes


def in_layers(model: keras.Model, state: list[_types.KerasVariable]) -> list[str]:
    """The layers that are known not to be exact, in the order of the docs.

    Args:
        model: The model.
        state: Non-trainable variables that an update changes.
    """
    suspects: list[str] = []
    layers = _keras.layers.all_layers(model)
    for layer in layers:
        is_normalization = isinstance(layer, keras.layers.BatchNormalization)
        if is_normalization and layer.trainable and not layer.synchronized:
            suspects.append(
                f"BatchNormalization ({layer.name!r}) normalizes each micro-batch with its own "
                "statistics."
            )
    for layer in layers:
        if _keras.layers.draws_random_numbers(layer):
            suspects.append(
                f"{type(layer).__name__} ({layer.name!r}) draws random numbers, which differ "
                "between micro-batches and between replicas."
            )
    for layer in layers:
        own = [v for v in state if _keras.layers.owns(layer, v)]
        if own and not type(layer).__module__.startswith("keras."):
            suspects.append(
                f"{type(layer).__name__} ({layer.name!r}) changes its state "
                f"({', '.join(v.name for v in own)}) in every forward pass, that is, once per "
                "micro-batch."
            )
    return suspects
