"""Keras does not measure the memory that a computation takes, nor what is left; this does."""

import contextlib
import math
import pathlib
import re
import resource
from collections.abc import Callable, Iterable, Sequence

import tensorflow as tf

from tfbig import _types, errors

__all__ = ("Meter", "available", "empty", "limit", "readable", "size_of")


class Meter:
    """Measures the memory that a computation needs beyond what is already in use.

    TensorFlow's allocators count it: variables and tensors. All CPU devices share one allocator.

    Args:
        devices: names of the devices of this process's replicas.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.is_cpu = all(d.startswith("CPU") for d in devices)
        self.devices = devices[:1] if self.is_cpu else devices

    def __call__(self, run: Callable[[], object]) -> int:
        """Bytes that `run()` takes at its peak, on the device where it takes most.

        Raises:
            InvalidOptionError: If TensorFlow does not count memory on these devices.
        """
        try:
            before = [_info(d)["current"] for d in self.devices]
            for device in self.devices:
                tf.config.experimental.reset_memory_stats(device)
        except (ValueError, tf.errors.InvalidArgumentError) as e:
            raise errors.InvalidOptionError(
                "micro_batch_size='auto' needs memory to be counted, which TensorFlow does on "
                "GPUs, on TPUs, and with oneDNN on the CPU (TF_ENABLE_ONEDNN_OPTS=1, the default "
                f"on x86). Pass a number of samples. TensorFlow says: {e}"
            ) from None
        run()
        peaks = [_info(d)["peak"] for d in self.devices]
        return max(int(peak - size) for peak, size in zip(peaks, before, strict=True))


_info = tf.config.experimental.get_memory_info


# The limit of a container, and what it uses; which pair there is depends on the version of cgroups.
_CONTAINER = tuple(
    (pathlib.Path("/sys/fs/cgroup", most), pathlib.Path("/sys/fs/cgroup", used))
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
)


def _of_host(name: str) -> int:
    """A field of /proc/meminfo, in bytes; raises OSError if there is none."""
    path = pathlib.Path("/proc/meminfo")
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"there is no {name} in {path}")
    return 1024 * int(found[1])


def available() -> int | None:
    """Bytes of memory that this process may still take on the host; None if unknown."""
    found = []
    with contextlib.suppress(OSError):
        found.append(_of_host("MemAvailable"))
    for most, used in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(most.read_text()) - int(used.read_text()))
    return max(0, min(found)) if found else None


def limit() -> int | None:
    """Bytes of memory that this process may have on the host at most; None if unknown."""
    found = []
    with contextlib.suppress(OSError):
        found.append(_of_host("MemTotal"))
    for most, _ in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(most.read_text()))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found.append(soft)
    return min(found, default=None)


def readable(size: float) -> str:
    """A number of bytes as people write it: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def size_of(tensors: Iterable[_types.Tensor | _types.Variable | None]) -> int:
    """Bytes of the values of tensors or variables; None counts nothing."""
    return sum(
        int(math.prod(v.shape) * tf.as_dtype(v.dtype).size) for v in tensors if v is not None
    )


def empty(copies: Iterable[_types.Variable]) -> None:
    """Takes the values of `tf.Variable`s that no variable of Keras holds any more.

    A function that was traced before would go on with them, and keep their memory. With one value,
    which is no number, it fails, or shows it.
    """
    for copy in copies:
        with tf.device(copy.device):
            nothing = tf.cast(tf.fill([1] * copy.shape.rank, math.nan), copy.dtype)
            tf.raw_ops.AssignVariableOp(resource=copy.handle, value=nothing, validate_shape=False)
