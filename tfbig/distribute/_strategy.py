"""`get_strategy`: the `tf.distribute` strategy for the devices and workers at hand."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence

import tensorflow as tf

from tfbig import _integers, _keras, _log, _numbers, _types, errors
from tfbig.distribute import _cluster, _stuck_workers, _tpu, _workers

__all__ = ("get_strategy", "is_chief")

KINDS = ("auto", "tpu", "multi_worker", "mirrored", "one_device", "default")

_REQUESTED = "as requested"


def get_strategy(
    kind: str = "auto",
    *,
    tpu: str | None = None,
    devices: int | str | Sequence[str] | None = None,
    timeout: float = 600.0,
    port: int | None = None,
) -> _types.Strategy:
    """Makes the strategy for the devices and workers at hand.

    Call it once, before anything else of TensorFlow runs. It logs one line that says what it chose
    and why, to the logger "tfbig" of Python's logging, which writes to stderr by default.

    Args:
        kind: "auto": a TPU if TensorFlow is built for TPUs and there is one, else several workers
            if TF_CONFIG (set by `tfbig.launch`), SLURM or Kubernetes lists them, else a mirrored
            strategy if there are several GPUs, else the default strategy. Or exactly one of
            "tpu", "multi_worker", "mirrored", "one_device" and "default".
        tpu: For "tpu": name or address of the TPU. Defaults to TPU_NAME, or else to this
            machine's TPU.
        devices: For "mirrored": the number of replicas, or a list of device names such as
            `["GPU:0", "GPU:1"]`; without GPUs, a number makes that many logical CPU devices.
            Defaults to all GPUs. For "one_device": a device name; defaults to the first GPU or CPU.
        timeout: Seconds to wait for the other workers to start, and in `fit` for a worker that
            runs but does not get to where the others are.
        port: Port of the first task of each node under SLURM, by default derived from the job's
            number; or of each worker on Kubernetes, by default 2222.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ClusterError: If TF_CONFIG or the variables of SLURM or Kubernetes are invalid, if there
            are none for "multi_worker", or if no TPU is found.
        InvalidOptionError: If an argument is invalid.
        WorkerUnavailableError: If a worker does not start in time.

    Example:

    >>> type(tfbig.distribute.get_strategy("default")).__name__
    '_DefaultDistributionStrategy'
    """
    _check_kind(kind, tpu, devices)
    _check_timeout(timeout)
    port = _checked_port(port)
    strategy, reason = _make(kind, tpu, devices, timeout, port)
    name = type(strategy).__name__.lstrip("_")
    # The class of MultiWorkerMirroredStrategy still has its old name.
    name = {"CollectiveAllReduceStrategy": "MultiWorkerMirroredStrategy"}.get(name, name)
    _log.logger().info("tfbig: %s, %s replica(s), %s", name, strategy.num_replicas_in_sync, reason)
    return strategy


def is_chief(strategy: _types.Strategy) -> bool:
    """Returns whether this process is the worker that writes files and prints.

    Always true in a program of one process.

    Args:
        strategy: The strategy that the program made.

    Example:

    >>> tfbig.distribute.is_chief(tf.distribute.get_strategy())
    True
    """
    return _workers.Workers.of(strategy).is_chief


def _check_kind(kind: str, tpu: str | None, devices: int | str | Sequence[str] | None) -> None:
    if kind not in KINDS:
        raise errors.InvalidOptionError(
            f"`kind` must be one of {', '.join(KINDS)}. Received: kind={kind!r}."
        )
    if devices is not None and kind not in ("mirrored", "one_device"):
        raise errors.InvalidOptionError(
            "`devices` requires kind='mirrored' or 'one_device'. Received: "
            f"kind={kind!r}, devices={devices!r}."
        )
    if tpu is not None and (kind != "tpu" or not isinstance(tpu, str)):
        raise errors.InvalidOptionError(
            f"`tpu` must be a name, and requires kind='tpu'. Received: kind={kind!r}, tpu={tpu!r}."
        )


def _check_timeout(timeout: float) -> None:
    seconds = _numbers.as_number(timeout)
    # NaN is not >= 0 either.
    if seconds is None or not seconds >= 0:
        raise errors.InvalidOptionError(
            f"`timeout` must be a number of seconds >= 0. Received: timeout={timeout!r}."
        )


def _checked_port(port: int | None) -> int | None:
    number = _integers.as_integer(port)
    if port is not None and (number is None or not 0 < number < 2**16):
        raise errors.InvalidOptionError(
            f"`port` must be an integer from 1 to 65535. Received: port={port!r}."
        )
    return number


def _make(
    kind: str,
    tpu: str | None,
    devices: int | str | Sequence[str] | None,
    timeout: float,
    port: int | None,
) -> tuple[_types.Strategy, str]:
    """Returns a strategy of a kind, and the reason for choosing it."""
    match kind:
        case "tpu":
            return _tpu.connect(tpu)
        case "multi_worker":
            return _multi_worker(timeout, port)
        case "mirrored":
            return _mirrored(devices), _REQUESTED
        case "one_device":
            return _one_device(devices), _REQUESTED
        case "default":
            return tf.distribute.get_strategy(), _REQUESTED
    return _auto(timeout, port)


def _auto(timeout: float, port: int | None) -> tuple[_types.Strategy, str]:
    if _tpu.is_available():
        return _tpu.connect()
    cluster = _cluster.find(port=port)
    if cluster is not None and len(cluster.tasks) > 1:
        return _over_workers(cluster, timeout)
    gpus = tf.config.list_physical_devices("GPU")
    reason = f"because there are {len(gpus)} GPUs and no other workers"
    if len(gpus) > 1:
        return tf.distribute.MirroredStrategy(), reason
    return tf.distribute.get_strategy(), reason


def _multi_worker(timeout: float, port: int | None) -> tuple[_types.Strategy, str]:
    cluster = _cluster.find(port=port)
    if cluster is None:
        raise errors.ClusterError(
            "kind='multi_worker' needs a description of the job: TF_CONFIG, or the variables of "
            "SLURM or Kubernetes. Received: none. Start the program with `python -m tfbig.launch "
            "--workers N`, `srun`, or as a JobSet."
        )
    return _over_workers(cluster, timeout)


def _over_workers(cluster: _cluster.Cluster, timeout: float) -> tuple[_types.Strategy, str]:
    if len(cluster.tasks) > 1:
        _cluster.wait_for_workers(cluster, timeout)
    try:
        with _sigterm_preserved():
            strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster.resolver())
    except RuntimeError as e:
        raise errors.ClusterError(
            "The strategy for several workers must be made once, before TensorFlow runs anything "
            f"else. TensorFlow says: {e}"
        ) from None
    if len(cluster.tasks) > 1:
        _workers.timeout = timeout
        workers = _workers.Workers.of(strategy)
        _stuck_workers.watch(strategy, workers.names, workers.index)
    return strategy, (
        f"because {cluster.source} lists {len(cluster.tasks)} workers; this is {cluster.own_task}"
    )


@contextlib.contextmanager
def _sigterm_preserved() -> Iterator[None]:
    """Restores the handler of SIGTERM: TensorFlow's server installs one that only takes a note."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _mirrored(devices: int | str | Sequence[str] | None) -> _types.Strategy:
    gpus = tf.config.list_physical_devices("GPU")
    kind = "GPU" if gpus else "CPU"
    if devices is None:
        devices = len(gpus) or 1
    if isinstance(devices, list | tuple) and devices:
        _require_devices(devices)
        return tf.distribute.MirroredStrategy(list(devices))
    rule = "an integer >= 1 or a list of one or more device names"
    devices = _integers.checked("devices", devices, rule=rule)
    if gpus and devices > len(gpus):
        raise errors.InvalidOptionError(
            f"`devices` must be at most the number of GPUs, {len(gpus)}. Received: "
            f"devices={devices}. Hide the GPUs with CUDA_VISIBLE_DEVICES=-1 to use the CPU."
        )
    if not gpus:
        _make_logical_cpus(devices)
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(devices)])


def _make_logical_cpus(count: int) -> None:
    made = _keras.devices.make_logical_cpus(count)
    if made < count:
        raise errors.InvalidOptionError(
            f"TensorFlow has started, so it cannot make {count} logical CPU devices. Call "
            f"get_strategy before anything else, or pass at most devices={made}. Received: "
            f"devices={count}."
        )


def _one_device(devices: int | str | Sequence[str] | None) -> _types.Strategy:
    if devices is None:
        devices = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    if not isinstance(devices, str):
        raise errors.InvalidOptionError(
            f"`devices` must be one device name, such as 'GPU:0'. Received: devices={devices!r}."
        )
    _require_devices(devices)
    return tf.distribute.OneDeviceStrategy(devices)


def _require_devices(devices: str | Sequence[str]) -> None:
    # TensorFlow accepts any name, and computes on the first device if there is no such device.
    names = [devices] if isinstance(devices, str) else devices
    existing = [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()]
    given = [str(name).upper().rpartition("/")[2].removeprefix("DEVICE:") for name in names]
    if len(set(given)) < len(given) or not set(given) <= set(existing):
        raise errors.InvalidOptionError(
            f"`devices` must name existing devices, each once: {', '.join(existing)}. "
            f"Received: devices={devices!r}."
        )
