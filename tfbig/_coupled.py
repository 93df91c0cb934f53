"""Models whose loss divides by what is counted in the whole batch, where nothing shows it."""

from tfbig import _keras, errors

__all__ = ("check",)

# Registered name of a class -> what the loss of a batch is divided by, inside of `compute_loss`.
_DIVIDED_BY = {
    "keras_hub>RetinaNetObjectDetector": "the anchors of all samples that hold an object"
}


def check(model):
    """Refuses a model whose loss of a batch is not that of its parts; for a batch that is cut."""
    for cls in type(model).__mro__:
        divisor = _DIVIDED_BY.get(_keras.registered_name(cls))
        # A subclass may compute a loss that can be cut.
        if divisor and vars(cls).get("compute_loss") is type(model).compute_loss:
            raise errors.UnsupportedModelError(
                f"The loss of {cls.__name__} divides by {divisor}, so micro-batches and replicas "
                "would have another loss than the whole batch. Received: a batch that is cut. Use "
                "gradient_accumulation_steps=1 on one replica, or a subclass with a `compute_loss` "
                "that divides by a constant."
            )
