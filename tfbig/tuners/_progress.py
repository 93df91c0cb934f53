"""What a search shows: a line for each trial, in a notebook a table; and a summary."""

import html
import sys
import time
from typing import Any

from keras_tuner.src.engine import trial as kt_trial

__all__ = ("Progress", "html_table", "print_summary", "shown", "status_of")

_STATUS = kt_trial.TrialStatus

# KerasTuner's words, and those of the field.
_WORDS = {
    _STATUS.COMPLETED: "complete",
    _STATUS.STOPPED: "pruned",
    _STATUS.INVALID: "infeasible",
    _STATUS.FAILED: "failed",
    _STATUS.RUNNING: "running",
}


def status_of(trial):
    """How a trial ended: "complete", "pruned", "infeasible", "failed" or "running"."""
    return _WORDS[trial.status]


def shown(value):
    """A value in a few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return ", ".join(map(shown, value))
    return str(value)


def html_table(header, rows, marked=()):
    """A table as HTML; all texts are escaped.

    Args:
        header: list of texts, or None where the first cell of each row is its name.
        rows: iterable of lists of texts.
        marked: numbers of the rows that have the class "best".
    """

    def line(tags, cells):
        pairs = zip(tags, cells, strict=True)
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for tag, cell in pairs)

    first = "td" if header else "th"
    lines = [f"<tr>{line(['th'] * len(header), header)}</tr>"] if header else []
    for i, row in enumerate(rows):
        start = '<tr class="best">' if i in marked else "<tr>"
        lines.append(f"{start}{line([first] + ['td'] * (len(row) - 1), row)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


# Trials in the table of a notebook: the last ones, and the best.
_SHOWN_TRIALS = 20


def _notebook():
    """The shell of a notebook; None in a terminal."""
    # Not imported: where it is not, there is no notebook.
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


class _Table:
    """A table of the trials in a notebook, in the cell that searches."""

    def __init__(self, oracle):
        self._oracle = oracle
        self._cell: int | None = None
        self._handle: Any = None

    def show(self, shell, seconds):
        from IPython import display

        table = display.HTML(self._made(seconds))
        if self._cell != shell.execution_count:
            # The table of an earlier cell stays as it is.
            self._cell = shell.execution_count
            self._handle = display.display(table, display_id=True)
        else:
            self._handle.update(table)

    def _made(self, seconds):
        trials = list(self._oracle.trials.values())
        best = {t.trial_id for t in self._oracle.get_best_trials(1)}
        listed = [t for t in trials[:-_SHOWN_TRIALS] if t.trial_id in best]
        listed += trials[-_SHOWN_TRIALS:]
        names = list(dict.fromkeys(n for t in listed for n in t.hyperparameters.values))
        rows = []
        for trial in listed:
            values = trial.hyperparameters.values
            score = "" if trial.score is None else shown(trial.score)
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
        verbose: int; 0 prints nothing.
    """

    def __init__(self, oracle):
        self.verbose = 1
        self._oracle = oracle
        self._began = {}
        # By trial, of those that ended in this process.
        self._seconds = {}
        self._table = _Table(oracle)

    def on_trial_begin(self, trial):
        self._began[trial.trial_id] = time.monotonic()
        if self.verbose and (shell := _notebook()):
            self._table.show(shell, self._seconds)

    def on_trial_end(self, trial):
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
            line += f", {self._oracle.objective_names} {shown(trial.score)}"
            best = self._oracle.get_best_trials(1)
            if best and len(self._oracle.directions) == 1:
                line += f" (best {shown(best[0].score)}, trial {best[0].trial_id})"
        elif trial.message:
            line += f": {trial.message.strip().splitlines()[-1]}"
        values = ", ".join(f"{k}={shown(v)}" for k, v in trial.hyperparameters.values.items())
        print(f"{line}, {seconds:.1f} s; {values or 'default configuration'}", flush=True)


def print_summary(tuner, num_trials):
    """Prints how many trials ended how, and the best of them with their values."""
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
        print(f"Score: {shown(trial.score)}")
