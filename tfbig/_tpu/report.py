"""The lines that `python -m tfbig.tpu_check` prints."""

import math

from tfbig import _accumulators, _memory
from tfbig._tpu import checks

__all__ = ("exchange", "memory", "size")


def size(count):
    """A number of bytes, as it is read: powers of ten, as memories of chips are told."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def exchange(program):
    """What the cores exchange for one update, in words."""
    found = checks.collectives(program)
    kinds: dict[str, tuple[int, int]] = {}
    for place in found:
        count, total = kinds.get(place.op.type, (0, 0))
        kinds[place.op.type] = count + 1, total + checks.exchanged_bytes(place.op)
    if not kinds:
        return "nothing"
    return ", ".join(
        f"{count} {kind}, {size(total)} from each core per update"
        for kind, (count, total) in kinds.items()
    )


def memory(model, chip):
    """Lines on what a core keeps between updates, and on gradients, beside its memory."""
    parameters = _memory.size_of(model.variables)
    optimizer = _memory.size_of(model.optimizer.variables)
    gradients = _accumulators.size_of(model.trainable_variables)
    known = parameters + optimizer + gradients
    count = f"{sum(math.prod(v.shape) for v in model.variables):,} numbers"
    yield f"variables of the model   {size(parameters)} ({count})"
    yield f"optimizer                {size(optimizer)}"
    yield f"accumulated gradients    {size(gradients)}"
    yield (
        f"of a core, together      {size(known)} of {size(chip.hbm)} of HBM, "
        f"{100 * known / chip.hbm:.2g}% ({chip.source})"
    )
    yield "not known, as nothing was compiled: activations, and what the compiler adds"
