"""The errors of tfbig.

Every error is a `TfbigError` and also the built-in exception that a user
would catch without knowing tfbig.
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
    "StorageUnavailableError",
    "StudyError",
    "TfbigError",
    "UnsupportedModelError",
    "UnsupportedStrategyError",
    "WorkerUnavailableError",
    "WorkersDisagreeError",
)


class TfbigError(Exception):
    """Base class of all errors that tfbig raises."""


class BackendError(TfbigError, ImportError):
    """Keras runs on another backend than TensorFlow."""


class BackupError(TfbigError, ValueError):
    """A backup cannot be restored: it is of another model, or damaged."""


class ClusterError(TfbigError, ValueError):
    """The description of a multi-worker job, or this worker's address, cannot be used."""


class GradientOverflowError(TfbigError, OverflowError):
    """A gradient is not finite after it was exchanged in half precision."""


class InvalidOptionError(TfbigError, ValueError):
    """An option, or a combination of options, is not valid."""


class LossScaleError(TfbigError, RuntimeError):
    """Too many updates in a row had a non-finite gradient."""


class MixinOrderError(TfbigError, TypeError):
    """A mixin stands after the Keras class."""


class OutOfMemoryError(TfbigError, MemoryError):
    """One sample does not fit into memory, or memory ran out where nothing can be tried again."""


class SearchError(TfbigError, RuntimeError):
    """A search for hyperparameters cannot go on, or found nothing."""


class StorageUnavailableError(TfbigError, ConnectionError):
    """The database of a search cannot be reached."""


class StudyError(TfbigError, ValueError):
    """A study is of another search: another objective, space or way to search."""


class UnsupportedModelError(TfbigError, ValueError):
    """The model, loss or optimizer does something that cannot be cut exactly."""


class UnsupportedStrategyError(TfbigError, ValueError):
    """The distribution strategy is not supported, or does not own the model."""


class WorkerUnavailableError(TfbigError, TimeoutError):
    """Another worker of the job did not come up, or does not answer."""


class WorkersDisagreeError(TfbigError, ValueError):
    """The workers of a job run different models, data or settings."""
