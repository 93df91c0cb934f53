"""Trials that several workers train together: one of them asks, all train, one tells."""

from keras_tuner.src.engine import trial as kt_trial

from tfbig import errors
from tfbig.tuners import _json
from tfbig.tuners._hyperparameters import HyperParameters

__all__ = ("Follower", "shared_trial")


class Follower:
    """Stands for the oracle on the workers that are not the chief, while they search.

    Args:
        oracle: `StudyOracle`, which is asked for all else, such as results.
    """

    def __init__(self, oracle):
        self._oracle = oracle
        self._epochs = None
        self.verbose = 0

    def __getattr__(self, name):
        return getattr(self._oracle, name)

    def adopt(self, told):
        """The trial that the chief tells of."""
        hps = HyperParameters.from_config(told["hyperparameters"])
        self._epochs = told["epochs"]
        return kt_trial.Trial(hps, told["trial_id"], told["status"])

    def epochs_of(self, trial_id):
        del trial_id
        return self._epochs

    def begin_search(self, *_):
        """Does nothing, as all that follows: the chief does it."""

    def best_reported(self, trial_id):
        del trial_id

    def report(self, trial_id, values, step):
        del trial_id, values, step
        return False

    def is_lost(self, trial_id):
        del trial_id
        return False

    def is_updated(self, trial_id):
        del trial_id
        return False

    def update_trial(self, trial_id, metrics, step=0):
        del trial_id, metrics, step

    def end_trial(self, trial):
        del trial

    def release(self):
        pass

    def check_result(self):
        pass


def shared_trial(oracle, workers, tuner_id):
    """The next trial, the same on all workers.

    Args:
        oracle: `StudyOracle` on the chief, `Follower` on the others.
        workers: `Workers`.
        tuner_id: str.
    """
    if not workers.is_chief:
        told = _json.loads(workers.exchange("the next trial", "")[0])
        if "error" in told:
            raise errors.SearchError(f"The chief of the search ended: {told['error']}")
        return oracle.adopt(told)
    try:
        trial = oracle.create_trial(tuner_id)
    except errors.TfbigError as e:
        workers.exchange("the next trial", _json.dumps({"error": str(e)}))
        raise
    is_running = trial.status == kt_trial.TrialStatus.RUNNING
    told = {
        "trial_id": trial.trial_id,
        "status": trial.status,
        "hyperparameters": trial.hyperparameters.get_config(),
        "epochs": oracle.epochs_of(trial.trial_id) if is_running else None,
    }
    workers.exchange("the next trial", _json.dumps(told))
    return trial
