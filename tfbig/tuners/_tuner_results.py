"""What a tuner says about its search: the best trials, tables, and a report."""

import os

import keras

from tfbig.tuners import _progress, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters
from tfbig.tuners._oracle import StudyOracle

__all__ = ("TunerResults",)


class TunerResults:
    """The methods of a tuner that read results.

    Attributes:
        oracle: The oracle of the search.
        project_name: The name of the search.
        project_dir: The directory of its files.
    """

    oracle: StudyOracle
    project_name: str
    project_dir: str

    def load_model(self, trial: _tuner_types.Trial) -> keras.Model:
        """The model of a trial with the weights of its best epoch."""
        raise NotImplementedError

    def get_best_models(self, num_models: int = 1) -> list[keras.Model]:
        """The models of the best trials, best first, with the weights of their best epoch."""
        return [self.load_model(trial) for trial in self.oracle.get_best_trials(num_models)]

    def get_best_hyperparameters(self, num_trials: int = 1) -> list[HyperParameters]:
        """The hyperparameters of the best trials, best first."""
        return [trial.hyperparameters for trial in self.oracle.get_best_trials(num_trials)]

    def get_pareto_trials(self) -> list[_tuner_types.Trial]:
        """The trials that no other trial beats in all objectives."""
        return self.oracle.get_best_trials(len(self.oracle.trials))

    def results_summary(self, num_trials: int = 10) -> None:
        """Prints how many trials ended in which way, and the best of them."""
        _progress.print_summary(self, num_trials)

    @property
    def remaining_trials(self) -> int | None:
        """How many trials may still begin, in all processes; None for any number."""
        return self.oracle.remaining_trials()

    def to_dataframe(self) -> _tuner_types.DataFrame:
        """The trials as a `pandas.DataFrame`, one in each row; needs pandas.

        Returns:
            Columns: "trial", its id; "status", "complete", "pruned", "infeasible", "failed" or
            "running"; "score", or a column for each of several objectives; "best_step", the epoch
            of the score, from 0; "epochs", how many were reported; "duration", seconds from start
            to end; and the value of each hyperparameter, `pandas.NA` where it is not active ("hp
            score" if its name is one of the others).

        Raises:
            InvalidOptionError: If pandas is not installed.
        """
        from tfbig.tuners import _results

        return _results.dataframe(self)

    def importance(self, objective: str | None = None) -> dict[str, float]:
        """The share of each hyperparameter in the variance of the objective, by fANOVA.

        Considers hyperparameters that all complete trials have. Needs `tfbig[sklearn]`.

        Args:
            objective: One of several objectives. Defaults to the first.

        Returns:
            Shares by name, largest first, which sum to 1; empty with fewer than 2 complete trials.

        Raises:
            InvalidOptionError: If scikit-learn is not installed, or there is no such objective.

        Reference:
            Hutter et al., "An Efficient Approach for Assessing Hyperparameter Importance", ICML
            2014.
        """
        from tfbig.tuners import _results

        return _results.importance(self, objective)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Writes a report on the search: one HTML file that needs no network.

        The search may still be running. Importance needs `tfbig[sklearn]`. What cannot be drawn is
        left out, with the reason.

        Args:
            path: The file; an existing one is replaced atomically.
        """
        from tfbig.tuners import _report

        _report.write(self, path)
