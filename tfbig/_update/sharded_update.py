"""The second half of an update whose optimizer's state is divided over the replicas.

What is exchanged with every replica otherwise goes where it is needed: the gradient of a piece to
the replica that has the state of that piece, which updates it, and the new piece from there to all.
Losses, counts and flags are the same on all replicas, as without it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from tfbig import _keras, _types
from tfbig._update import (
    acceptance,
    accumulators,
    apply,
    exchange,
    gathered_weights,
    half_precision_exchange,
    replicas,
)
from tfbig._update.accumulated_gradients import AccumulatedGradients
from tfbig._update.loss_scale import LossScaleState
from tfbig._update.sharded_state import ShardedState
from tfbig._update.stop_request import StopRequest
from tfbig.distribute import _rows
from tfbig.distribute._pieces import Piece

__all__ = ("exchange_and_apply",)


def exchange_and_apply(
    state: ShardedState,
    local: AccumulatedGradients,
    loss_scale: LossScaleState | None,
    *,
    needs_norm: bool,
    exchange_dtype: str | None,
    bucket_bytes: int,
    stop_request: StopRequest | None = None,
    guard: acceptance.UpdateGuard | None = None,
) -> apply.Update:
    """Exchanges what the replicas accumulated, and updates. In replica context.

    Args:
        state: how the optimizer's state is divided.
        local: what this replica accumulated.
        loss_scale: see `exchange_and_apply.apply_gradients`.
        needs_norm: whether the global norm of the gradient is wanted.
        exchange_dtype: see `exchange_and_apply.apply_gradients`.
        bucket_bytes: see `exchange_and_apply.apply_gradients`.
        stop_request: see `exchange.all_reduce_accumulated`.
        guard: what may leave the update out, or None.
    """
    if all(g is None for g in local.gradients):
        # As Keras does, which here sees the gradients of one replica's pieces.
        raise ValueError("No gradients provided for any variable.")
    update = _ShardedUpdate(state, local, exchange_dtype, bucket_bytes, stop_request)
    batch = update.batch
    norm = update.global_norm() if needs_norm else None
    gradients = update.clipped()
    flags = None if loss_scale is None else update.finite_flags()
    decision = acceptance.decide(batch, flags, norm, loss_scale, guard)
    if loss_scale is None and exchange_dtype is not None:
        assertion = half_precision_exchange.assertion_of(tf.reduce_all(update.finite_flags()))
        with tf.control_dependencies([assertion]):
            gradients = {i: accumulators.map_values(tf.identity, g) for i, g in gradients.items()}
    update.apply(gradients, decision.is_applied)
    if loss_scale is not None:
        apply.tell_loss_scale(loss_scale, flags)
    return apply.finish(batch, decision, norm)


def _is_dense(gradient: _types.Gradient | None) -> bool:
    return gradient is not None and not isinstance(gradient, tf.IndexedSlices)


def _averaged(
    optimizer: _types.Optimizer, variables: list[_types.KerasVariable]
) -> list[_types.KerasVariable]:
    """The weights that an update averages without updating them."""
    if not optimizer.use_ema:
        return []
    updated = {id(v) for v in variables}
    weights = _keras.sharded_optimizer.weights_of(optimizer)
    return [v for v in weights if id(v) not in updated]


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What all replicas know of dense gradients, by the index of the variable.

    Attributes:
        squares: the square of the norm of the gradient, before clipping.
        non_finite: how many of its values are not finite.
    """

    squares: dict[int, _types.Tensor]
    non_finite: dict[int, _types.Tensor]


