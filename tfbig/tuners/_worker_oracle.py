"""Trials that several workers train together: the chief asks for them, all train, it ends them."""

import contextlib
from typing import Any

from keras_tuner.src.engine import trial as kt_trial

from tfbig import errors
from tfbig.distribute._workers import Workers
from tfbig.tuners import _budget, _json, _tuner_types
from tfbig.tuners._hyperparameters import HyperParameters
from tfbig.tuners._oracle import StudyOracle

__all__ = ("WorkerOracle", "shared_trial")


class WorkerOracle:
    """Replaces the oracle on workers that are not the chief, while they search.

    Whatever changes the search does nothing here, because the chief does it.

    Args:
        oracle: Answers everything else, such as what the results are.
    """

    def __init__(self, oracle: StudyOracle) -> None:
        self._oracle = oracle
        self._epochs: int | None = None
        self._is_updated = False
        self.verbose: int | str = 0

    def __getattr__(self, name: str) -> Any:  # As the attribute of the oracle.
        return getattr(self._oracle, name)

    # `message` is of JSON, from `shared_trial`.
    def adopt(self, message: dict[str, Any]) -> _tuner_types.Trial:
        """The trial that the chief has announced."""
        hps = HyperParameters.from_config(message["hyperparameters"])
        self._epochs, self._is_updated = message["epochs"], False
        return kt_trial.Trial(hps, message["trial_id"], message["status"])

    def epochs_of(self, trial_id: str) -> int | None:
        del trial_id
        return self._epochs

    def begin_search(
        self, limits: _budget.Limits | None = None, process_memory: int | None = None
    ) -> None:
        del limits, process_memory

    def best_reported(self, trial_id: str) -> None:
        del trial_id

    def report(self, trial_id: str, values: _tuner_types.Metrics, step: int) -> bool:
        del trial_id, values, step
        return False

    def is_lost(self, trial_id: str) -> bool:
        del trial_id
        return False

    def is_lost_now(self, trial_id: str) -> bool:
        del trial_id
        return False

    def is_late(self, trial_id: str) -> bool:
        del trial_id
        return False

    @property
    def too_late(self) -> str:
        return ""

    def is_updated(self, trial_id: str) -> bool:
        del trial_id
        return self._is_updated

    def update_trial(self, trial_id: str, metrics: _tuner_types.Metrics, step: int = 0) -> None:
        del trial_id, metrics, step
        self._is_updated = True

    def end_trial(self, trial: _tuner_types.Trial) -> None:
        del trial

    def one_look(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def release(self) -> None:
        pass

    def check_result(self) -> None:
        pass


def shared_trial(
    oracle: StudyOracle | WorkerOracle, workers: Workers, tuner_id: str
) -> _tuner_types.Trial:
    """The next trial, the same on all workers.

    Args:
        oracle: A `StudyOracle` on the chief, a `WorkerOracle` on the others.
        workers: Those that train the trial.
        tuner_id: The id of the tuner on the chief.
    """
    if isinstance(oracle, WorkerOracle):
        message = _json.loads(workers.exchange("the next trial", "")[0])
        if "error" in message:
            raise errors.SearchError(f"The chief has ended the search: {message['error']}")
        return oracle.adopt(message)
    try:
        trial = oracle.create_trial(tuner_id)
    except errors.TfbigError as e:
        workers.exchange("the next trial", _json.dumps({"error": str(e)}))
        raise
    is_running = trial.status == kt_trial.TrialStatus.RUNNING
    message = {
        "trial_id": trial.trial_id,
        "status": trial.status,
        "hyperparameters": trial.hyperparameters.get_config(),
        "epochs": oracle.epochs_of(trial.trial_id) if is_running else None,
    }
    workers.exchange("the next trial", _json.dumps(message))
    return trial
