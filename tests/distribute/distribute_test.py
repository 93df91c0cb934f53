"""Finding the workers of a job, waiting for them, and choosing a strategy.

Strategies over several workers are made in `multi_worker_test.py`, in processes of their own.
"""

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest
import tensorflow as tf

import tfbig
from tests import job
from tests.conftest import make_strategy
from tfbig import errors
from tfbig.distribute import _cluster, _tpu

DESCRIPTION = ("TF_CONFIG", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
DESCRIPTION += ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURMD_NODENAME")
DESCRIPTION += ("TFBIG_JOB", "TFBIG_SERVICE", "TFBIG_WORKERS", "JOB_COMPLETION_INDEX")


@pytest.fixture(autouse=True)
def describe(monkeypatch):
    """Returns a function that sets the variables which describe the job; at first none is set."""
    for name in DESCRIPTION:
        monkeypatch.delenv(name, raising=False)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


# --- TF_CONFIG ---------------------------------------------------------------

WORKERS = ["10.0.0.1:2222", "10.0.0.2:2222"]


def config(cluster=None, task=None):
    cluster = {"worker": WORKERS} if cluster is None else cluster
    return {"cluster": cluster, "task": {"type": "worker", "index": 0} if task is None else task}


def test_tf_config_describes_the_job(describe):
    jobs = {"worker": ["b:1", "c:2"], "chief": ["[::1]:65535"]}
    describe(TF_CONFIG=json.dumps(config(jobs, {"type": "worker", "index": 1})))
    cluster = _cluster.find()
    assert cluster == _cluster.Cluster(jobs, "worker", 1, "TF_CONFIG")
    assert cluster.tasks == [("chief 0", "[::1]:65535"), ("worker 0", "b:1"), ("worker 1", "c:2")]
    assert cluster.own_task == "worker 1"
    resolver = cluster.resolver()
    assert resolver.cluster_spec().as_dict() == jobs
    assert (resolver.task_type, resolver.task_id, resolver.rpc_layer) == ("worker", 1, "grpc")


def test_a_task_index_may_be_a_string(describe):
    describe(TF_CONFIG=json.dumps(config(task={"type": "worker", "index": "1"})))
    cluster = _cluster.find()
    assert (cluster.task_index, cluster.own_task) == (1, "worker 1")


def test_tf_config_takes_precedence_over_slurm(describe):
    describe(TF_CONFIG=json.dumps(config()), **SLURM)
    assert _cluster.find().source == "TF_CONFIG"


@pytest.mark.parametrize("text", [None, "", "  ", "{}", '{"cluster": {}}', '{"cluster": null}'])
def test_no_cluster_is_found_without_a_description(describe, text):
    if text is not None:
        describe(TF_CONFIG=text)
    assert _cluster.find() is None


def of_task(**task):
    return config(task=task)


JOBS = "only have the jobs `chief` and `worker`"
TYPE = "have a task type that is a job of the cluster (['worker'])"
INDEX = "have a task index from 0 to 1, because job 'worker' has 2 tasks"
ADDRESS = "list the addresses of a job as strings 'host:port'"
MALFORMED = {
    "not JSON": ("{'cluster'", "be valid JSON (", "{'cluster'"),
    "a list": ([1], "be a JSON object", "[1]"),
    "a string": ("text", "be a JSON object", '"text"'),
    "a cluster that is a list": (config([1]), "hold an object as `cluster`", "[1]"),
    "ps": (config({"worker": WORKERS, "ps": ["a:1"]}), JOBS, "a job 'ps'"),
    "evaluator": (config({"worker": WORKERS, "evaluator": ["a:1"]}), JOBS, "a job 'evaluator'"),
    "master": (config({"master": ["a:1"]}), JOBS, "a job 'master'"),
    "two chiefs": (config({"chief": WORKERS}), "have at most one chief", str(WORKERS)),
    "twice": (
        config({"worker": ["a:1", "b:1", "a:1"]}),
        "give every task its own address",
        "['a:1'] more than once",
    ),
    "twice over jobs": (
        config({"worker": ["a:1"], "chief": ["a:1"]}),
        "give every task its own address",
        "['a:1'] more than once",
    ),
    "no list": (config({"worker": "a:1"}), ADDRESS, "a:1"),
    "no port": (config({"worker": ["a", "b:1"]}), ADDRESS, "['a', 'b:1']"),
    "empty port": (config({"worker": ["a:"]}), ADDRESS, "['a:']"),
    "no host": (config({"worker": [":1"]}), ADDRESS, "[':1']"),
    "port 0": (config({"worker": ["a:0"]}), ADDRESS, "['a:0']"),
    "port too large": (config({"worker": ["a:65536"]}), ADDRESS, "['a:65536']"),
    "number": (config({"worker": [2222]}), ADDRESS, "[2222]"),
    "no task": ({"cluster": {"worker": WORKERS}}, "hold an object as `task`", "None"),
    "task that is a list": (config(task=["worker", 0]), "hold an object as `task`", "['worker', 0"),
    "no such type": (of_task(type="chief", index=0), TYPE, "type 'chief'"),
    "type missing": (of_task(index=0), TYPE, "type None"),
    "type that is a list": (of_task(type=["worker"], index=0), TYPE, "type ['worker']"),
    "index missing": (of_task(type="worker"), INDEX, "index None"),
    "index too large": (of_task(type="worker", index=2), INDEX, "index 2"),
    "negative index": (of_task(type="worker", index=-1), INDEX, "index -1"),
    "negative string": (of_task(type="worker", index="-1"), INDEX, "index '-1'"),
    "bool": (of_task(type="worker", index=True), INDEX, "index True"),
    "float": (of_task(type="worker", index=1.0), INDEX, "index 1.0"),
    "word": (of_task(type="worker", index="one"), INDEX, "index 'one'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_tf_config_is_an_error(describe, case):
    value, rule, received = MALFORMED[case]
    describe(TF_CONFIG=value if case == "not JSON" else json.dumps(value))
    for use in (_cluster.find, tfbig.distribute.get_strategy):
        with pytest.raises(errors.ClusterError) as info:
            use()
        text = str(info.value)
        assert text.startswith(f"TF_CONFIG must {rule}")
        assert f"Received: {received}" in text
        assert 'Example: TF_CONFIG=\'{"cluster"' in text


# --- SLURM -------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "20123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
ADDRESSES = ["node1:11968", "node1:11969", "node2:11968", "node2:11969"]


def test_slurm_describes_the_job(describe):
    describe(**SLURM, SLURMD_NODENAME="node2")
    assert _cluster.find() == _cluster.Cluster({"worker": ADDRESSES}, "worker", 2, "SLURM")
    addresses = _cluster.find(port=7000).addresses["worker"]
    assert addresses == ["node1:7000", "node1:7001", "node2:7000", "node2:7001"]


def test_slurm_numbers_tasks_in_the_order_of_its_nodes(describe):
    # Not alphabetically, which would put node10 before node9.
    nodes = {"SLURM_STEP_NODELIST": "node[9-10],a", "SLURM_STEP_TASKS_PER_NODE": "1,2,1"}
    describe(**SLURM | nodes, SLURMD_NODENAME="node10")
    expected = ["node9:11968", "node10:11968", "node10:11969", "a:11968"]
    assert _cluster.find().addresses == {"worker": expected}


def test_a_step_of_one_task_is_not_a_multi_worker_job(describe):
    describe(**SLURM | {"SLURM_STEP_NUM_TASKS": "1"})
    assert _cluster.find() is None


def test_jobs_on_one_node_use_different_ports(describe):
    tasks = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    ports = []
    for number, step in itertools.product(range(20120, 20130), range(3)):
        describe(**SLURM | tasks | {"SLURM_JOB_ID": str(number), "SLURM_STEP_ID": str(step)})
        addresses = _cluster.find().addresses["worker"]
        ports += [int(address.split(":")[1]) for address in addresses if "node1:" in address]
    assert len(set(ports)) == 10 * 3 * 8
    assert 10_000 <= min(ports) <= max(ports) < 30_000


BROKEN = {
    "no rank": ({"SLURM_PROCID": None}, "SLURM_PROCID is missing"),
    "no nodes": ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is missing"),
    "no tasks": ({"SLURM_STEP_TASKS_PER_NODE": None}, "SLURM_STEP_TASKS_PER_NODE is missing"),
    "words": ({"SLURM_STEP_NUM_TASKS": "four"}, "'four'"),
    "empty": ({"SLURM_STEP_NUM_TASKS": ""}, "''"),
    "rank": ({"SLURM_PROCID": "4"}, "task 4 of 4 does not fit"),
    "few nodes": ({"SLURM_STEP_NODELIST": "node1"}, "['node1'] with [2, 2] tasks"),
    "many nodes": ({"SLURM_STEP_NODELIST": "n[1-3]"}, "['n1', 'n2', 'n3'] with [2, 2] tasks"),
    "many tasks": ({"SLURM_STEP_NUM_TASKS": "5"}, "task 2 of 5 does not fit"),
    "nodes": ({"SLURM_STEP_NODELIST": "node[1-"}, "node[1-"),
    "tasks": ({"SLURM_STEP_TASKS_PER_NODE": "2(x"}, "2(x"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_slurm_variables_are_an_error(describe, case):
    change, part = BROKEN[case]
    describe(**{k: v for k, v in (SLURM | change).items() if v is not None})
    with pytest.raises(errors.ClusterError, match="SLURM's variables do not describe") as info:
        _cluster.find()
    assert part in str(info.value)
    assert "Start the program with srun" in str(info.value)


def test_cyclic_distribution_of_tasks_is_an_error(describe):
    describe(**SLURM | {"SLURM_PROCID": "1"}, SLURMD_NODENAME="node2")
    with pytest.raises(errors.ClusterError, match="task 1 on node2, not on node1") as info:
        _cluster.find()
    assert "--distribution=block" in str(info.value)


# --- Kubernetes --------------------------------------------------------------

KUBERNETES = {
    "TFBIG_JOB": "digits-workers-0",
    "TFBIG_SERVICE": "digits",
    "TFBIG_WORKERS": "3",
    "JOB_COMPLETION_INDEX": "1",
}


def test_kubernetes_describes_the_job(describe):
    describe(**KUBERNETES)
    pods = [f"digits-workers-0-{i}.digits" for i in range(3)]
    addresses = {"worker": [f"{pod}:2222" for pod in pods]}
    assert _cluster.find() == _cluster.Cluster(addresses, "worker", 1, "Kubernetes")
    assert _cluster.find(port=7000).addresses["worker"] == [f"{pod}:7000" for pod in pods]


def test_tf_config_takes_precedence_over_kubernetes(describe):
    describe(**KUBERNETES, TF_CONFIG=json.dumps(config({"worker": WORKERS})))
    assert _cluster.find().source == "TF_CONFIG"


def test_the_index_of_a_pod_alone_is_not_a_job(describe):
    # Each pod may search or train on its own.
    describe(JOB_COMPLETION_INDEX="1", TFBIG_JOB="", TFBIG_SERVICE="", TFBIG_WORKERS="")
    assert _cluster.find() is None


OF_PODS = "JOB_COMPLETION_INDEX must be the index that Kubernetes gives the pods of indexed Jobs"
BROKEN_PODS = {
    "no job": ({"TFBIG_JOB": None}, "TFBIG_JOB must be the name of the Job. Received: nothing"),
    "no service": ({"TFBIG_SERVICE": ""}, "TFBIG_SERVICE must be the name of the headless service"),
    "no number": ({"TFBIG_WORKERS": None}, "TFBIG_WORKERS must be the Job's number of completions"),
    "no index": ({"JOB_COMPLETION_INDEX": None}, f"{OF_PODS}. Received: nothing"),
    "zero": ({"TFBIG_WORKERS": "0"}, "an integer >= 1. Received: '0'"),
    "two": ({"TFBIG_WORKERS": "two"}, "an integer >= 1. Received: 'two'"),
    "negative": ({"JOB_COMPLETION_INDEX": "-1"}, f"{OF_PODS}. Received: '-1'"),
    "few": ({"TFBIG_WORKERS": "1"}, "must be less than TFBIG_WORKERS=1. Received: 1"),
    # As written in a manifest that does not define what it refers to.
    "reference": (
        {"TFBIG_JOB": "$(JOB)"},
        "TFBIG_JOB must be the name of the Job. Received: '$(JO",
    ),
    "address": ({"TFBIG_SERVICE": "digits:2222"}, "Received: 'digits:2222'"),
}


@pytest.mark.parametrize("case", BROKEN_PODS)
def test_incomplete_variables_of_kubernetes_are_an_error(describe, case):
    change, part = BROKEN_PODS[case]
    describe(**{k: v for k, v in (KUBERNETES | change).items() if v is not None})
    with pytest.raises(errors.ClusterError, match="Kubernetes's variables do not") as info:
        tfbig.distribute.get_strategy()
    assert part in str(info.value)
    assert "scripts/jobset.yaml" in str(info.value)


# --- Waiting for the others --------------------------------------------------


def free_ports(count):
    """Returns ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def cluster_of(ports, index=0, job="worker"):
    addresses = [f"127.0.0.1:{port}" for port in ports]
    jobs = {"worker": addresses}
    if job == "chief":
        jobs = {"chief": addresses[:1], "worker": addresses[1:]}
    return _cluster.Cluster(jobs, job, index, "a test")


def in_threads(*functions):
    """Runs functions concurrently for up to 10 s; returns what each raised, or None."""
    raised = [TimeoutError()] * len(functions)

    def run(i):
        try:
            functions[i]()
            raised[i] = None
        except Exception as e:
            raised[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    return raised


def test_workers_wait_for_each_other():
    ports = free_ports(3)
    started = []

    def worker(index, delay):
        def run():
            time.sleep(delay)
            started.append(index)
            _cluster.wait_for_workers(cluster_of(ports, index), timeout=5)
            assert len(started) == 3, "continued before all were up"
            # Like TensorFlow's server, which takes over the port: others may still look for it.
            with socket.create_server(("127.0.0.1", ports[index])):
                time.sleep(0.5)

        return run

    assert in_threads(worker(0, 0), worker(1, 0.3), worker(2, 0.1)) == [None] * 3
    assert sorted(started) == [0, 1, 2]


@pytest.mark.parametrize("job", ["chief", "worker"])
def test_a_worker_that_does_not_start_is_named(job):
    ports = free_ports(3)
    start = time.monotonic()
    with (
        socket.create_server(("127.0.0.1", ports[1])),
        pytest.raises(errors.WorkerUnavailableError) as info,
    ):
        _cluster.wait_for_workers(cluster_of(ports, job=job), timeout=0.3)
    assert time.monotonic() - start >= 0.3
    missing = "worker 2" if job == "worker" else "worker 1"
    assert str(info.value).startswith(f"{missing} at 127.0.0.1:{ports[2]} did not start within")
    assert f"within 0.3 s; {job} 0 gives up" in str(info.value)
    assert str(ports[1]) not in str(info.value)


def test_unresponsive_machines_do_not_exceed_the_timeout(monkeypatch):
    now = [0.0]

    def pass_(seconds):
        now[0] += seconds

    def silent(address, timeout):
        pass_(timeout)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=pass_)
    monkeypatch.setattr(_cluster, "time", clock)
    with pytest.raises(errors.WorkerUnavailableError, match=r"worker 6 at .* did not start"):
        _cluster.wait_for_workers(cluster_of(free_ports(7)), timeout=0.3)
    # The first attempt takes the whole timeout, each of the others 0.01 s; there is one pause.
    assert now[0] == pytest.approx(0.3 + 5 * 0.01 + 0.1)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64, "a..b"])
def test_a_host_without_an_address_is_named(host, monkeypatch):
    # No name server is asked; invalid names fail before that.
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    cluster = _cluster.Cluster(
        {"worker": [f"127.0.0.1:{free_ports(1)[0]}", f"{host}:2222"]}, "worker", 0, "a test"
    )
    with pytest.raises(errors.WorkerUnavailableError, match=f"worker 1 at {host}:2222"):
        _cluster.wait_for_workers(cluster, timeout=0.1)


def looked_up(host, *args, **kwargs):
    host.encode("idna")
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_the_own_port_must_be_free(host):
    with socket.create_server((host, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(errors.ClusterError, match="worker 0 cannot listen at its") as info:
            _cluster.wait_for_workers(cluster_of([port, *free_ports(1)]), timeout=5)
    assert f"Received: 127.0.0.1:{port}" in str(info.value)
    assert "Another program may be using the port" in str(info.value)


def test_the_own_port_is_free_after_the_wait():
    ports = free_ports(2)
    with socket.create_server(("127.0.0.1", ports[1])):
        _cluster.wait_for_workers(cluster_of(ports), timeout=5)
        with socket.create_server(("127.0.0.1", ports[0])) as server:
            assert server.getsockname()[1] == ports[0]


# --- Choosing a strategy -----------------------------------------------------


@contextlib.contextmanager
def logged():
    """Collects the lines of tfbig's log."""
    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("tfbig")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def test_the_choice_is_logged_by_default():
    program = "import tfbig; tfbig.distribute.get_strategy('default')"
    done = job.finish(job.start([sys.executable, "-c", program]), 60)
    assert done.returncode == 0
    assert (DEFAULT + "as requested") in done.stderr.splitlines()


DEFAULT = "tfbig: DefaultDistributionStrategy, 1 replica(s), "
ONE_DEVICE = "tfbig: OneDeviceStrategy, 1 replica(s), as requested"


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("auto", {}, DEFAULT + "because there are 0 GPUs and no other workers"),
        ("default", {}, DEFAULT + "as requested"),
        ("one_device", {}, ONE_DEVICE),
        ("one_device", {"devices": "CPU:1"}, ONE_DEVICE),
        ("one_device", {"devices": "/job:localhost/replica:0/task:0/device:CPU:1"}, ONE_DEVICE),
        ("one_device", {"devices": "/cpu:0", "timeout": 0, "port": 65535}, ONE_DEVICE),
    ],
)
def test_one_line_logs_the_choice_and_the_reason(kind, options, line):
    with logged() as lines:
        strategy = tfbig.distribute.get_strategy(kind, **options)
    assert lines == [line]
    assert type(strategy).__name__.lstrip("_") == line.split()[1].rstrip(",")
    device = options.get("devices", "CPU:0")[-5:].upper()
    with strategy.scope():
        assert tf.Variable(1.0).device.endswith(device)


def test_a_job_of_one_worker_has_the_default_strategy(describe):
    describe(TF_CONFIG=json.dumps(config({"worker": WORKERS[:1]})))
    assert tfbig.distribute.get_strategy() is tf.distribute.get_strategy()


@pytest.mark.parametrize("devices", [2, ["CPU:0", "CPU:1"], ("/device:CPU:0", "cpu:1")])
def test_mirrored_replicas_use_the_given_devices(devices, monkeypatch):
    # A second MirroredStrategy would collide with the one of other tests.
    mirrored, made = make_strategy("mirrored_2"), []
    monkeypatch.setattr(
        tf.distribute, "MirroredStrategy", lambda names: made.append(names) or mirrored
    )
    with logged() as lines:
        strategy = tfbig.distribute.get_strategy("mirrored", devices=devices)
    assert strategy.num_replicas_in_sync == 2
    assert made == [["CPU:0", "CPU:1"] if devices == 2 else list(devices)]
    assert lines == ["tfbig: MirroredStrategy, 2 replica(s), as requested"]


def test_logical_cpus_are_made_before_tensorflow_starts():
    done = run_python("""
        import tensorflow as tf, tfbig
        print(tfbig.distribute.get_strategy("mirrored", devices=3).num_replicas_in_sync)
        try:
            tfbig.distribute.get_strategy("mirrored", devices=4)
        except tfbig.errors.InvalidOptionError as e:
            print(e)
        """)
    assert done.returncode == 0, done.stderr
    replicas, message = done.stdout.splitlines()
    assert replicas == "3"
    assert "pass at most devices=3. Received: devices=4" in message


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
        check=False,
    )


NAMES = "`devices` must name existing devices, each once: CPU:0, CPU:1, CPU:2, CPU:3"
NUMBER = "`devices` must be an integer >= 1 or a list of one or more device names"
ONE_NAME = "`devices` must be one device name, such as 'GPU:0'"
GOES_WITH = "`devices` requires kind='mirrored' or 'one_device'"
ONE_OF = "`kind` must be one of auto, tpu, multi_worker, mirrored, one_device, default"
TPU_NAME = "`tpu` must be a name, and requires kind='tpu'"
INVALID = [
    *((ONE_OF, {"kind": kind}) for kind in ("Mirrored", "", None, 2, ["auto"])),
    *((GOES_WITH, {"kind": k, "devices": 1}) for k in ("auto", "default", "multi_worker")),
    *((NUMBER, {"kind": "mirrored", "devices": d}) for d in (0, -1, True, 2.0, "CPU:0", [], ())),
    *(
        (NAMES, {"kind": "mirrored", "devices": d})
        for d in (["CPU:4"], ["CPU:0", "GPU:0"], ["foo"], [0], ["CPU:1", "/device:cpu:1"])
    ),
    *((ONE_NAME, {"kind": "one_device", "devices": d}) for d in (0, ["CPU:0"])),
    (TPU_NAME, {"kind": "auto", "tpu": "node"}),
    (TPU_NAME, {"kind": "tpu", "tpu": 8}),
    *((NAMES, {"kind": "one_device", "devices": d}) for d in ("CPU:4", "GPU:0", "foo", "")),
    *(
        ("`timeout` must be a number of seconds >= 0", {"timeout": t})
        for t in (-1, float("nan"), "10", None, True)
    ),
    *(("`port` must be an integer from 1 to 65535", {"port": p}) for p in (0, 65536, "1", 1.0)),
]


@pytest.mark.parametrize(("rule", "options"), INVALID, ids=repr)
def test_invalid_arguments_are_errors(rule, options):
    with pytest.raises(errors.InvalidOptionError) as info:
        tfbig.distribute.get_strategy(**options)
    assert str(info.value).startswith(rule)
    name = rule.split("`")[1]
    assert f"{name}={options[name]!r}." in str(info.value)


def test_more_logical_cpus_need_a_new_process():
    tf.constant(1.0)  # TensorFlow has started.
    with pytest.raises(errors.InvalidOptionError, match="TensorFlow has started") as info:
        tfbig.distribute.get_strategy("mirrored", devices=5)
    assert "pass at most devices=4. Received: devices=5" in str(info.value)


# --- Several workers ---------------------------------------------------------


def test_several_workers_need_a_description():
    with pytest.raises(errors.ClusterError, match="needs a description of the job") as info:
        tfbig.distribute.get_strategy("multi_worker")
    for remedy in ("python -m tfbig.launch --workers N", "srun", "JobSet"):
        assert remedy in str(info.value)


@pytest.fixture
def made(monkeypatch):
    """Records the resolvers of strategies over several workers, without making the strategies."""
    resolvers = []

    def make(resolver):
        resolvers.append(resolver)
        # TensorFlow's server does this.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return tf.distribute.get_strategy()

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", make)
    # It would stay with this process's strategy.
    monkeypatch.setattr("tfbig.distribute._stuck_workers.watch", lambda *_: None)
    return resolvers


@pytest.mark.parametrize("kind", ["auto", "multi_worker"])
def test_several_workers_wait_for_each_other(describe, made, kind):
    ports = free_ports(2)
    cluster = {"worker": [f"127.0.0.1:{p}" for p in ports]}
    describe(TF_CONFIG=json.dumps(config(cluster)))
    with pytest.raises(errors.WorkerUnavailableError, match=r"worker 1 .* within 0\.1 s"):
        tfbig.distribute.get_strategy(kind, timeout=0.1)
    assert made == []
    handler = signal.getsignal(signal.SIGTERM)
    with logged() as lines, socket.create_server(("127.0.0.1", ports[1])):
        tfbig.distribute.get_strategy(kind, timeout=5)
    assert [r.cluster_spec().as_dict() for r in made] == [cluster]
    assert lines == [DEFAULT + "because TF_CONFIG lists 2 workers; this is worker 0"]
    # SIGTERM still ends the program.
    assert signal.getsignal(signal.SIGTERM) == handler


def test_the_port_under_slurm_can_be_set(describe, made):
    describe(**SLURM | {"SLURM_PROCID": "0"})
    (port,) = free_ports(1)
    with pytest.raises(errors.WorkerUnavailableError, match=f"worker 1 at node1:{port + 1}"):
        # With 0 s, no name server is asked for node1.
        tfbig.distribute.get_strategy(port=port, timeout=0)
    assert made == []


def test_a_job_of_one_worker_is_made_on_request(describe, made):
    describe(TF_CONFIG=json.dumps(config({"worker": WORKERS[:1]})))
    tfbig.distribute.get_strategy("multi_worker", timeout=0)
    assert [r.cluster_spec().as_dict() for r in made] == [{"worker": WORKERS[:1]}]


def test_a_strategy_made_too_late_is_explained(describe, monkeypatch):
    def too_late(resolver):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("Collective ops must be configured at program startup")

    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", too_late)
    describe(TF_CONFIG=json.dumps(config({"worker": WORKERS[:1]})))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(errors.ClusterError, match="before TensorFlow runs anything else") as info:
        tfbig.distribute.get_strategy("multi_worker")
    assert "Collective ops must be configured" in str(info.value)
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("job", "index", "chief"), [("chief", 0, True), ("worker", 0, False), ("worker", 1, False)]
)
def test_the_job_s_chief_is_the_chief(job, index, chief):
    jobs = {"worker": ["b:1", "c:1"], "chief": ["a:1"]}
    strategy = of_resolver(_cluster.Cluster(jobs, job, index, "a test").resolver())
    assert tfbig.distribute.is_chief(strategy) is chief


@pytest.mark.parametrize(("index", "chief"), [(0, True), (1, False)])
def test_without_a_chief_the_first_worker_is_the_chief(index, chief):
    strategy = of_resolver(cluster_of([1, 2], index).resolver())
    assert tfbig.distribute.is_chief(strategy) is chief


def of_resolver(resolver):
    """Returns the part of a strategy that `is_chief` looks at."""
    return types.SimpleNamespace(cluster_resolver=resolver)


@pytest.mark.parametrize("name", ["default", "one_device", "mirrored_2"])
def test_a_single_process_is_the_chief(name):
    assert tfbig.distribute.is_chief(make_strategy(name)) is True


# --- TPUs ----------------------------------------------------------------------


def test_tensorflow_without_tpus_says_what_to_install():
    with pytest.raises(errors.ClusterError, match=r"does not support TPUs.*tensorflow-tpu==2\.20"):
        tfbig.distribute.get_strategy("tpu")


@pytest.fixture
def built_for_tpus(monkeypatch):
    """Pretends to support TPUs; returns a function that sets the error of connecting."""
    monkeypatch.setattr(_tpu, "_REQUIRED_OPERATIONS", ("MatMul",))
    monkeypatch.delenv("TPU_NAME", raising=False)
    asked = []

    def connecting(error):
        def resolver(tpu):
            asked.append(tpu)
            raise error

        monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", resolver)
        return asked

    return connecting


@pytest.mark.parametrize(
    "error", [ValueError("of name"), OSError("of host"), tf.errors.NotFoundError(None, None, "op")]
)
def test_a_missing_tpu(error, built_for_tpus, monkeypatch):
    asked = built_for_tpus(error)
    with pytest.raises(errors.ClusterError, match="No TPU was found on this machine"):
        tfbig.distribute.get_strategy("tpu")
    with pytest.raises(errors.ClusterError, match=r"under the name 'mine'.*TPU_NAME"):
        tfbig.distribute.get_strategy("tpu", tpu="mine")
    monkeypatch.setenv("TPU_NAME", "pod")
    with pytest.raises(errors.ClusterError, match="under the name 'pod'"):
        tfbig.distribute.get_strategy("tpu")
    assert asked == ["local", "mine", "pod"]
    # A TPU has been named, so "auto" asks for it.
    with pytest.raises(errors.ClusterError, match="under the name 'pod'"):
        tfbig.distribute.get_strategy()
    monkeypatch.setattr(_tpu, "_REQUIRED_OPERATIONS", ("NoSuchOperation",))
    assert type(tfbig.distribute.get_strategy()).__name__ == "_DefaultDistributionStrategy"
