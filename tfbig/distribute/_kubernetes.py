"""The workers of a Kubernetes Job whose pods are indexed, as those of a JobSet are.

Kubernetes tells a pod its index, in JOB_COMPLETION_INDEX, and nothing of the others. The manifest
adds what their names consist of: pod i of a Job is `<job>-<i>.<service>`, where the service is
headless. See scripts/jobset.yaml.
"""

import os
import re

from tfbig import errors

__all__ = ("PORT", "workers")

# Every pod has an address of its own, so one port does for all.
PORT = 2222

# What the manifest sets. With a prefix of ours: JOB_NAME is Jenkins's, too.
_JOB, _SERVICE, _WORKERS = "TFBIG_JOB", "TFBIG_SERVICE", "TFBIG_WORKERS"
# What Kubernetes sets, which alone does not mean a job: pods of a search know their index, too.
_INDEX = "JOB_COMPLETION_INDEX"

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"


def workers(port: int | None = None) -> tuple[list[str], int] | None:
    """Returns the addresses of all workers and the index of this one, or None without a Job.

    Args:
        port: The port of each worker. Defaults to `PORT`.

    Raises:
        ClusterError: If the environment variables are incomplete or contradict one another.
    """
    if not any(os.environ.get(name) for name in (_JOB, _SERVICE, _WORKERS)):
        return None
    job = _checked(_JOB, _LABEL, "the name of the Job")
    # A service of another namespace has a name with dots.
    service = _checked(_SERVICE, rf"{_LABEL}(\.{_LABEL})*", "the name of the headless service")
    count = int(_checked(_WORKERS, r"[1-9]\d*", "the Job's number of completions, an integer >= 1"))
    index = int(
        _checked(_INDEX, r"\d+", "the index that Kubernetes gives the pods of indexed Jobs")
    )
    if index >= count:
        raise _error(f"{_INDEX} must be less than {_WORKERS}={count}", str(index))
    return [f"{job}-{i}.{service}:{port or PORT}" for i in range(count)], index


def _checked(name: str, pattern: str, meaning: str) -> str:
    value = os.environ.get(name, "").strip()
    if not re.fullmatch(pattern, value):
        raise _error(f"{name} must be {meaning}", repr(value) if value else "nothing")
    return value


def _error(rule: str, received: str) -> errors.ClusterError:
    return errors.ClusterError(
        f"Kubernetes's variables do not describe the job: {rule}. Received: {received}. "
        "scripts/jobset.yaml shows a manifest in which all are set."
    )
