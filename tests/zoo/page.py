"""Writes docs/zoo.md, the table of the zoo, from the results of its tests."""

import collections
import pathlib
import re

from tests.zoo.program import PROGRAMS

PATH = pathlib.Path(__file__).parents[2] / "docs" / "zoo.md"

# Name of a program -> (optimizer, strategy) -> the largest deviation from plain Keras.
FOUND = collections.defaultdict(dict)

HEAD = """# Zoo

The tests train these small programs with tfbig and with plain Keras, on random data, and compare
the results. To check your own model, use `tfbig.check_equivalence`:

```python
import keras
import numpy as np

import tfbig

x = keras.Input((5,), dtype="int32")
h = keras.layers.Embedding(9, 4)(x)
h = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(h))
model = tfbig.Model(x, h, gradient_accumulation_steps=3)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
rng = np.random.default_rng(0)
tokens, classes = rng.integers(0, 9, (13, 5)), rng.integers(0, 3, 13)
assert tfbig.check_equivalence(model, tokens, classes).is_equivalent
```

Each program has 13 samples in batches of 6, so the last batch has one sample, and computes in
float64. The numbers are the largest absolute deviation of any weight, optimizer variable or value
of the history from plain Keras with the whole batch on one device. The column "cut" has three
micro-batches on one device; "2 replicas" has two micro-batches on each of two replicas. Each number
is the larger of SGD's and the other optimizer's. The cut model is also saved, loaded, trained
further, and compared again.

`TFBIG_STORE_ZOO=1 python -m pytest tests/zoo --slow` writes this page.

| program | stands for | exercises | optimizer | cut | 2 replicas | note |
|---|---|---|---|---|---|---|
"""


def store():
    """Writes the page from the results of this process, and keeps stored ones of other programs."""
    stored = rows() if PATH.exists() else {}
    missing = set(PROGRAMS) - set(FOUND) - set(stored)
    assert not missing, f"There are no results for {sorted(missing)}."
    PATH.write_text(HEAD + "".join(_row(p, stored) for p in PROGRAMS.values()))


def _row(program, stored):
    if program.name in FOUND:
        deviations = [_largest(program, strategy) for strategy in ("default", "mirrored_2")]
    else:
        deviations = stored[program.name][3:5]
    told = [f"`{program.name}`", program.shape, program.exercises, program.adaptive]
    return f"| {' | '.join([*told, *deviations, program.note])} |\n"


def _largest(program, strategy):
    found = [d for (_, s), d in FOUND[program.name].items() if s == strategy]
    return f"{max(found):.0e}" if program.is_exact and found else ""


def rows():
    """Maps the name of each program on the stored page to its cells."""
    found = re.findall(r"^\| `(\w+)` \| (.*) \|$", PATH.read_text(), flags=re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found}
