"""What a search shows: a line for each trial, or a table in a notebook; and a summary."""

import html
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from keras_tuner.src.engine import trial as kt_trial

from tfbig.tuners import _tuner_types
from tfbig.tuners._oracle import StudyOracle

if TYPE_CHECKING:
    from tfbig.tuners import _tuner_results

__all__ = ("Progress", "html_table", "print_summary", "shown", "shown_score", "status_of")

_STATUS = kt_trial.TrialStatus

# IPython's, which need not be installed: a shell, and the handle of an output.
_Shell: TypeAlias = Any
_Handle: TypeAlias = Any

# KerasTuner's terms, and those of the field.
_WORDS = {
    _STATUS.COMPLETED: "complete",
    _STATUS.STOPPED: "pruned",
    _STATUS.INVALID: "infeasible",
    _STATUS.FAILED: "failed",
    _STATUS.RUNNING: "running",
}


def status_of(trial: _tuner_types.Trial) -> str:
    """How a trial ended: "complete", "pruned", "infeasible", "failed" or "running"."""
    return _WORDS[trial.status]


def shown(value: object) -> str:
    """A value of a hyperparameter in a few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        inner = ", ".join(map(_shown_within, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown_within, value))}]"
    return str(value)


def _shown_within(value: object) -> str:
    return repr(value) if isinstance(value, str) else shown(value)


def shown_score(score: float | Iterable[float]) -> str:
    """The values of the objectives in a few characters."""
    return ", ".join(map(shown, score)) if isinstance(score, Iterable) else shown(score)


def html_table(
    header: Sequence[str] | None,
    rows: Iterable[Sequence[object]],
    marked: Collection[int] = (),
) -> str:
    """A table as HTML, with all cells escaped.

    Args:
        header: None if the first cell of each row is its name.
        rows: The cells of each row.
        marked: Indices of the rows with the class "best".
    """

    def line(tags: Sequence[str], cells: Sequence[object]) -> str:
        pairs = zip(tags, cells, strict=True)
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for tag, cell in pairs)

    first = "td" if header else "th"
    lines = [f"<tr>{line(['th'] * len(header), header)}</tr>"] if header else []
    for i, row in enumerate(rows):
        start = '<tr class="best">' if i in marked else "<tr>"
        lines.append(f"{start}{line([first] + ['td'] * (len(row) - 1), row)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


# The table of a notebook shows so many of the last trials, and the best one.
_SHOWN_TRIALS = 20


def _notebook() -> _Shell | None:
    """The shell of a notebook; None in a terminal."""
    # Not imported here: in a notebook it already is.
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


class _Table:
    """A table of the trials, below the notebook cell that searches."""

    def __init__(self, oracle: StudyOracle) -> None:
        self._oracle = oracle
        self._cell: int | None = None
        self._handle: _Handle = None

    def show(self, shell: _Shell, seconds: dict[str, float]) -> None:
        from IPython import display as ipython_display

        display: Any = ipython_display  # It has no types.
        table = display.HTML(self._made(seconds))
        if self._cell != shell.execution_count:
            # The table below an earlier cell does not change.
            self._cell = shell.execution_count
            self._handle = display.display(table, display_id=True)
        else:
            self._handle.update(table)

    def _made(self, seconds: dict[str, float]) -> str:
        trials = list(self._oracle.trials.values())
        best = {t.trial_id for t in self._oracle.get_best_trials(1)}
        listed = [t for t in trials[:-_SHOWN_TRIALS] if t.trial_id in best]
        listed += trials[-_SHOWN_TRIALS:]
        names = list(dict.fromkeys(n for t in listed for n in t.hyperparameters.values))
        rows = []
        for trial in listed:
            values = trial.hyperparameters.values
            score = "" if trial.score is None else shown_score(trial.score)
            took = f"{seconds[trial.trial_id]:.1f}" if trial.trial_id in seconds else ""
            cells = [shown(values[n]) if n in values else "" for n in names]
            rows.append([trial.trial_id, status_of(trial), score, took, *cells])
        header = ["trial", "status", self._oracle.objective_names, "seconds", *names]
        marked = {i for i, t in enumerate(listed) if t.trial_id in best}
        most = self._oracle.max_trials
        ended = sum(t.status != _STATUS.RUNNING for t in trials)
        count = f"{ended} of {most or 'any number of'} trials have ended"
        style = "<style>tr.best { font-weight: bold; }</style>"
        return f"{style}<p>{count}</p>\n{html_table(header, rows, marked)}"


class Progress:
    """Prints a line when a trial ends; in a notebook, keeps a table up to date.

    Attributes:
        verbose: 0 prints nothing.
    """

    def __init__(self, oracle: StudyOracle) -> None:
        self.verbose: int | str = 1
        self._oracle = oracle
        self._began: dict[str, float] = {}
        # The duration of trials that ended in this process.
        self._seconds: dict[str, float] = {}
        self._table = _Table(oracle)

    def on_trial_begin(self, trial: _tuner_types.Trial) -> None:
        self._began[trial.trial_id] = time.monotonic()
        if self.verbose and (shell := _notebook()):
            self._table.show(shell, self._seconds)

    def on_trial_end(self, trial: _tuner_types.Trial) -> None:
        seconds = time.monotonic() - self._began.pop(trial.trial_id, time.monotonic())
        self._seconds[trial.trial_id] = seconds
        if not self.verbose:
            return
        if shell := _notebook():
            self._table.show(shell, self._seconds)
            return
        most = self._oracle.max_trials
        line = f"trial {trial.trial_id}{f' of {most}' if most else ''}: {status_of(trial)}"
        if trial.score is not None:
            line += f", {self._oracle.objective_names} {shown_score(trial.score)}"
            best = self._oracle.get_best_trials(1)
            if best and len(self._oracle.directions) == 1:
                line += f" (best {shown_score(best[0].score)}, trial {best[0].trial_id})"
        elif trial.message:
            line += f": {trial.message.strip().splitlines()[-1]}"
        values = ", ".join(f"{k}={shown(v)}" for k, v in trial.hyperparameters.values.items())
        print(f"{line}, {seconds:.1f} s; {values or 'default configuration'}", flush=True)


def print_summary(tuner: "_tuner_results.TunerResults", num_trials: int) -> None:
    """Prints how many trials ended in which way, and the best of them with their values."""
    oracle = tuner.oracle
    trials = list(oracle.trials.values())
    counts = {word: sum(status_of(t) == word for t in trials) for word in _WORDS.values()}
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    print(f"Results summary\nResults in {tuner.project_dir}")
    print(f"{len(trials)} trials: {told}" if trials else "No trial yet")
    best = oracle.get_best_trials(num_trials)
    if len(oracle.directions) > 1:
        print(f"Pareto front of {oracle.objective_names}")
    for trial in best:
        print(f"\nTrial {trial.trial_id} summary\nHyperparameters:")
        trial.display_hyperparameters()
        print(f"Score: {shown_score(trial.score)}")
