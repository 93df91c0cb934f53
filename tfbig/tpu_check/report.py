"""The lines that `python -m tfbig.tpu_check` prints."""

import math

from tfbig._keras.memory import size_of
from tfbig._update import accumulators
from tfbig.tpu_check import checks

__all__ = ("compared", "compiled", "exchange", "largest", "memory", "size")


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
    parameters = size_of(model.variables)
    optimizer = size_of(model.optimizer.variables)
    gradients = accumulators.size_of(model.trainable_variables)
    known = parameters + optimizer + gradients
    count = f"{sum(math.prod(v.shape) for v in model.variables):,} numbers"
    yield f"variables of the model   {size(parameters)} ({count})"
    yield f"optimizer                {size(optimizer)}"
    yield f"accumulated gradients    {size(gradients)}"
    yield (
        f"of a core, together      {size(known)} of {size(chip.hbm)} of HBM, "
        f"{100 * known / chip.hbm:.2g}% ({chip.source})"
    )
    yield "besides: activations, and what the compiler adds, which it knows when it has compiled"


def compiled(outcome, tpu_slice):
    """Lines on what the compiler for TPUs made of a program, a `Compiled`."""
    chip = tpu_slice.chip
    if outcome.message:
        yield f"no, refused by the TPU compiler for {chip.name}: {outcome.message[:1000]}"
        return
    yield f"by the TPU compiler for {chip.name}, {tpu_slice.cores} cores; it did not run on one"
    yield from outcome.errors()
    found = outcome.collectives
    kinds = sorted({c.kind for c in found})
    yield "exchange   " + (
        ", ".join(
            f"{sum(c.kind == kind for c in found)} {kind} of "
            f"{sum(c.arrays for c in found if c.kind == kind)} arrays, "
            f"{size(sum(c.bytes for c in found if c.kind == kind))} from each core per update"
            for kind in kinds
        )
        or "nothing"
    )
    memory = outcome.memory
    yield (
        f"memory     of a core, an estimate: {size(memory.total)} of {size(chip.hbm)} of HBM, "
        f"{100 * memory.total / chip.hbm:.2g}%"
    )
    yield (
        f"           arguments {size(memory.arguments)}, temporaries {size(memory.temporaries)}, "
        f"new results {size(memory.results - memory.shared)}, program {size(memory.code)}"
    )


def largest(found, share, tpu_slice):
    """Lines on the micro-batch sizes that were tried, of `largest_that_fits`."""
    fitting = [n for n, outcome in found.items() if outcome.fits(tpu_slice.chip)]
    if fitting:
        most = "all samples of a core" if max(fitting) == share else "of powers of two"
        yield f"micro-batches of up to {max(fitting)}, {most}: an estimate by the TPU compiler"
    else:
        yield f"no micro-batch, by the TPU compiler for {tpu_slice.chip.name}"
    for n, outcome in sorted(found.items()):
        needed = size(outcome.memory.total) if outcome.memory else outcome.message[:200]
        yield f"{n:>10} samples: {needed}"


def compared(found, what, cores):
    """Lines on a `Comparison` of an update on the CPU with one of the whole batch."""
    first = found.differences[0]
    where = f"on {cores} CPU devices" if what == "lowered" else f"as {cores} cores in one graph"
    update = f"an update of the {what} program, {where}"
    random = f"random numbers of {', '.join(found.random)} cannot be turned off"
    if found.is_equal:
        word = "WRONG" if found.is_wrong else "right"
        yield f"{word}: {update}, equals one of the whole batch in Keras"
    elif found.is_wrong:
        reason = f", which may be: {random}" if found.random else ""
        yield f"WRONG: {update}, DIFFERS from one of the whole batch in Keras{reason}"
    else:
        yield f"not compared: {random}, so {update}, need not be one of the whole batch in Keras"
    yield (
        f"largest deviation {first.size:.1e} of the largest change of a weight, in {first.name} "
        f"(rounding: up to {found.tolerance:.0e}; SGD)"
    )
    if found.apart:
        yield f"NOT the same on all cores: {', '.join(found.apart)}"
    else:
        yield "all cores agree, to the bit"
    if found.skipped is None:
        yield "no update with NaN: nothing in the data can be, or the model has no loss scaling"
    elif found.skipped:
        yield f"with loss scaling, and NaN on one core, WRONG: {'; '.join(found.skipped[:5])}"
    else:
        yield "NaN on one core: skipped by all, weights unchanged to the bit"
