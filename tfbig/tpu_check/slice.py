"""A TPU slice: chips of one kind, connected in a grid."""

import dataclasses
import math
import re

from tfbig import errors

__all__ = ("CHIPS", "Slice")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip. TensorFlow sees each chip as one core.

    Attributes:
        name: As in the names of topologies.
        hbm: Bytes of its memory.
        dimensions: Number of dimensions of the grid that connects the chips.
        source: Address of the page that documents it.
    """

    name: str
    hbm: int
    dimensions: int
    source: str


CHIPS = {
    chip.name: chip
    for chip in (
        # The pages say GB. Powers of ten promise no more than there is.
        Chip("v5e", 16 * 10**9, 2, "https://cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", 95 * 10**9, 3, "https://cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", 32 * 10**9, 2, "https://cloud.google.com/tpu/docs/v6e"),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind, connected in a grid.

    Attributes:
        chip: The kind of chip.
        shape: Number of chips along each dimension.
    """

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Slice":
        """Returns the slice with a name such as "v5e:2x2" or "v5p:2x2x1".

        Raises:
            InvalidOptionError: If there is no such slice.

        Example:

        >>> Slice.parse("v5e:2x4").cores
        8
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", str(name))
        chip = CHIPS.get(match[1]) if match else None
        shape = tuple(map(int, match[2].split("x"))) if match else ()
        if not chip or len(shape) != chip.dimensions or not all(shape):
            examples = ", ".join(f"{c.name}:{'x'.join('2' * c.dimensions)}" for c in CHIPS.values())
            raise errors.InvalidOptionError(
                f"A topology must be a chip and its grid, such as {examples}. Received: {name!r}."
            )
        return cls(chip, shape)

    @property
    def cores(self) -> int:
        """The number of cores."""
        return math.prod(self.shape)

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        """The numbers of a `tf.tpu.experimental.Topology`: x, y, z, cores per chip."""
        return (*self.shape, *(1,) * (3 - len(self.shape)), 1)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
