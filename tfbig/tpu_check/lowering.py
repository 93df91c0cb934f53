"""From the graph of a core's program to the compiler's language, StableHLO, and its result."""

import dataclasses
import json
import pathlib

import numpy as np
import tensorflow as tf

from tfbig.tpu_check import environments, hlo

__all__ = ("Compiled", "Lowered", "Memory", "largest_that_fits", "lower")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the compiler plans for a core, in bytes.

    Attributes:
        arguments: int, data and variables.
        results: int, what is returned.
        shared: int, of the results, those that take the places of arguments.
        temporaries: int, all that is needed in between, besides the fast memory of the core.
        code: int, the program.
    """

    arguments: int
    results: int
    shared: int
    temporaries: int
    code: int

    @property
    def total(self):
        """int, all together."""
        return self.arguments + self.results - self.shared + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler for TPUs made of a program.

    Attributes:
        message: str, why it refuses; None if it does not.
        memory: `Memory`; None if it refuses.
        collectives: list of `hlo.Collective`.
    """

    message: str | None
    memory: Memory | None = None
    collectives: list = dataclasses.field(default_factory=list)

    def errors(self):
        """List of str, what is wrong with it."""
        refused = [f"the compiler refuses: {self.message}"] if self.message else []
        return refused + [
            f"{c.kind} {c.name!r} stands inside of a {' and a '.join(c.inside)}: cores must "
            "exchange once per update, outside of both"
            for c in self.collectives
            if c.inside
        ]

    def fits(self, chip):
        """Whether it is compiled, and what is planned is in the memory of a chip."""
        return self.memory is not None and self.memory.total <= chip.hbm


class Lowered:
    """A core's program in StableHLO, in a directory.

    Args:
        directory: Path, with the files that `lower` writes.
        function: `PureFunction`.
        made: `Environments`.
    """

    def __init__(self, directory, function, made):
        self.directory = pathlib.Path(directory)
        self.function = function
        self._environments = made

    def compile(self, tpu_slice):
        """Compiles it for a slice; returns `Compiled`.

        Raises:
            ExternalError: If the compiler does not come to a result, as libtpu is in use.
        """
        try:
            self._environments.run(
                "with_jax", "compile", self.directory, tpu_slice, tpu_slice.cores
            )
        except environments.ExternalError as e:
            # What JAX raises while libtpu is in use says nothing about the program.
            if "JaxRuntimeError" not in str(e) or environments.is_in_use(e.output):
                raise
            return Compiled(str(e).partition("JaxRuntimeError: ")[2])
        sizes = json.loads((self.directory / "memory.json").read_text())
        text = (self.directory / "optimized.hlo").read_text()
        return Compiled(None, Memory(**sizes), hlo.collectives(text))

    def run(self, values):
        """Runs it on CPU devices, one for each core.

        Args:
            values: list of arrays `(cores, ...)`, one for each argument.

        Returns:
            List of arrays `(cores, ...)`, one for each result.
        """
        inputs, outputs = self.directory / "inputs.npz", self.directory / "outputs.npz"
        np.savez(inputs, **{str(i): value for i, value in enumerate(values)})
        cores = len(values[0])
        self._environments.run("with_jax", "run", self.directory, cores, inputs, outputs)
        with np.load(outputs) as arrays:
            found = [arrays[str(i)] for i in range(len(arrays.files))]
        # A file of numpy forgets what bfloat16 is, the one kind that numpy does not know here.
        known = tf.bfloat16.as_numpy_dtype
        return [array.view(known) if array.dtype.kind == "V" else array for array in found]


def lower(function, directory, made):
    """Lowers a core's program through TensorFlow's kernels for TPUs.

    Args:
        function: `PureFunction`.
        directory: Path, for the files: `graph.pb`, `signature.json`, `module.bin`.
        made: `Environments`.

    Returns:
        A `Lowered`.

    Raises:
        ExternalError: If TensorFlow refuses; says what it says.
    """
    directory = pathlib.Path(directory)
    export(function, directory)
    made.run("with_tensorflow", directory)
    return Lowered(directory, function, made)


def export(function, directory):
    """Writes the graph of a pure function, and what its arguments and results are."""
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


def largest_that_fits(compiled_with, share, tpu_slice, known=()):
    """Looks for the largest micro-batch that fits, among powers of two and all of the share.

    Args:
        compiled_with: function of a micro-batch size that returns `Compiled`.
        share: int, samples of a core.
        tpu_slice: `Slice`.
        known: dict of `Compiled` by micro-batch size, what was compiled before.

    Returns:
        Dict of `Compiled` by micro-batch size, of those among these sizes that were compiled; at
        most the logarithm of their number, besides what is known.
    """
    sizes = sorted({2**i for i in range(share.bit_length()) if 2**i < share} | {share})
    # A micro-batch is at most all samples of a core.
    found = {min(size, share): outcome for size, outcome in dict(known).items()}
    low, high = 0, len(sizes)
    # All below `low` fit, none from `high` on does.
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
