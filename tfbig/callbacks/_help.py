"""When the chief alone acts, the other workers take part in reading what is divided over all."""

import math
from collections.abc import Callable

import keras
import tensorflow as tf

from tfbig import _keras, errors
from tfbig.distribute import _workers

__all__ = ("act_with_help", "is_divided")

_DONE, _FAILED = "done", "failed"


def is_divided(model: keras.Model) -> bool:
    """Whether the chief may need help to read the state of a model."""
    return getattr(model, "shard", None) is not None


def act_with_help(
    workers: _workers.Workers, model: keras.Model, who: str, action: Callable[[], object]
) -> None:
    """Acts on the chief, and helps it on the other workers until it has acted.

    All workers must call it at the same point, between updates.

    Args:
        workers: the workers.
        model: the model whose weights and optimizers' state the chief may read.
        who: what acts, for messages.
        action: what the chief does.

    Raises:
        WorkerUnavailableError: On the other workers, if the action raises.
    """
    subject = f"what {who} reads"
    if workers.is_chief:

        def ask(variable: _keras.sharded_variable.ShardedVariable) -> bool:
            divided = _divided_variables(model)
            index = next((i for i, v in enumerate(divided) if v is variable), None)
            if index is not None:
                workers.exchange(subject, str(index))
            return index is not None

        try:
            with _keras.workers_together.chief_alone(who, ask):
                action()
        except (errors.WorkerUnavailableError, tf.errors.OpError):
            # There may be no one to tell.
            raise
        except Exception:
            workers.exchange(subject, _FAILED)
            raise
        workers.exchange(subject, _DONE)
        return
    while True:
        # It may take long to write; if the chief ends, there is nothing to wait for.
        said = workers.exchange(subject, "", seconds=math.inf)[0]
        if said == _DONE:
            return
        if said == _FAILED:
            raise errors.WorkerUnavailableError(
                f"{workers.names[0]} does not train on, since {who} raised an error there. See the "
                f"output of {workers.names[0]}."
            )
        _divided_variables(model)[int(said)].numpy()


def _divided_variables(model: keras.Model) -> list[_keras.sharded_variable.ShardedVariable]:
    """In the same order on all workers."""
    variables = list(model.variables)
    for _, optimizer in _keras.optimizer.optimizers_of(model):
        variables += optimizer.variables
    return [v for v in variables if isinstance(v, _keras.sharded_variable.ShardedVariable)]
