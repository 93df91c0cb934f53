"""A TPU slice: so many chips of a kind, in a grid."""

import dataclasses
import math
import re

from tfbig import errors

__all__ = ("CHIPS", "Slice")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip. To TensorFlow each is one core.

    Attributes:
        name: str, as in names of topologies.
        hbm: int, bytes of its memory.
        dimensions: int, of the grid in which chips are connected.
        source: str, address of the page that says so.
    """

    name: str
    hbm: int
    dimensions: int
    source: str


CHIPS = {
    chip.name: chip
    for chip in (
        # The pages say GB. Read as powers of ten, no more is promised than there is.
        Chip("v5e", 16 * 10**9, 2, "https://cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", 95 * 10**9, 3, "https://cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", 32 * 10**9, 2, "https://cloud.google.com/tpu/docs/v6e"),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of a kind, in a grid.

    Attributes:
        chip: `Chip`.
        shape: tuple of ints, chips along each dimension.
    """

    chip: Chip
    shape: tuple

    @classmethod
    def parse(cls, name):
        """The slice of a name such as "v5e:2x2" or "v5p:2x2x1".

        Raises:
            InvalidOptionError: If there is none of this name.

        Example:

        >>> Slice.parse("v5e:2x4").cores
        8
        """
        match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", str(name))
        chip = match and CHIPS.get(match[1])
        shape = tuple(map(int, match[2].split("x"))) if match else ()
        if not chip or len(shape) != chip.dimensions or not all(shape):
            examples = ", ".join(f"{c.name}:{'x'.join('2' * c.dimensions)}" for c in CHIPS.values())
            raise errors.InvalidOptionError(
                f"A topology must be a chip and its grid, such as {examples}. Received: {name!r}."
            )
        return cls(chip, shape)

    @property
    def cores(self):
        """int, how many cores there are."""
        return math.prod(self.shape)

    @property
    def mesh_shape(self):
        """The four numbers of a `tf.tpu.experimental.Topology`: x, y, z, cores of a chip."""
        return (*self.shape, *(1,) * (3 - len(self.shape)), 1)

    def __str__(self):
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
