"""The errors that tfbig raises.

Every error is a `TfbigError` and also the built-in exception that a user who does not know tfbig
would catch.
"""

__all__ = (
    "BackendError",
    "BackupError",
    "ClusterError",
    "GradientOverflowError",
    "InvalidOptionError",
    "LossScaleError",
    "MixinOrderError",
    "OutOfMemoryError",
    "SearchError",
    "SpikeError",
    "StorageUnavailableError",
    "StudyError",
    "TfbigError",
    "UnsupportedModelError",
    "UnsupportedStrategyError",
    "WorkerUnavailableError",
    "WorkersDisagreeError",
)


class TfbigError(Exception):
    """The base class of all errors that tfbig raises."""


class BackendError(TfbigError, ImportError):
    """Keras runs on a backend other than TensorFlow."""


class BackupError(TfbigError, ValueError):
    """A backup cannot be restored: it belongs to a different model, or is damaged."""


class ClusterError(TfbigError, ValueError):
    """The description of a multi-worker job, a worker's address, or a TPU cannot be used."""


class GradientOverflowError(TfbigError, OverflowError):
    """A gradient is not finite after an exchange in half precision."""


class InvalidOptionError(TfbigError, ValueError):
    """An option, or a combination of options, is invalid."""


class LossScaleError(TfbigError, RuntimeError):
    """Too many updates in a row had a non-finite gradient."""


class MixinOrderError(TfbigError, TypeError):
    """A mixin comes after the Keras class among the bases."""


class OutOfMemoryError(TfbigError, MemoryError):
    """A single sample does not fit in memory, or memory ran out where a retry is impossible."""


class SearchError(TfbigError, RuntimeError):
    """A hyperparameter search cannot continue, or found nothing."""


class SpikeError(TfbigError, RuntimeError):
    """Training went back to an earlier state too often, or has none to go back to."""


class StorageUnavailableError(TfbigError, ConnectionError):
    """The database of a search cannot be reached."""


class StudyError(TfbigError, ValueError):
    """A study belongs to a different search: its objective, space or search method differs."""


class UnsupportedModelError(TfbigError, ValueError):
    """The model, loss or optimizer does something that micro-batches cannot reproduce exactly."""


class UnsupportedStrategyError(TfbigError, ValueError):
    """The distribution strategy is not supported, or does not own the model."""


class WorkerUnavailableError(TfbigError, TimeoutError):
    """Another worker of the job did not start, or does not respond."""


class WorkersDisagreeError(TfbigError, ValueError):
    """The workers of a job have different models, data or settings."""
