"""Names for a graph and an array, whose types TensorFlow and numpy leave open."""

from typing import Any, TypeAlias

import numpy.typing as npt
import tensorflow as tf

# A function's graph, with `inputs` and `outputs`; TensorFlow's `FuncGraph` is not public.
FuncGraph: TypeAlias = tf.Graph

# `Any`: the dtype is that of the data or the variable, and may be bfloat16, which numpy lacks.
Array: TypeAlias = npt.NDArray[Any]
