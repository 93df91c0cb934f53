"""A Keras variable hides the TensorFlow variables that it has on each replica; this finds them."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfbig import _types


def native(variable: _types.KerasVariable | _types.Variable) -> _types.Variable:
    """The `tf.Variable` behind a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def copies_of(variable: _types.KerasVariable | _types.Variable) -> Sequence[_types.Variable]:
    """The `tf.Variable` of each replica of this process."""
    variable = native(variable)
    if isinstance(variable, tf.distribute.DistributedValues):
        copies: Sequence[_types.Variable] = variable.values
        return copies
    return (variable,)
