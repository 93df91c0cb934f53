"""Flags for training that takes long: batches that grow, spikes, and how backups are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    import keras

BATCH_GROWTH = flags.DEFINE_list(
    "batch_growth",
    [],
    "Effective batches from later updates on, counted from 0, as 500:64,900:128; until then it is "
    "--batch_size.",
)
SPIKE_GUARD = flags.DEFINE_boolean(
    "spike_guard",
    False,
    "Skip updates whose gradient or loss is 5 times what is usual, and take training back after 5 "
    "of them in a row, or when the loss has doubled.",
)
INJECT_SPIKE = flags.DEFINE_integer(
    "inject_spike",
    None,
    "Flip the signs of all weights before this update, counted from 0, to see what --spike_guard "
    "does.",
    lower_bound=1,
)
BACKUP_ON_BACKGROUND = flags.DEFINE_boolean(
    "backup_on_background", False, "Write backups while training continues."
)
KEEP_BACKUPS = flags.DEFINE_integer("keep_backups", 1, "Backups that stay.", lower_bound=1)


def _growth(texts: list[str]) -> dict[int, int]:
    return {int(update): int(size) for update, size in (text.split(":") for text in texts)}


@flags.validator("batch_growth", "it must be UPDATE:SIZE,..., of integers >= 1, updates rising")
def _is_growth(texts: list[str]) -> bool:
    try:
        growth = _growth(texts)
    except ValueError:
        return False
    rises = list(growth) == sorted(growth) and len(growth) == len(texts)
    return rises and min([1, *growth, *growth.values()]) == 1


def sizes(batch_size: int) -> dict[int, int]:
    """Effective batches by the update from which on they hold; update 0 has `batch_size`."""
    return {0: batch_size} | _growth(BATCH_GROWTH.value)


def updates(samples: int, epochs: int, batch_size: int) -> int:
    """Updates of a whole run."""
    count, changes = 0, sizes(batch_size)
    size = batch_size
    for _ in range(epochs):
        left = samples
        while left > 0:
            size = changes.get(count, size)
            left -= size
            count += 1
    return count


def callbacks(batch_size: int) -> list[keras.callbacks.Callback]:
    """What the flags ask for, but for backups."""
    import keras

    import tfbig

    class Spike(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types.
        """Flips the signs of the weights before an update."""

        def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
            # Also those that were skipped and taken back, so that the spike comes only once.
            model = self.model
            tried = int(model.optimizer.iterations.numpy())
            tried += model.skipped_updates + model.left_out_updates
            if tried <= INJECT_SPIKE.value < tried + model.steps_per_execution:
                for variable in model.trainable_variables:
                    variable.assign(-variable)

    wanted: list[keras.callbacks.Callback] = []
    if BATCH_GROWTH.value:
        wanted.append(tfbig.callbacks.BatchSizeSchedule(sizes(batch_size)))
    if SPIKE_GUARD.value:
        wanted.append(tfbig.callbacks.SpikeGuard(loss=True, rollback_factor=2))
    if INJECT_SPIKE.value:
        wanted.append(Spike())
    return wanted
