"""Measures tfbig against plain Keras, and against the alternatives to it.

Every row runs in a process of its own, the rows in turn, several times over; the table has
medians. Time is that of one effective batch after warm-up, memory the largest resident size
of the process. The ratio is to plain Keras at the micro-batch, which applies the optimizer
once per micro-batch. Seconds say little on another machine, so beside each row is its floor: the
time of the matrix products and convolutions of a micro-batch alone, forward and backward, measured
in the same process after the row, and how many times as long the row takes. Below the table, one
line for each row of tfbig that is beaten says by what, and in what.

Without --gradient_accumulation_steps, --batch_size is split into micro-batches of
--micro_batch_size samples. With it, --batch_size is split into so many; or, if
--micro_batch_size is given and --batch_size is not, the micro-batch stays and the effective
batch grows:

  benchmark.py --models=gpt --gradient_accumulation_steps=1,4,16,64 --micro_batch_size=8

For several numbers of micro-batches there are also tables of memory, samples/s and start.

With --peers=torch,jax, it also measures the same models in PyTorch with Hugging Face Accelerate,
and in Keras on JAX with its built-in accumulation, in environments that are made on demand.

All use --threads threads for an operation, and on Linux as many cores. Elsewhere JAX may
use more: it has no setting for that. The row pipeline divides the threads between its two stages.

With --in_turn, the rows of a model run in one process, an update of each in turn. The ratios are
then meaningful on a shared machine too, since other load slows all rows alike.

With --hardware=gpu, the rows of Keras and tfbig run on the first GPU, and memory is what
TensorFlow's allocator has given there at most.

With --network, tfbig runs on --network_hosts workers that a narrow network joins: samples and bytes
sent against accumulation that exchanges each micro-batch. This needs Linux, iproute2 and
the right to make network namespaces, which root has; elsewhere one line says that it is skipped,
and the exit code is 0.

With --scaling, nothing is measured: tables say what an update would take on up to 4,096 replicas,
computing and exchange, for several networks and numbers of micro-batches.

With --tuners, searches without models: how good they get, and how long a suggestion takes. With
--tables as well, searches in tables of models that others have measured, and in learning curves.
The files of --json and --markdown are then written after each row.

Exit code 1 says that a row has failed; the table says which.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import platform
import sys
from importlib import metadata
from typing import Any

import command_line
from absl import flags
from benchmarks import markdown, modes, network, peers, provenance, rows, settings, tables

PROGRAM = "benchmark.py"
_PACKAGES = ("tensorflow", "keras", "tfbig")
# What some samplers need.
_SAMPLING = ("cmaes", "hyperopt", "scipy", "torch")

flags.adopt_module_key_flags(settings)


def _benchmark() -> int:
    if settings.HARDWARE.value == "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    if settings.ROW.value is not None:
        measured = network.measure(settings.steps_list(), *settings.numbers())
        pathlib.Path(settings.ROW.value).write_text(json.dumps(measured))
        return 0
    # Before anything is measured, since the commit may change meanwhile.
    origin = _provenance() if settings.MARKDOWN.value is not None else None
    try:
        outcome = modes.measure(__file__, lambda found: _write(found, origin))
    except network.UnavailableError as e:
        print(f"{PROGRAM}: --network skipped: {e}", file=sys.stderr)
        return 0
    except (RuntimeError, rows.DifferentModelsError, tables.UnavailableError) as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return 1
    _write(outcome, origin)
    return 0 if outcome.is_complete else 1


def _write(outcome: modes.Outcome, origin: provenance.Provenance | None) -> None:
    """Writes the files that were asked for, with what is measured so far."""
    if settings.JSON.value is not None:
        document = json.dumps(_document(outcome), indent=2)
        pathlib.Path(settings.JSON.value).write_text(document + "\n")
    if origin is not None:
        markdown.write(settings.MARKDOWN.value, origin, outcome.tables, outcome.notes)


def _provenance() -> provenance.Provenance:
    packages = _PACKAGES
    if settings.TUNERS.value:
        packages += ("keras-tuner", "optuna")
    if settings.TABLES.value:
        packages += tuple(p for p in _SAMPLING if importlib.util.find_spec(p))
    return provenance.collect(__file__, packages, settings.PEERS.value)


def _document(outcome: modes.Outcome) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in _PACKAGES}
    requirements = {peer: peers.requirements(peer) for peer in settings.PEERS.value}
    return {
        "environment": {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            **versions,
            **requirements,
        },
        "settings": outcome.settings | {"runs": settings.RUNS.value, "steps": settings.STEPS.value},
        "rows": outcome.rows,
    }


if __name__ == "__main__":
    command_line.run(PROGRAM, _benchmark, "nothing is written")
