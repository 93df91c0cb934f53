"""What a worker finds in its environment."""

import contextlib
import glob
import json
import os
import socket
from collections.abc import Sequence

__all__ = ("devices_of", "free_ports", "of_independent", "of_job", "visible_devices")

# By these, `get_strategy` would find the job that the launcher itself is part of.
_OF_JOBS = ("TF_CONFIG", "SLURM_STEP_NUM_TASKS", "TFBIG_JOB", "TFBIG_SERVICE", "TFBIG_WORKERS")


def free_ports(count: int) -> list[int]:
    """Returns distinct ports that are free now."""
    # All sockets stay open until the last port is chosen, so no port is chosen twice.
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _environment(devices: list[str] | None) -> dict[str, str]:
    # Without this, a worker that is killed loses the lines in its buffer.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def of_job(index: int, addresses: Sequence[str], devices: list[str] | None) -> dict[str, str]:
    """Returns the environment of a worker that belongs to a job."""
    task = {"type": "worker", "index": index}
    config = json.dumps({"cluster": {"worker": list(addresses)}, "task": task})
    environment = _environment(devices)
    if "arena_max" not in environment.get("GLIBC_TUNABLES", ""):
        # GNU's C library has eight heaps for each core, and each keeps some of what was freed.
        heaps = max(1, (os.cpu_count() or 1) // len(addresses))
        environment.setdefault("MALLOC_ARENA_MAX", str(heaps))
    return environment | {"TF_CONFIG": config}


def of_independent(index: int, devices: list[str] | None) -> dict[str, str]:
    """Returns the environment of a worker that is independent of the others."""
    environment = _environment(devices if devices is not None else _device_in_turn(index))
    for name in _OF_JOBS:
        environment.pop(name, None)
    # Workers may share a GPU, and by default TensorFlow allocates all of its memory.
    environment.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    return environment | {"TFBIG_WORKER": str(index)}


def _device_in_turn(index: int) -> list[str] | None:
    """Deals GPUs out to the workers in turn; None if there are no GPUs."""
    devices = visible_devices()
    if devices is None:
        devices = [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    return [devices[index % len(devices)]] if devices else None


def visible_devices() -> list[str] | None:
    """Returns the devices in CUDA_VISIBLE_DEVICES, or None if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1")]


def devices_of(index: int, per_worker: int | None) -> list[str] | None:
    """Returns the GPUs of one worker, or None if all workers see all devices."""
    if per_worker is None:
        return None
    devices = visible_devices()
    if devices is None:
        return [str(i) for i in range(index * per_worker, (index + 1) * per_worker)]
    # "-1" hides all GPUs, so the workers run on the CPU.
    return devices[index * per_worker : (index + 1) * per_worker] or ["-1"]
