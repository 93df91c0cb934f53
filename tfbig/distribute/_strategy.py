"""`get_strategy`: the `tf.distribute` strategy for what there is."""

import contextlib
import signal
import threading

import tensorflow as tf

from tfbig import _keras, _log, errors
from tfbig.distribute import _cluster, _stuck_workers, _tpu, _workers

__all__ = ("get_strategy", "is_chief")

KINDS = ("auto", "tpu", "multi_worker", "mirrored", "one_device", "default")


def get_strategy(kind="auto", *, tpu=None, devices=None, timeout=600.0, port=None):
    """Makes the strategy for the devices and workers that there are.

    To be called once, before anything else of TensorFlow runs. What was chosen,
    and why, is one line of the log "tfbig" of Python's logging, shown on stderr.

    Args:
        kind: "auto": a TPU where TensorFlow is built for them and one is there, else several
            workers where TF_CONFIG (set by `tfbig.launch`, or by Kubeflow) or SLURM say so,
            else a mirrored strategy where there are several GPUs, else the default strategy.
            Or "tpu", "multi_worker", "mirrored", "one_device" or "default", to have just that.
        tpu: For "tpu": str, name or address of the TPU; by default what TPU_NAME says,
            else that of this machine.
        devices: For "mirrored": int, how many replicas, or a list of device
            names such as `["GPU:0", "GPU:1"]`. Without GPUs a number makes as
            many logical CPU devices. By default all GPUs. For "one_device": a
            device name, by default the first GPU or CPU.
        timeout: float, seconds to wait for the other workers to come up, and in `fit`
            for one that lives and does not come to the place where the others are.
        port: int, port of the first task of each node under SLURM; by default
            made from the number of the job.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ClusterError: If TF_CONFIG or SLURM's variables cannot be used, or kind is
            "multi_worker" and there are none; or no TPU is found.
        InvalidOptionError: If an argument is not valid.
        WorkerUnavailableError: If a worker does not come up in time.

    Example:

    >>> type(tfbig.distribute.get_strategy("default")).__name__
    '_DefaultDistributionStrategy'
    """
    if kind not in KINDS:
        raise errors.InvalidOptionError(
            f"`kind` must be one of {', '.join(KINDS)}. Received: kind={kind!r}."
        )
    if devices is not None and kind not in ("mirrored", "one_device"):
        raise errors.InvalidOptionError(
            "`devices` goes with kind='mirrored' or 'one_device'. Received: "
            f"kind={kind!r}, devices={devices!r}."
        )
    if tpu is not None and (kind != "tpu" or not isinstance(tpu, str)):
        raise errors.InvalidOptionError(
            f"`tpu` is a name, and goes with kind='tpu'. Received: kind={kind!r}, tpu={tpu!r}."
        )
    valid = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout >= 0
    if not valid:
        raise errors.InvalidOptionError(
            f"`timeout` must be a number of seconds >= 0. Received: timeout={timeout!r}."
        )
    if port is not None and (type(port) is not int or not 0 < port < 2**16):
        raise errors.InvalidOptionError(
            f"`port` must be an integer from 1 to 65535. Received: port={port!r}."
        )
    if kind == "tpu":
        strategy, why = _tpu.connect(tpu)
    else:
        strategy, why = _MAKERS[kind](devices, timeout, port)
    name = type(strategy).__name__.lstrip("_")
    # The class of MultiWorkerMirroredStrategy has an older name.
    name = {"CollectiveAllReduceStrategy": "MultiWorkerMirroredStrategy"}.get(name, name)
    _log.logger().info("tfbig: %s, %s replica(s), %s", name, strategy.num_replicas_in_sync, why)
    return strategy


def is_chief(strategy):
    """Whether this process is the one of a job that writes files and prints.

    Always true in a program of one process.

    Args:
        strategy: `tf.distribute.Strategy`, the one that the program made.

    Example:

    >>> tfbig.distribute.is_chief(tf.distribute.get_strategy())
    True
    """
    return _workers.Workers.of(strategy).is_chief


