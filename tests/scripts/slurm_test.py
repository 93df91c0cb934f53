"""`sbatch scripts/train.sbatch` on a cluster of two nodes, which is made for it."""

import re
import sys
import time

import pytest

from tests import job
from tests.scripts import slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = job.ROOT / "scripts" / "train.sbatch"
UPDATES = 120


@pytest.fixture(scope="module")
def cluster():
    if why := slurm.missing():
        pytest.skip(f"no SLURM: {why}")
    cluster = slurm.Cluster()
    yield cluster
    cluster.end()


class Run:
    """A job that runs the script."""

    def __init__(self, cluster, directory, script=SCRIPT):
        # The script is submitted from the repository, and writes there.
        (directory / "scripts").symlink_to(job.ROOT / "scripts")
        (directory / ".venv").symlink_to(sys.prefix)
        self.cluster, self.directory = cluster, directory
        cluster.wait_for_nodes("idle", "idle")
        self.number = cluster.submit(script, directory=directory)

    @property
    def backup(self):
        return list((self.directory / "runs" / "slurm" / "backup").glob("*.npz"))

    @property
    def output(self):
        return (self.directory / f"{self.number}.out").read_text()

    def wait_for_backup(self):
        deadline = time.monotonic() + 200
        while not self.backup:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def reaches_the_bar(self):
        """Waits for its end; returns how often it was restarted."""
        shown = self.cluster.wait_for_job(self.number, "COMPLETED", "FAILED", timeout=400)
        assert shown["JobState"] == "COMPLETED", self.output
        values = dict(re.findall(r"^(\w[\w ]*\w)  +([\d.]+)$", self.output, flags=re.MULTILINE))
        assert (values["replicas"], values["updates"]) == ("2", str(UPDATES))
        assert float(values["validation accuracy"]) >= 0.97
        return int(shown["Restarts"])

    def preemptions(self):
        """Epochs of the backups that were taken because of a signal."""
        # Both workers say so.
        found = re.findall(r"preempted after batch \d+ of epoch (\d+)", self.output)
        return sorted(set(map(int, found)))

    def epochs_after_preemption(self):
        """The epochs that were begun after that."""
        later = self.output.partition("preempted after")[2]
        return [int(number) for number in re.findall(r"Epoch (\d+)/", later)]


def test_two_nodes_reach_the_bar(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    assert run.reaches_the_bar() == 0
    assert run.preemptions() == []


def test_a_job_that_is_queued_again_resumes(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    run.wait_for_backup()
    cluster.run("scontrol", "requeue", run.number)
    assert run.reaches_the_bar() == 1
    (epoch,) = run.preemptions()
    assert run.epochs_after_preemption()[0] >= epoch


def test_a_job_takes_a_backup_before_its_time_is_over_and_queues_itself(cluster, tmp_path):
    # Longer than the time that it gets.
    script = tmp_path / "train.sbatch"
    script.write_text(SCRIPT.read_text().replace("--task=digits", "--task=digits --epochs=9999"))
    run = Run(cluster, tmp_path, script=script)
    run.wait_for_backup()
    # From now on, there are less than the 120 s of the script's --signal.
    cluster.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=2")
    cluster.wait_for_job(run.number, "PENDING", timeout=100)
    (epoch,) = run.preemptions()
    cluster.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=UNLIMITED")
    shown = cluster.wait_for_job(run.number, "RUNNING", timeout=100)
    assert shown["Restarts"] == "1"
    deadline = time.monotonic() + 100
    while not (epochs := run.epochs_after_preemption()):
        assert time.monotonic() < deadline, run.output
        time.sleep(0.2)
    assert epochs[0] >= epoch
    cluster.run("scancel", run.number)


def test_a_cancelled_job_ends_everywhere_and_does_not_return(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    run.wait_for_backup()
    assert len(job.alive(f"{tmp_path}/.venv/bin/python")) >= 2
    cluster.run("scancel", run.number)
    cluster.wait_for_nodes("idle", "idle")
    assert job.alive(f"{tmp_path}/.venv/bin/python") == []
    shown = cluster.wait_for_job(run.number, "CANCELLED", timeout=30)
    assert shown["Restarts"] == "0"
    assert len(run.backup) == 1


def test_a_job_resumes_when_a_dead_node_is_back(cluster, tmp_path):
    run = Run(cluster, tmp_path)
    run.wait_for_backup()
    cluster.kill_node(2)
    cluster.start_node(2)
    assert run.reaches_the_bar() >= 1
    assert "another worker ended" in run.output