class _ShardedUpdate:
    """One update of this replica's pieces.

    Args:
        state: how the optimizer's state is divided.
        local: what this replica accumulated.
        exchange_dtype: see `exchange_and_apply.apply_gradients`.
        bucket_bytes: see `exchange_and_apply.apply_gradients`.
        stop_request: see `exchange.all_reduce_accumulated`.

    Attributes:
        batch: what all replicas accumulated, without dense gradients.
        gradients: this replica's pieces of dense gradients of the loss, and all rows of the
            others, by the index of the variable; not clipped.
    """

    def __init__(
        self,
        state: ShardedState,
        local: AccumulatedGradients,
        exchange_dtype: str | None,
        bucket_bytes: int,
        stop_request: StopRequest | None,
    ) -> None:
        self.state = state
        self.bucket_bytes = bucket_bytes
        self.number_updated = len(local.variables)
        self.variables = [*local.variables, *_averaged(state.optimizer, local.variables)]
        self.local = local
        own = _keras.collectives.replica_id()
        # Of the variables of this update, which may be some of the optimizer's; those that it only
        # averages come last.
        self.pieces = [state.pieces[state.index_of(v)] for v in self.variables]
        self.own: list[Piece | None] = [pieces[own] for pieces in self.pieces]
        self.dense = [i for i, g in enumerate(local.gradients) if _is_dense(g)]
        # Where divided weights lie, whose optimizer may need all of them in one place.
        self.divided = {
            i: v.spans for i, v in enumerate(self.variables) if gathered_weights.is_divided(v)
        }
        self.moved = [i for i, spans in self.divided.items() if list(spans) != self.pieces[i]]
        # What is known first, before the backward pass is over, goes first.
        sums = self._scattered(exchange_dtype)
        # The rows of tables go to all replicas, as does what all must know.
        rest = dataclasses.replace(
            local, gradients=[None if _is_dense(g) else g for g in local.gradients]
        )
        self.batch = exchange.all_reduce_accumulated(
            rest, exchange_dtype, stop_request, bucket_bytes
        )
        of_rows = apply.gradients_of_loss(self.batch)
        self.rows = {i: g for i, g in enumerate(of_rows) if g is not None}
        is_divided_by_weight = exchange_dtype is not None
        self.gradients = self._of_loss(sums, is_divided_by_weight) | self.rows
        self._exchanged_facts: _Facts | None = None

    # --- Exchange -------------------------------------------------------------------

    def _scattered(self, exchange_dtype: str | None) -> dict[int, _types.Tensor]:
        """This replica's pieces of the dense gradients of whole weights, summed over the replicas.

        In half precision, they are divided by the weight of the whole batch.
        """
        whole = [i for i in self.dense if i not in self.divided]
        if not whole:
            return {}
        dtype, weight = self.local.loss.dtype, self.local.weight
        tensors: list[_types.Tensor] = [self.local.gradients[i] for i in whole]
        if exchange_dtype is not None:
            (weight,) = replicas.all_reduce_sum([weight])
        rows = _rows.Rows([self.pieces[i] for i in whole], [self.variables[i].shape for i in whole])

        def sent(values: _types.Tensor) -> _types.Tensor:
            if exchange_dtype is None:
                return tf.cast(values, dtype)
            return half_precision_exchange.narrowed(values, weight, exchange_dtype)

        sent_as = tf.as_dtype(exchange_dtype or dtype)
        scattered = rows.scatter(tensors, self.bucket_bytes, sent, sent_as, dtype)
        return {whole[k]: piece for k, piece in scattered.items()}

    def _of_loss(
        self, sums: dict[int, _types.Tensor], is_divided_by_weight: bool
    ) -> dict[int, _types.Gradient]:
        """This replica's pieces of the dense gradients of the loss.

        Args:
            sums: those of whole weights. Those of divided ones are summed and in pieces already.
            is_divided_by_weight: whether `sums` are divided by the weight of the whole batch.
        """
        dtype, gradients = self.local.loss.dtype, {}
        for i in self.dense:
            if i not in sums and i not in self.divided:
                continue
            gradient = tf.convert_to_tensor(self.local.gradients[i])
            piece = tf.cast(sums.get(i, gradient), dtype)
            if not is_divided_by_weight:
                piece = tf.math.divide_no_nan(piece, self.batch.weight)
            if self.batch.loss_scale is not None:
                piece = tf.math.divide_no_nan(piece, tf.cast(self.batch.loss_scale, dtype))
            gradients[i] = tf.cast(piece, gradient.dtype)
        return gradients

    def _facts(self) -> _Facts:
        """What all replicas know of the dense gradients; exchanged when first asked for."""
        # No `cached_property`: in Python 3.11, one replica would lock the others out.
        if self._exchanged_facts is None:
            self._exchanged_facts = self._exchange_facts()
        return self._exchanged_facts

    def _exchange_facts(self) -> _Facts:
        dtype = self.local.loss.dtype
        squares, non_finite = [], []
        for i in self.dense:
            piece = self.gradients.get(i)
            if piece is None:
                piece = tf.zeros([0], dtype)
            squares.append(tf.reduce_sum(tf.square(tf.cast(piece, dtype))))
            non_finite.append(tf.reduce_sum(tf.cast(~tf.math.is_finite(piece), dtype)))
        facts = tf.zeros([0], dtype)
        if self.dense:
            facts = replicas.all_reduce_sum([tf.stack([*squares, *non_finite])])[0]
        number = len(self.dense)
        return _Facts(
            squares=dict(zip(self.dense, tf.unstack(facts[:number]), strict=True)),
            non_finite=dict(zip(self.dense, tf.unstack(facts[number:]), strict=True)),
        )

    # --- What is known of whole gradients ----------------------------------------------

    def global_norm(self) -> _types.Tensor:
        """The global norm of the gradient, before clipping."""
        dtype = self.local.loss.dtype
        squares = list(self._facts().squares.values())
        for rows in self.rows.values():
            # Rows of one index are one row of the gradient.
            squares.append(tf.cast(tf.reduce_sum(tf.square(tf.convert_to_tensor(rows))), dtype))
        return tf.sqrt(tf.add_n(squares)) if squares else tf.zeros((), dtype)

    def finite_flags(self) -> _types.Tensor:
        """Vector of booleans: for each gradient, whether all its values are finite."""

        def flag(i: int) -> _types.Tensor:
            if i in self._facts().non_finite:
                return tf.equal(self._facts().non_finite[i], 0)
            if i in self.rows:
                return tf.reduce_all(tf.math.is_finite(accumulators.values(self.rows[i])))
            return tf.constant(True)

        return tf.stack([flag(i) for i in range(self.number_updated)])

    def clipped(self) -> dict[int, _types.Gradient]:
        """The gradients, clipped as the optimizer does, by the norms of whole gradients."""
        optimizer = self.state.optimizer
        if not (optimizer.clipnorm or optimizer.global_clipnorm or optimizer.clipvalue):
            return self.gradients
        units = _keras.scaled_updates.clipping_units(optimizer, self.variables)
        multiplied = _keras.scaled_updates.multiplied
        measured = {i: multiplied(g, units[i]) for i, g in self.gradients.items()}
        clipped = self._clipped(measured, units)
        return {i: multiplied(g, 1 / units[i]) for i, g in clipped.items()}

    def _clipped(
        self, gradients: dict[int, _types.Gradient], units: list[float]
    ) -> dict[int, _types.Gradient]:
        """Clips gradients that are measured in these units."""
        optimizer, dtype = self.state.optimizer, self.local.loss.dtype

        def squares() -> dict[int, _types.Tensor]:
            return {i: x * units[i] ** 2 for i, x in self._facts().squares.items()}

        if optimizer.clipnorm and optimizer.clipnorm > 0:
            limit, known = optimizer.clipnorm, squares()

            def by_norm(i: int, gradient: _types.Gradient) -> _types.Gradient:
                if i in self.rows:
                    return _keras.sharded_optimizer.clip_by_norm(optimizer, gradient)
                norm = tf.cast(tf.sqrt(known[i]), gradient.dtype)
                return gradient * limit / tf.maximum(norm, limit)

            return {i: by_norm(i, g) for i, g in gradients.items()}
        if optimizer.global_clipnorm and optimizer.global_clipnorm > 0:
            limit = optimizer.global_clipnorm
            # As Keras does, which takes the rows of a table one by one.
            of_rows = [keras.ops.sum(keras.ops.square(gradients[i])) for i in self.rows]
            total = [*squares().values(), *(tf.cast(x, dtype) for x in of_rows)]
            norm = tf.sqrt(tf.add_n(total)) if total else tf.zeros((), dtype)
            # Not finite if the norm is not.
            scale = limit * tf.minimum(1.0 / norm, 1.0 / limit) + (norm - norm)
            return {i: g * tf.cast(scale, g.dtype) for i, g in gradients.items()}
        if optimizer.clipvalue and optimizer.clipvalue > 0:
            clipped = _keras.sharded_optimizer.clip_by_value(optimizer, list(gradients.values()))
            return dict(zip(gradients, clipped, strict=True))
        return gradients

    # --- Update --------------------------------------------------------------------------

    def apply(
        self, gradients: dict[int, _types.Gradient], is_applied: _types.Tensor | None
    ) -> None:
        """Updates this replica's pieces, and hands them to all replicas.

        Args:
            gradients: what `clipped` returned.
            is_applied: whether the update is made at all; None if it is in any case.
        """
        whole, gradients = self._bring(gradients)
        own = [i for i, piece in enumerate(self.own) if piece is not None]
        own_gradients = [
            self._own_gradient(i, gradients.get(i)) for i in own if i < self.number_updated
        ]
        variables = [self.variables[i] for i in own]
        with tf.control_dependencies([self.batch.weight]):
            # What is only averaged comes last, and has no gradient.
            pairs = itertools.zip_longest(own, own_gradients)
            values = [
                whole.get(i) if i in self.divided else self._own_value(i, g) for i, g in pairs
            ]

        def unchanged() -> list[_types.Tensor]:
            pairs = zip(variables, values, strict=True)
            return [_keras.variables.own_copy(x).read_value() if v is None else v for x, v in pairs]

        def updated() -> list[_types.Tensor]:
            # The optimizer's counter would not depend on the gradients otherwise.
            with tf.control_dependencies([self.batch.weight]):
                return _keras.sharded_optimizer.apply_to_pieces(
                    self.state.optimizer, own_gradients, variables, values
                )

        new = updated() if is_applied is None else tf.cond(is_applied, updated, unchanged)
        new_of = dict(zip(own, new, strict=True))
        self._send_back(new_of, is_applied)
        self._gather(new_of)

    def _bring(
        self, gradients: dict[int, _types.Gradient]
    ) -> tuple[dict[int, _types.Tensor], dict[int, _types.Gradient]]:
        """Brings divided weights, and their gradients, to where they are updated as a whole.

        Returns:
            By the index of the variable, the weights that this replica updates; and the gradients,
            of which those that it was brought are whole.
        """
        weights: dict[int, _types.Tensor] = {}
        for group, dtype, rows in self._moved_rows():
            pieces = {
                k: self._piece_of_divided(i)
                for k, i in enumerate(group)
                if self.divided[i][_keras.collectives.replica_id()] is not None
            }
            for k, value in rows.gather(pieces, self.bucket_bytes, dtype):
                if self.own[group[k]] is not None:
                    weights[group[k]] = value
        brought = dict(gradients)
        with_dense = set(gradients) - set(self.rows)
        for group, dtype, rows in self._moved_rows(with_dense.__contains__):
            pieces = {k: gradients[i] for k, i in enumerate(group)}
            for k, value in rows.gather(pieces, self.bucket_bytes, dtype):
                brought[group[k]] = value
        return weights, brought

    def _send_back(self, new: dict[int, _types.Tensor], is_applied: _types.Tensor | None) -> None:
        """Sends the new values of what `_bring` brought to where the pieces lie."""
        for group, dtype, rows in self._moved_rows():
            tensors = [
                new[i] if i in new else tf.zeros(self.variables[i].shape, dtype) for i in group
            ]
            scattered = rows.scatter(tensors, self.bucket_bytes, tf.identity, dtype, dtype)
            for k, piece in scattered.items():
                if is_applied is not None:
                    piece = tf.where(is_applied, piece, self._piece_of_divided(group[k]))
                _keras.variables.own_copy(self.variables[group[k]]).assign(piece)

    def _piece_of_divided(self, i: int) -> _types.Tensor:
        return _keras.variables.own_copy(self.variables[i]).read_value()

    def _moved_rows(
        self, is_wanted: Callable[[int], bool] = lambda _: True
    ) -> Iterator[tuple[list[int], _types.DType, _rows.Rows]]:
        """Indices of variables that are moved, their dtype, and the rows in which they travel."""
        dtypes = {tf.as_dtype(self.variables[i].dtype) for i in self.moved}
        for dtype in sorted(dtypes, key=lambda dtype: dtype.name):
            group = [
                i
                for i in self.moved
                if tf.as_dtype(self.variables[i].dtype) == dtype and is_wanted(i)
            ]
            shapes = [self.variables[i].shape for i in group]
            yield group, dtype, _rows.Rows([self.divided[i] for i in group], shapes)

    def _own_gradient(self, i: int, gradient: _types.Gradient | None) -> _types.Gradient | None:
        """This replica's piece of a gradient; None if the loss does not depend on the variable."""
        piece = self.own[i]
        assert piece is not None
        if i not in self.rows:
            return gradient
        if isinstance(gradient, tf.IndexedSlices):
            return piece.of_rows(gradient)
        return piece.of(gradient)

    def _own_value(self, i: int, gradient: _types.Gradient | None) -> _types.Tensor:
        """This replica's piece of a weight.

        Read once its gradient is there: all pieces at the beginning of an update would take the
        memory of one more part of the state.
        """
        piece = self.own[i]
        assert piece is not None
        after = [] if gradient is None else [accumulators.values(gradient)]
        with tf.control_dependencies([] if tf.executing_eagerly() else after):
            return piece.of(_keras.variables.own_copy(self.variables[i]).read_value())

    def _gather(self, new: dict[int, _types.Tensor]) -> None:
        """Gives all replicas the new values of the weights."""
        overwrites = self.state.optimizer.use_ema and self.state.optimizer.ema_overwrite_frequency
        changed = [
            i
            for i in range(len(self.variables))
            if i not in self.divided
            and (overwrites or (i < self.number_updated and self.local.gradients[i] is not None))
        ]
        dtypes = {tf.as_dtype(v.dtype) for v in self.variables}
        for dtype in sorted(dtypes, key=lambda dtype: dtype.name):
            group = [i for i in changed if tf.as_dtype(self.variables[i].dtype) == dtype]
            rows = _rows.Rows(
                [self.pieces[i] for i in group], [self.variables[i].shape for i in group]
            )
            own = {k: new[i] for k, i in enumerate(group) if i in new}
            for k, value in rows.gather(own, self.bucket_bytes, dtype):
                _keras.variables.own_copy(self.variables[group[k]]).assign(value)
