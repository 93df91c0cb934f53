"""Where the state of an optimizer lies when it is divided over the replicas."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfbig import _keras, _log, _types
from tfbig.distribute import _pieces
from tfbig.distribute._pieces import Piece

__all__ = ("ShardedState", "divide", "is_divided", "make_whole", "state_of", "undivided")

_ATTRIBUTE = "_tfbig_sharded_state"


class ShardedState:
    """The division of an optimizer's state over the replicas of a strategy.

    Each weight is divided, and each part of the state that belongs to it lies where its piece of
    the weight is updated. What treats each element by itself is divided into equal chunks; of what
    looks at whole variables, each is owned by one replica.

    Args:
        optimizer: the optimizer.
        strategy: the strategy of the replicas.

    Attributes:
        pieces: for each weight of the optimizer, the piece of each replica; of no weights before
            the optimizer is built.
    """

    def __init__(self, optimizer: _types.Optimizer, strategy: _types.Strategy) -> None:
        _keras.sharded_optimizer.refuse_unsupported(optimizer)
        self.optimizer = optimizer
        self.strategy = strategy
        self.pieces: list[list[Piece | None]] = []
        # For each weight, whether one replica must have all of its state.
        self._stay_whole: list[bool] = []
        self._build = optimizer.build
        self._is_elementwise = _keras.sharded_optimizer.is_elementwise(optimizer)

    def index_of(self, variable: keras.Variable) -> int:
        """The index of a weight of the optimizer."""
        index: int = _keras.sharded_optimizer.index_of(self.optimizer, variable)
        return index

    def build(self, variables: list[keras.Variable]) -> None:
        """Builds the optimizer; no replica ever has all of its state."""
        if self.optimizer.built:
            return
        variables = list(variables)
        self._divide(variables)
        with self.strategy.scope():
            _keras.sharded_optimizer.build_divided(
                self.optimizer, lambda: self._build(variables), self._place
            )

    def take_over(self) -> None:
        """Divides the state that the optimizer has, a part at a time."""
        _keras.sharded_optimizer.refuse_state_in_no_list(self.optimizer)
        self._divide(_keras.sharded_optimizer.weights_of(self.optimizer))
        for index, variable in _keras.sharded_optimizer.state_of(self.optimizer):
            value = _keras.variables.values_of([variable])[0]
            pieces = self._pieces_of(index, variable)
            _keras.sharded_variable.divide(variable, pieces, self.strategy, value)

    def give_back(self) -> None:
        """Gives every replica all of the state again, a part at a time."""
        for _, variable in _keras.sharded_optimizer.state_of(self.optimizer):
            _keras.sharded_variable.make_whole(variable)

    def is_outdated(self) -> bool:
        """Whether other weights must be whole than when the state was divided."""
        weights = _keras.sharded_optimizer.weights_of(self.optimizer)
        return self._must_be_whole(weights) != self._stay_whole

    def _must_be_whole(self, variables: list[keras.Variable]) -> list[bool]:
        # A constraint looks at all of its variable, and Keras assigns all of one whose gradient
        # is its new value.
        return [
            not self._is_elementwise
            or v.constraint is not None
            or _keras.sharded_optimizer.is_overwritten(self.optimizer, v)
            for v in variables
        ]

    def _divide(self, variables: list[keras.Variable]) -> None:
        number = self.strategy.num_replicas_in_sync
        self._stay_whole = self._must_be_whole(variables)
        sizes = [math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables]
        owned = [i for i, whole in enumerate(self._stay_whole) if whole]
        owners = dict(
            zip(owned, _pieces.balanced_owners([sizes[i] for i in owned], number), strict=True)
        )
        self.pieces = [
            _pieces.on_one_replica(v.shape, number, owners[i])
            if i in owners
            else _pieces.in_chunks(v.shape, number)
            for i, v in enumerate(variables)
        ]
        name = type(self.optimizer).__name__
        how = (
            "each variable divided into equal chunks"
            if not owned
            else f"each variable on one of them, since {name} looks at whole variables"
            if len(owned) == len(variables)
            else f"in equal chunks, but for {len(owned)} that must be whole, each on one"
        )
        _log.logger().info("tfbig: the state of %s lies on %d replicas, %s", name, number, how)

    def _place(
        self, index: int, variable: keras.Variable, initial: Callable[[], _types.Tensor]
    ) -> None:
        with tf.device("CPU:0"):
            value = initial().numpy()
        pieces = self._pieces_of(index, variable)
        _keras.sharded_variable.divide(variable, pieces, self.strategy, value)

    def _pieces_of(self, index: int, variable: keras.Variable) -> list[Piece | None]:
        """The pieces of a part of the state that belongs to a weight."""
        pieces = self.pieces[index]
        weight = _keras.sharded_optimizer.weights_of(self.optimizer)[index]
        if tuple(variable.shape) == tuple(weight.shape):
            return pieces
        # It is owned by one replica: what is divided in chunks has only state of its own shape.
        owner = next(r for r, piece in enumerate(pieces) if piece is not None)
        return _pieces.on_one_replica(variable.shape, len(pieces), owner)


def state_of(optimizer: _types.Optimizer) -> ShardedState | None:
    """How the state of an optimizer is divided; None if it is not."""
    found: ShardedState | None = vars(optimizer).get(_ATTRIBUTE)
    return found


def is_divided(optimizer: _types.Optimizer) -> bool:
    """Whether the state of an optimizer is divided over replicas."""
    return state_of(optimizer) is not None


def divide(optimizer: _types.Optimizer, strategy: _types.Strategy) -> bool:
    """Divides the state of an optimizer over the replicas, now or when it is built.

    Returns:
        Whether it was divided otherwise before, since when weights got or lost a constraint.

    Raises:
        InvalidOptionError: If the optimizer's state cannot be divided.
    """
    if strategy.num_replicas_in_sync == 1:
        return False
    before = state_of(optimizer)
    if before is not None and not before.is_outdated():
        return False
    make_whole(optimizer)
    state = ShardedState(optimizer, strategy)
    if optimizer.built:
        state.take_over()
    # Past Keras, which tracks attributes.
    vars(optimizer)[_ATTRIBUTE] = state
    vars(optimizer)["build"] = state.build
    return before is not None


def make_whole(optimizer: _types.Optimizer) -> None:
    """Takes `divide` back."""
    state = state_of(optimizer)
    if state is not None:
        if optimizer.built:
            state.give_back()
        del vars(optimizer)[_ATTRIBUTE], vars(optimizer)["build"]


@contextlib.contextmanager
def undivided(model: keras.Model) -> Iterator[None]:
    """Within it, the state of a model's optimizer is not divided."""
    optimizer = model.optimizer
    state = state_of(optimizer)
    if state is None:
        yield
        return
    make_whole(optimizer)
    try:
        yield
    finally:
        divide(optimizer, state.strategy)
        # It had the pieces of before.
        model._rebuild_step()
