"""Finding the other workers of a job, and waiting until they are up."""

import collections
import contextlib
import dataclasses
import json
import os
import re
import socket
import time

import tensorflow as tf
from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver as _slurm

from tfbig import errors

__all__ = ("Cluster", "find", "wait_for_workers")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A job of several tasks, one of which is this process.

    Attributes:
        addresses: dictionary, job name ("chief" or "worker") -> list of
            "host:port".
        task_type: str, the job of this process.
        task_index: int, which task of the job it is.
        source: str, where this is known from.
    """

    addresses: dict
    task_type: str
    task_index: int
    source: str

    @property
    def tasks(self):
        """Pairs of a name and an address, the chief first."""
        return [
            (f"{job} {i}", address)
            for job in ("chief", "worker")
            for i, address in enumerate(self.addresses.get(job, ()))
        ]

    @property
    def own_task(self):
        return f"{self.task_type} {self.task_index}"

    def resolver(self):
        """The `tf.distribute` resolver of this cluster."""
        return tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(self.addresses),
            task_type=self.task_type,
            task_id=self.task_index,
            num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
            rpc_layer="grpc",
        )


def find(port=None):
    """The `Cluster` that the environment variables describe, or None.

    TF_CONFIG is what `tfbig.launch` and Kubeflow's TFJob set; SLURM's variables
    are there inside of `srun`.

    Args:
        port: int, the first port of each node under SLURM, or None.

    Raises:
        ClusterError: If the description cannot be used.
    """
    if os.environ.get("TF_CONFIG", "").strip():
        return _from_tf_config(os.environ["TF_CONFIG"])
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm(port)
    return None


_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


def _from_tf_config(text):
    def require(condition, rule, received):
        if not condition:
            raise errors.ClusterError(
                f"TF_CONFIG must {rule}. Received: {received}. Example: TF_CONFIG='{_EXAMPLE}'"
            )

    try:
        config = json.loads(text)
    except ValueError as e:
        require(False, f"be JSON ({e})", text[:200])
    require(isinstance(config, dict), "be a JSON object", text[:200])
    jobs = config.get("cluster") or {}
    if not jobs:
        return None
    require(isinstance(jobs, dict), "hold an object as `cluster`", jobs)
    for job, addresses in jobs.items():
        require(
            job in ("chief", "worker"),
            "have no jobs but `chief` and `worker`: tfbig trains without parameter servers "
            "(ps), and evaluates inside of fit (evaluator)",
            f"a job {job!r}",
        )
        require(
            isinstance(addresses, list) and all(map(_is_address, addresses)),
            "list the addresses of a job as strings 'host:port'",
            addresses,
        )
    require(len(jobs.get("chief", [])) <= 1, "have at most one chief", jobs.get("chief"))
    counts = collections.Counter(a for addresses in jobs.values() for a in addresses)
    twice = [a for a, count in counts.items() if count > 1]
    require(not twice, "give every task an address of its own", f"{twice} more than once")
    task = config.get("task")
    require(isinstance(task, dict), "hold an object as `task`", task)
    job, index = task.get("type"), task.get("index")
    require(
        isinstance(job, str) and job in jobs,
        f"have a task type that is a job of the cluster ({sorted(jobs)})",
        f"type {job!r}",
    )
    # Kubernetes templates make strings of numbers.
    is_number = isinstance(index, int | str) and str(index).isdecimal()
    require(
        is_number and int(index) < len(jobs[job]),
        f"have a task index from 0 to {len(jobs[job]) - 1}, as there are {len(jobs[job])} "
        f"tasks of job {job!r}",
        f"index {index!r}",
    )
    return Cluster(jobs, job, int(index), "TF_CONFIG")


def _is_address(text):
    match = re.fullmatch(r".+:(\d{1,5})", text) if isinstance(text, str) else None
    return match is not None and 0 < int(match[1]) < 2**16


def _from_slurm(port):
    # Not by TensorFlow's SlurmClusterResolver: it sorts nodes by name, node10 before
    # node9, but SLURM numbers tasks in the order of its list. And it asks nvidia-smi.
    try:
        rank, count = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS"))
        nodes = _slurm.expand_hostlist(os.environ["SLURM_STEP_NODELIST"])
        tasks = _slurm.expand_tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        # Two jobs of one node must not meet at a port.
        base = port or 10_000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20_000
        if len(nodes) != len(tasks) or sum(tasks) != count or not 0 <= rank < count:
            raise ValueError(
                f"task {rank} of {count} does not fit the nodes {nodes} with {tasks} tasks"
            )
    except (KeyError, ValueError) as e:
        what = f"{e.args[0]} is missing" if isinstance(e, KeyError) else e
        raise errors.ClusterError(
            f"SLURM's variables do not describe the job: {what}. Start the program with srun."
        ) from None
    on = [node for node, number in zip(nodes, tasks, strict=True) for _ in range(number)]
    here = os.environ.get("SLURMD_NODENAME", on[rank])
    if here != on[rank]:
        raise errors.ClusterError(
            f"SLURM must number the tasks node by node. Received: task {rank} on {here}, not on "
            f"{on[rank]}. Start the program with srun --distribution=block."
        )
    ports = [base + i for number in tasks for i in range(number)]
    addresses = [f"{node}:{p}" for node, p in zip(on, ports, strict=True)]
    return Cluster({"worker": addresses}, "worker", rank, "SLURM")


def wait_for_workers(cluster, timeout):
    """Returns when every worker of the job listens at its address.

    TensorFlow's chief would wait for ever for a worker that never comes up.

    Args:
        cluster: `Cluster`.
        timeout: float, seconds.

    Raises:
        ClusterError: If the own address cannot be used.
        WorkerUnavailableError: If a worker is not up after that time.
    """
    missing = dict(cluster.tasks)
    own = missing.pop(cluster.own_task)
    deadline = time.monotonic() + timeout
    with _listening(own, cluster.own_task):
        while missing and time.monotonic() < deadline:
            for name, address in list(missing.items()):
                # Of a machine that does not answer, each attempt takes its whole time.
                left = max(0.01, min(1.0, deadline - time.monotonic()))
                host, port = address.rsplit(":", 1)
                # UnicodeError: a part of the host's name is too long. OverflowError: a port is.
                with contextlib.suppress(OSError, UnicodeError, OverflowError):
                    socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
                    del missing[name]
            time.sleep(0.1 if missing else 0)
    if missing:
        listed = ", ".join(f"{name} at {address}" for name, address in missing.items())
        raise errors.WorkerUnavailableError(
            f"{listed} did not come up within {timeout:g} s; {cluster.own_task} gives up. Look "
            "whether it was started and whether the address and the firewall are right. "
            "`get_strategy(timeout=...)` sets the time."
        )


@contextlib.contextmanager
def _listening(address, task):
    """Listens at an address, until TensorFlow's server takes it over."""
    port = int(address.rsplit(":", 1)[1])
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=1024,
        )
    except (OSError, OverflowError) as e:
        raise errors.ClusterError(
            f"{task} cannot listen at its address. Received: {address} ({e}). Another program "
            "may use the port, perhaps a worker of an earlier start."
        ) from None
    with server:
        yield
