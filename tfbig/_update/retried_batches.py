"""Batches that are run again at a lower loss scale, instead of being lost: `retry`.

The graph decides, on all replicas alike, and leaves everything but the scale as it was. That the
batch is run again is up to the host: a loop of the graph in replica context could not call
`merge_call`, which an optimizer needs under MirroredStrategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tfbig import _keras, _types
from tfbig._update.loss_scale import LossScaleState

__all__ = ("NEEDS_TFBIG_STEP", "RetryingStepFunction", "run_until_done")

NEEDS_TFBIG_STEP = (
    "`retry` of DynamicLossScale runs tfbig's `train_step` again, and one of your own would do its "
    "other work twice. Received: retry with a `train_step` of your own, or in "
    "tfbig.apply_gradients. Use retry=False, which skips the update."
)


def run_until_done(state: LossScaleState | None, run: Callable[[], _types.Logs]) -> _types.Logs:
    """Runs an update, and again while its batch must be.

    Args:
        state: the loss scale, or None.
        run: makes the update.

    Returns:
        The logs of the last attempt.
    """
    try:
        logs = run()
        while state is not None and state.is_pending():
            logs = run()
    except BaseException:
        if state is not None:
            # The next batch is another.
            state.give_up()
        raise
    return logs


class RetryingStepFunction(_keras.step_function.StepFunction):
    """A `StepFunction` for training that runs batches again while the loss scale says so."""

    def _run(self, iterator: Iterator[_types.Structure]) -> _types.Logs:
        state: LossScaleState | None = self.model.loss_scale_state
        program = self._program_for(iterator)
        return _keras.step_function.run_batches(
            self.model, iterator, lambda data: run_until_done(state, lambda: program(data))
        )
