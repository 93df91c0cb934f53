"""Names for what TensorFlow and Keras leave without types.

Neither package ships type information, so to mypy each of these is `Any`; to a reader, and to an
editor that looks into the packages, they say what is meant.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import cross_device_utils as _cross_device_utils

Tensor: TypeAlias = tf.Tensor
Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices
Variable: TypeAlias = tf.Variable
KerasVariable: TypeAlias = keras.Variable
DType: TypeAlias = tf.DType
Strategy: TypeAlias = tf.distribute.Strategy
# What runs the collectives of one replica.
Launcher: TypeAlias = _cross_device_utils.CollectiveReplicaLauncher
Dataset: TypeAlias = tf.data.Dataset
Layer: TypeAlias = keras.layers.Layer
Optimizer: TypeAlias = keras.optimizers.Optimizer
Callback: TypeAlias = keras.callbacks.Callback

# Any: of all shapes and dtypes.
Array: TypeAlias = np.ndarray[Any, Any]

# Nested tuples, lists and dictionaries, as `tf.nest` and `keras.tree` take them apart; what lies
# in the leaves is said where the name is used.
Structure: TypeAlias = Any

# What `get_config` returns and `from_config` takes: of JSON, after serialization.
Config: TypeAlias = dict[str, Any]

# What `fit` hands to callbacks, and what a step returns for it.
Logs: TypeAlias = Mapping[str, Any]

# A function whose arguments the user, or Keras, decides.
AnyFunction: TypeAlias = Callable[..., Any]
