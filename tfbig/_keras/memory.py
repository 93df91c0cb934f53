"""How much memory a computation takes, and how much there is."""

import contextlib
import math
import pathlib
import re

import tensorflow as tf

from tfbig import errors

__all__ = ("Meter", "available", "readable", "size_of")


class Meter:
    """Measures the memory that computations need beyond what is in use before.

    It is what TensorFlow's allocators count: variables and tensors. All CPU devices share one.

    Args:
        devices: list of names, those of the replicas of this process.
    """

    def __init__(self, devices):
        self.is_cpu = all(d.startswith("CPU") for d in devices)
        self.devices = devices[:1] if self.is_cpu else devices

    def __call__(self, run):
        """Bytes that `run()` takes at its peak, on the device where it takes most.

        Raises:
            InvalidOptionError: If TensorFlow does not count on these devices.
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
        return max(peak - size for peak, size in zip(peaks, before, strict=True))


_info = tf.config.experimental.get_memory_info


def _kibibytes(path, name):
    """A field of a file of /proc, in bytes; OSError without one."""
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"there is no {name} in {path}")
    return 1024 * int(found[1])


def available():
    """Bytes of memory that this process may still take on the host; None if unknown."""
    found = []
    with contextlib.suppress(OSError):
        found.append(_kibibytes(pathlib.Path("/proc/meminfo"), "MemAvailable"))
    # Of the container, where there is one.
    group = pathlib.Path("/sys/fs/cgroup")
    for limit, used in (
        (group / "memory.max", group / "memory.current"),
        (group / "memory/memory.limit_in_bytes", group / "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):
            continue
    return max(0, min(found)) if found else None


def readable(size):
    """Bytes as people write them: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def size_of(tensors):
    """Bytes of the values of tensors or variables; None among them are left out."""
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in tensors if v is not None)
