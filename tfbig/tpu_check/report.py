"""The lines that `python -m tfbig.tpu_check` prints."""

import math
from collections.abc import Iterator, Mapping, Sequence

import keras

from tfbig._keras.memory import size_of
from tfbig._update import accumulators
from tfbig.tpu_check import checks, hlo
from tfbig.tpu_check.comparison import Comparison
from tfbig.tpu_check.lowering import Compiled
from tfbig.tpu_check.program import Program
from tfbig.tpu_check.slice import Chip, Slice

__all__ = ("compared", "compiled", "exchange", "largest", "memory", "size")


def size(count: float) -> str:
    """Formats a number of bytes in powers of ten, as chips' memories are specified."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def exchange(program: Program) -> str:
    """Describes what the cores exchange for one update."""
    kinds: dict[str, tuple[int, int]] = {}
    for place in checks.collectives(program):
        count, total = kinds.get(place.op.type, (0, 0))
        kinds[place.op.type] = count + 1, total + checks.exchanged_bytes(place.op)
    if not kinds:
        return "nothing"
    return ", ".join(
        f"{count} {kind}, {size(total)} from each core per update"
        for kind, (count, total) in kinds.items()
    )


def memory(model: keras.Model, chip: Chip) -> Iterator[str]:
    """Yields lines on what a core keeps between updates, and on its gradients."""
    parameters = size_of(model.variables)
    optimizer = size_of(model.optimizer.variables)
    gradients = accumulators.size_of(model.trainable_variables)
    known = parameters + optimizer + gradients
    count = f"{sum(math.prod(v.shape) for v in model.variables):,} numbers"
    yield f"model variables          {size(parameters)} ({count})"
    yield f"optimizer                {size(optimizer)}"
    yield f"accumulated gradients    {size(gradients)}"
    yield (
        f"total per core           {size(known)} of {size(chip.hbm)} of HBM, "
        f"{100 * known / chip.hbm:.2g}% ({chip.source})"
    )
    yield "not included: activations, and what the compiler adds; --compile estimates both"


def compiled(outcome: Compiled, tpu_slice: Slice) -> Iterator[str]:
    """Yields lines on what the TPU compiler made of a program."""
    chip = tpu_slice.chip
    if outcome.memory is None:
        reason = (outcome.message or "")[:1000]
        yield f"no: the TPU compiler for {chip.name} rejects it: {reason}"
        return
    yield f"by the TPU compiler for {chip.name}, {tpu_slice.cores} cores; not run on a TPU"
    yield from outcome.errors()
    yield f"exchange   {_compiled_exchange(outcome.collectives)}"
    planned = outcome.memory
    yield (
        f"memory     estimate per core: {size(planned.total)} of {size(chip.hbm)} of HBM, "
        f"{100 * planned.total / chip.hbm:.2g}%"
    )
    yield (
        f"           arguments {size(planned.arguments)}, temporaries {size(planned.temporaries)}, "
        f"new results {size(planned.results - planned.shared)}, program {size(planned.code)}"
    )


def _compiled_exchange(collectives: Sequence[hlo.Collective]) -> str:
    kinds = {c.kind: [d for d in collectives if d.kind == c.kind] for c in collectives}
    described = [
        f"{len(found)} {kind} of {sum(c.arrays for c in found)} arrays, "
        f"{size(sum(c.bytes for c in found))} from each core per update"
        for kind, found in sorted(kinds.items())
    ]
    return ", ".join(described) or "nothing"


def largest(found: Mapping[int, Compiled], share: int, tpu_slice: Slice) -> Iterator[str]:
    """Yields lines on the micro-batch sizes that `largest_that_fits` tried."""
    compiler = f"the TPU compiler for {tpu_slice.chip.name}"
    fitting = [n for n, outcome in found.items() if outcome.fits(tpu_slice.chip)]
    if fitting:
        limit = "all samples of a core" if max(fitting) == share else "among powers of two"
        yield f"micro-batches of up to {max(fitting)}, {limit}, as {compiler} estimates"
    else:
        yield f"no micro-batch, as {compiler} estimates"
    for n, outcome in sorted(found.items()):
        needed = size(outcome.memory.total) if outcome.memory else (outcome.message or "")[:200]
        yield f"{n:>10} samples: {needed}"


def compared(found: Comparison, program: str, cores: int) -> Iterator[str]:
    """Yields lines on a comparison of an update on the CPU with one of the whole batch.

    Args:
        found: The comparison.
        program: Which program ran: "traced" or "lowered".
        cores: Number of cores.
    """
    yield _verdict(found, program, cores)
    first = found.differences[0]
    yield (
        f"largest deviation {first.size:.1e} of the largest weight change, in {first.name} "
        f"(rounding: up to {found.tolerance:.0e}; SGD)"
    )
    if found.apart:
        yield f"NOT the same on all cores: {', '.join(found.apart)}"
    else:
        yield "all cores agree bit for bit"
    if found.skipped is None:
        yield "no update with NaN: the loss cannot become NaN, or the model has no loss scaling"
    elif found.skipped:
        yield f"with loss scaling and NaN on one core, WRONG: {'; '.join(found.skipped[:5])}"
    else:
        yield "NaN on one core: all cores skip the update, weights unchanged bit for bit"


def _verdict(found: Comparison, program: str, cores: int) -> str:
    where = f"on {cores} CPU devices" if program == "lowered" else f"as {cores} cores in one graph"
    update = f"an update of the {program} program, {where},"
    random = f"random numbers of {', '.join(found.random)} cannot be turned off"
    if found.is_equal:
        word = "WRONG" if found.is_wrong else "correct"
        return f"{word}: {update} matches plain Keras on the whole batch"
    if found.is_wrong:
        reason = f"; a possible reason: {random}" if found.random else ""
        return f"WRONG: {update} DIFFERS from plain Keras on the whole batch{reason}"
    return f"not compared: {random}, so {update} need not match plain Keras on the whole batch"
