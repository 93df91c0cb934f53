"""Which `train_step` and `test_step` a class runs: tfbig's, or those of a class that it extends.

`tfbig.extend(Detector)` makes a class whose bases are the mixins and `Detector`, in this order. A
`train_step` that `Detector` wrote, which knows nothing of tfbig, would be hidden by that of the
mixins. It must run, though: `extend` leaves a class's own steps as they are.
"""

from __future__ import annotations

import keras

from tfbig import errors

__all__ = ("check_mixin_order", "keep_extended_steps", "owner_of_extended_step")


def check_mixin_order(cls: type, step_class: type) -> None:
    """Raises if a Keras class comes before the mixins, so that its step would hide theirs.

    Args:
        cls: a new subclass of `step_class`.
        step_class: the class whose steps are tfbig's.
    """
    mro = cls.__mro__
    if keras.Model in mro and mro.index(keras.Model) < mro.index(step_class):
        bases = ", ".join(b.__name__ for b in cls.__bases__)
        correct = sorted(cls.__bases__, key=lambda b: not issubclass(b, step_class))
        raise errors.MixinOrderError(
            "tfbig's mixins must stand before the Keras class. Received: "
            f"class {cls.__name__}({bases}). Write class {cls.__name__}"
            f"({', '.join(b.__name__ for b in correct)})."
        )


def keep_extended_steps(cls: type, step_class: type) -> None:
    """Gives a new class the steps of a class that it extends, where tfbig's would hide them."""
    for name in ("train_step", "test_step"):
        owner = owner_of_extended_step(cls, step_class, name)
        if owner is not None and getattr(cls, name) is getattr(step_class, name):
            setattr(cls, name, vars(owner)[name])


def owner_of_extended_step(cls: type, step_class: type, name: str) -> type | None:
    """The class after tfbig's that wrote a step of its own, or None if it is Keras's."""
    after = cls.__mro__[cls.__mro__.index(step_class) + 1 :]
    owner = next((c for c in after if name in vars(c)), None)
    return None if owner is None or owner.__module__.split(".")[0] == "keras" else owner
