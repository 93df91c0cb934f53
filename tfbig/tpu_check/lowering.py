"""Takes the graph of a core's program to StableHLO, the compiler's input, and compiles it."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfbig.tpu_check import environments, hlo
from tfbig.tpu_check._types import Array
from tfbig.tpu_check.pure import PureFunction
from tfbig.tpu_check.slice import Chip, Slice

__all__ = ("Compiled", "Lowered", "Memory", "largest_that_fits", "lower")


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory that the compiler plans for a core, in bytes.

    Attributes:
        arguments: Data and variables.
        results: What the program returns.
        shared: Results that overwrite arguments.
        temporaries: Everything in between, without the core's fast memory.
        code: The program itself.
    """

    arguments: int
    results: int
    shared: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The sum, in which shared memory counts once."""
        return self.arguments + self.results - self.shared + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the TPU compiler made of a program.

    Attributes:
        message: Why it rejected the program; None if it did not.
        memory: The memory of a core; None if it rejected the program.
        collectives: The collectives of the compiled program.
    """

    message: str | None
    memory: Memory | None = None
    collectives: list[hlo.Collective] = dataclasses.field(default_factory=list)

    def errors(self) -> list[str]:
        """Returns what is wrong with it."""
        rejected = [] if self.message is None else [f"the compiler rejects it: {self.message}"]
        return rejected + [
            f"{c.kind} {c.name!r} is inside a {' and a '.join(c.inside)}: cores must exchange once "
            "per update, outside both"
            for c in self.collectives
            if c.inside
        ]

    def fits(self, chip: Chip) -> bool:
        """Returns whether it compiled, and its memory fits a chip."""
        return self.memory is not None and self.memory.total <= chip.hbm


class Lowered:
    """A core's program in StableHLO, in a directory.

    Args:
        directory: Directory with the files that `lower` writes.
        function: The program.
        python: The environments that compile and run it.
    """

    def __init__(
        self, directory: pathlib.Path, function: PureFunction, python: environments.Environments
    ) -> None:
        self.directory = pathlib.Path(directory)
        self.function = function
        self._python = python

    def compile(self, tpu_slice: Slice) -> Compiled:
        """Compiles it for a slice.

        Raises:
            ExternalError: If the compiler gives no verdict, for example because libtpu is in use.
        """
        try:
            self._python.run("with_jax", "compile", self.directory, tpu_slice, tpu_slice.cores)
        except environments.ExternalError as e:
            # What JAX raises while libtpu is in use says nothing about the program.
            if "JaxRuntimeError" not in str(e) or environments.is_in_use(e.output):
                raise
            return Compiled(str(e).partition("JaxRuntimeError: ")[2])
        sizes = json.loads((self.directory / "memory.json").read_text())
        text = (self.directory / "optimized.hlo").read_text()
        return Compiled(None, Memory(**sizes), hlo.collectives(text))

    def run(self, values: Sequence[Array]) -> list[Array]:
        """Runs it on CPU devices, one per core.

        Args:
            values: One array of shape `(cores, ...)` per argument.

        Returns:
            One array of shape `(cores, ...)` per result.
        """
        inputs, outputs = self.directory / "inputs.npz", self.directory / "outputs.npz"
        # `Any`: `savez` has other keyword arguments, too.
        arrays: dict[str, Any] = {str(i): value for i, value in enumerate(values)}
        np.savez(inputs, **arrays)
        cores = len(values[0])
        self._python.run("with_jax", "run", self.directory, cores, inputs, outputs)
        with np.load(outputs) as stored:
            results = [stored[str(i)] for i in range(len(stored.files))]
        # A numpy file loses the dtype bfloat16, the only one here that numpy lacks.
        bfloat16 = tf.bfloat16.as_numpy_dtype
        return [array.view(bfloat16) if array.dtype.kind == "V" else array for array in results]


def lower(
    function: PureFunction, directory: pathlib.Path, python: environments.Environments
) -> Lowered:
    """Lowers a core's program with TensorFlow's kernels for TPUs.

    Args:
        function: The program.
        directory: Directory for the files `graph.pb`, `signature.json` and `module.bin`.
        python: The environments that lower, compile and run it.

    Raises:
        ExternalError: If TensorFlow rejects the program; it quotes TensorFlow.
    """
    directory = pathlib.Path(directory)
    export(function, directory)
    python.run("with_tensorflow", directory)
    return Lowered(directory, function, python)


def export(function: PureFunction, directory: pathlib.Path) -> None:
    """Writes the graph of a pure function, and a description of its arguments and results."""
    specs = [argument.spec for argument in function.arguments]
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    graph = concrete.graph.as_graph_def()
    (directory / "graph.pb").write_bytes(graph.SerializeToString(deterministic=True))
    signature = {
        "arguments": [
            {
                "name": argument.name,
                "kind": argument.kind,
                "shape": argument.spec.shape.as_list(),
                "dtype": argument.spec.dtype.name,
                "tensor": tensor.name,
            }
            for argument, tensor in zip(function.arguments, concrete.inputs, strict=True)
        ],
        "results": [
            {"name": result.name, "argument": result.argument, "tensor": tensor.name}
            for result, tensor in zip(function.results, concrete.outputs, strict=True)
        ],
    }
    (directory / "signature.json").write_text(json.dumps(signature, indent=1))


def largest_that_fits(
    compiled_with: Callable[[int], Compiled],
    share: int,
    tpu_slice: Slice,
    known: Mapping[int, Compiled] | None = None,
) -> dict[int, Compiled]:
    """Looks for the largest micro-batch that fits: a power of two, or the whole share.

    Args:
        compiled_with: Compiles a program with a micro-batch size.
        share: Samples per core.
        tpu_slice: The slice.
        known: Earlier results, by micro-batch size.

    Returns:
        The results of the candidates that were compiled or known, by micro-batch size. A binary
        search compiles at most the logarithm of their number.
    """
    sizes = sorted({2**i for i in range(share.bit_length()) if 2**i < share} | {share})
    # A micro-batch is at most a core's share.
    found = {min(size, share): outcome for size, outcome in (known or {}).items()}
    low, high = 0, len(sizes)
    # All sizes before `low` fit; none from `high` on does.
    while low < high:
        middle = (low + high) // 2
        size = sizes[middle]
        if size not in found:
            found[size] = compiled_with(size)
        if found[size].fits(tpu_slice.chip):
            low = middle + 1
        else:
            high = middle
    return {size: found[size] for size in sizes if size in found}
