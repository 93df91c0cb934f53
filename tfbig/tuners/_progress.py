"""What a search prints: a line for each trial, and a summary."""

import time

from keras_tuner.src.engine import trial as kt_trial

__all__ = ("Progress", "print_summary", "status_of")

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


class Progress:
    """Prints a line when a trial ends.

    Attributes:
        verbose: int; 0 prints nothing.
    """

    def __init__(self, oracle):
        self.verbose = 1
        self._oracle = oracle
        self._began = {}

    def on_trial_begin(self, trial):
        self._began[trial.trial_id] = time.monotonic()

    def on_trial_end(self, trial):
        seconds = time.monotonic() - self._began.pop(trial.trial_id, time.monotonic())
        if not self.verbose:
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
