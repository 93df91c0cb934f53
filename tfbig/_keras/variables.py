"""Variables: their copies on the replicas, and values that stand in for them."""

import contextlib

import keras
import tensorflow as tf
from keras.src.backend.common import global_state

from tfbig._keras.devices import is_tpu


def native(variable):
    """The `tf.Variable` behind a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


class VariableValues(keras.StatelessScope):
    """A scope in which assignments to Keras variables change nothing outside.

    `assigned` lists the variables that were assigned, in order. What is
    assigned inside a `tf.while_loop` or an XLA program thereby becomes a value
    that can be carried, averaged over the replicas, or dropped.
    """

    def __init__(self, values=()):
        super().__init__(state_mapping=list(values), collect_losses=True)
        self.assigned = []

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        # Keras takes regularized weights from the scope, and expects all in it.
        return variable._value if value is None else value

    def add_update(self, update):
        super().add_update(update)
        if not any(update[0] is v for v in self.assigned):
            self.assigned.append(update[0])

    def __exit__(self, *args, **kwargs):
        # The regular exit would initialize variables of an outer eager scope.
        global_state.set_global_attribute("stateless_scope", self.original_scope)


def is_summed(variable):
    """Whether a metric's variable stands for the sum over the replicas, as most do."""
    return variable.aggregation == "sum" and variable.dtype.startswith(("float", "bfloat"))


@contextlib.contextmanager
def exchanged_already(variables):
    """Within it, each core of a TPU assigns to its own copy of variables what it is given.

    TPUStrategy would exchange it first, as the variable's aggregation says: `iterations` by an
    AllToAll, and inside of the conditional that loss scaling needs. What is assigned after the
    exchange is the same on all cores.
    """
    copied = [native(v) for v in variables] if is_tpu(tf.distribute.get_strategy()) else []
    kept = [v._aggregation for v in copied]
    for variable in copied:
        variable._aggregation = tf.VariableAggregation.NONE
    try:
        yield
    finally:
        for variable, aggregation in zip(copied, kept, strict=True):
            variable._aggregation = aggregation


def values_of(variables):
    """NumPy values of variables that are the same on all replicas.

    Of what is summed over the replicas, such as metrics, the sum.
    """
    values = [(_copies(v)[0].numpy(), _parts(v)) for v in variables]
    return [value * parts if parts > 1 else value for value, parts in values]


def assign_all(variables, values):
    """Assigns what `values_of` returned; nothing is exchanged with other workers."""
    for variable, value in zip(variables, values, strict=True):
        for copy in _copies(variable):
            copy.assign(value / _parts(variable) if _parts(variable) > 1 else value)


def _copies(variable):
    """The `tf.Variable` of each replica of this process."""
    variable = native(variable)
    is_distributed = isinstance(variable, tf.distribute.DistributedValues)
    return variable.values if is_distributed else (variable,)


def _parts(variable):
    """How many replicas hold a part of what the variable stands for."""
    is_distributed = isinstance(native(variable), tf.distribute.DistributedValues)
    if not is_distributed or not is_summed(variable):
        return 1
    return native(variable).distribute_strategy.num_replicas_in_sync