def _auto(devices, timeout, port):
    del devices
    if _tpu.is_there():
        return _tpu.connect()
    cluster = _cluster.find(port=port)
    if cluster is not None and len(cluster.tasks) > 1:
        return _over_workers(cluster, timeout)
    gpus = tf.config.list_physical_devices("GPU")
    found = f"as there are {len(gpus)} GPUs and no other workers"
    if len(gpus) > 1:
        return tf.distribute.MirroredStrategy(), found
    return tf.distribute.get_strategy(), found


def _multi_worker(devices, timeout, port):
    del devices
    cluster = _cluster.find(port=port)
    if cluster is None:
        raise errors.ClusterError(
            "kind='multi_worker' needs a description of the job: TF_CONFIG, or SLURM's variables. "
            "Received: neither. Start the program with `python -m tfbig.launch --workers N`, "
            "`srun`, or as a TFJob."
        )
    return _over_workers(cluster, timeout)


def _over_workers(cluster, timeout):
    if len(cluster.tasks) > 1:
        _cluster.wait_for_workers(cluster, timeout)
    try:
        with _sigterm_kept():
            strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster.resolver())
    except RuntimeError as e:
        raise errors.ClusterError(
            "The strategy for several workers must be made before TensorFlow runs anything else, "
            f"and once. TensorFlow says: {e}"
        ) from None
    if len(cluster.tasks) > 1:
        _workers.timeout = timeout
        workers = _workers.Workers.of(strategy)
        _stuck_workers.watch(strategy, workers.names, workers.index)
    return strategy, (
        f"as {cluster.source} lists {len(cluster.tasks)} workers; this is {cluster.own_task}"
    )


@contextlib.contextmanager
def _sigterm_kept():
    """Keeps what SIGTERM does: TensorFlow's server would only make a note of it."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _mirrored(devices, timeout, port):
    del timeout, port
    gpus = tf.config.list_physical_devices("GPU")
    kind = "GPU" if gpus else "CPU"
    if devices is None:
        devices = len(gpus) or 1
    if isinstance(devices, list | tuple) and devices:
        _require_devices(devices)
        return tf.distribute.MirroredStrategy(list(devices)), "as asked for"
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise errors.InvalidOptionError(
            "`devices` must be an integer >= 1 or a list of one or more device names. Received: "
            f"devices={devices!r}."
        )
    if gpus and devices > len(gpus):
        raise errors.InvalidOptionError(
            f"`devices` must be at most the number of GPUs, {len(gpus)}. Received: "
            f"devices={devices}. Hide the GPUs with CUDA_VISIBLE_DEVICES=-1 to use the CPU."
        )
    if not gpus:
        _make_logical_cpus(devices)
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(devices)]), "as asked for"


def _make_logical_cpus(count):
    made = _keras.devices.make_logical_cpus(count)
    if made < count:
        raise errors.InvalidOptionError(
            f"{count} logical CPU devices cannot be made any more: TensorFlow has started. Call "
            f"get_strategy before anything else, or give at most devices={made}. Received: "
            f"devices={count}."
        )


def _one_device(devices, timeout, port):
    del timeout, port
    if devices is None:
        devices = "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"
    if not isinstance(devices, str):
        raise errors.InvalidOptionError(
            f"`devices` must be one device name, as 'GPU:0'. Received: devices={devices!r}."
        )
    _require_devices(devices)
    return tf.distribute.OneDeviceStrategy(devices), "as asked for"


def _require_devices(devices):
    # TensorFlow takes any name, and computes on the first device then.
    names = [devices] if isinstance(devices, str) else devices
    existing = [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()]
    given = [str(name).upper().rpartition("/")[2].removeprefix("DEVICE:") for name in names]
    if len(set(given)) < len(given) or not set(given) <= set(existing):
        raise errors.InvalidOptionError(
            f"`devices` must name devices that there are, each once: {', '.join(existing)}. "
            f"Received: devices={devices!r}."
        )


def _default(devices, timeout, port):
    del devices, timeout, port
    return tf.distribute.get_strategy(), "as asked for"


_MAKERS = {
    "auto": _auto,
    "multi_worker": _multi_worker,
    "mirrored": _mirrored,
    "one_device": _one_device,
    "default": _default,
}
