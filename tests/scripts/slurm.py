"""A SLURM cluster on this machine: a controller and nodes with networks and names of their own.

Each of them is a process with its own network, host name, mounts and processes (`unshare`), which
ends with all that runs in it. So nothing is left of the cluster but its directory.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from tests import job

PROGRAMS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "scontrol",
    "munged",
    "ip",
    "unshare",
    "nsenter",
    "setpriv",
)
NETWORK = "10.231.0"

CONFIGURATION = """
ClusterName=tfbig
SlurmctldHost=controller({network}.1)
NodeName=n1 NodeAddr={network}.2 CPUs=1
NodeName=n2 NodeAddr={network}.3 CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE

SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none

StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/%n
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/%n.log

# Soon, so that the tests do not wait.
SlurmdTimeout=15
KillWait=20
ReturnToService=2
"""


def missing():
    """Why there can be no cluster here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can make networks and start the daemons"
    absent = [name for name in PROGRAMS if not _path(name)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _path(program):
    # The daemons are where only root looks.
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Machine:
    """A network, a host name and the processes that have them."""

    # The first process of a machine has to wait for those that lose their parents.
    INIT = "while :; do sleep 1000 & wait; done"

    def __init__(self, name, hosts):
        own = ["--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self.name = name
        self.daemons = []
        # It dies with the tests, even if they are killed.
        dies = ["setpriv", "--pdeathsig=KILL"]
        self.process = subprocess.Popen([*dies, "unshare", *own, "sh", "-c", self.INIT])
        deadline = time.monotonic() + 10
        while not (children := job.children(self.process.pid)):
            assert self.process.poll() is None, "namespaces cannot be made"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (self.pid,) = children
        # It has them before its shell runs.
        while pathlib.Path(f"/proc/{self.pid}/comm").read_text() != "sh\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.run("hostname", name)
        self.run("mount", "--bind", hosts, "/etc/hosts")
        self.ip("link", "set", "lo", "up")

    def command(self, *command):
        return ["nsenter", "-t", self.pid, "-n", "-u", "-m", "-p", _path(command[0]), *command[1:]]

    def run(self, *command, check=True, **options):
        line = [str(part) for part in self.command(*command)]
        return subprocess.run(
            line, check=check, capture_output=True, text=True, timeout=60, **options
        )

    def ip(self, *arguments):
        """Configures its network, from outside: only there it can be connected to another."""
        line = ["nsenter", "-t", self.pid, "-n", _path("ip"), *arguments]
        subprocess.run([str(part) for part in line], check=True, timeout=60)

    def start(self, *command, env=None):
        """Starts a daemon, which writes to files."""
        line = [str(part) for part in self.command(*command)]
        none = subprocess.DEVNULL
        daemon = subprocess.Popen(line, env=env, stdin=none, stdout=none, stderr=none)
        self.daemons.append(daemon)

    def kill(self):
        """Ends all its processes at once, and its network with them."""
        self.process.kill()
        for process in (self.process, *self.daemons):
            process.wait(timeout=30)


class Cluster:
    """A controller and two nodes, n1 and n2.

    Attributes:
        directory: What its daemons write.
    """

    def __init__(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="slurm"))
        # munged insists on a socket that all users reach.
        self.directory.chmod(0o755)
        self.machines = {}
        self.environment = job.environment(SLURM_CONF=str(self.directory / "slurm.conf"))
        hosts = {"localhost": "127.0.0.1", "controller": f"{NETWORK}.1"}
        hosts |= {"n1": f"{NETWORK}.2", "n2": f"{NETWORK}.3"}
        self.hosts = self.directory / "hosts"
        self.hosts.write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        try:
            self._start()
        except BaseException:
            self.end()
            raise

    def _start(self):
        (self.directory / "slurm.conf").write_text(
            CONFIGURATION.format(network=NETWORK, directory=self.directory)
        )
        (self.directory / "state").mkdir()
        (self.directory / "munge.key").write_bytes(os.urandom(128))
        (self.directory / "munge.key").chmod(0o400)
        controller = Machine("controller", self.hosts)
        self.machines["controller"] = controller
        controller.ip("link", "add", "bridge", "type", "bridge")
        controller.ip("address", "add", f"{NETWORK}.1/24", "dev", "bridge")
        controller.ip("link", "set", "bridge", "up")
        files = [
            f"--{name}-file={self.directory}/munge.{name}" for name in ("key", "log", "pid", "seed")
        ]
        controller.start(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.directory}/munge.socket",
            *files,
        )
        self._wait(lambda: (self.directory / "munge.socket").exists(), 20)
        controller.start("slurmctld", "-D", env=self.environment)
        for number in (1, 2):
            self.start_node(number)
        self.wait_for_nodes("idle", "idle")

    def start_node(self, number):
        """Starts a node, which may have died before."""
        controller = self.machines["controller"]
        node = self.machines[f"n{number}"] = Machine(f"n{number}", self.hosts)
        own = f"to_n{number}"
        controller.ip("link", "add", own, "type", "veth", "peer", "name", "eth0", "netns", node.pid)
        controller.ip("link", "set", own, "master", "bridge", "up")
        node.ip("address", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
        node.ip("link", "set", "eth0", "up")
        node.start("slurmd", "-D", "-N", node.name, env=self.environment)

    def kill_node(self, number):
        """Takes the power from a node; returns when the controller has noticed."""
        self.machines[f"n{number}"].kill()
        states = ["idle", "idle"]
        states[number - 1] = "down*"
        self.wait_for_nodes(*states, timeout=120)

    def wait_for_nodes(self, *states, timeout=60):
        """Waits until the nodes have these states, such as "idle"."""

        def reached():
            shown = self.run("sinfo", "--Node", "--noheader", "--format=%T").stdout.split()
            return shown == list(states)

        self._wait(reached, timeout)

    def run(self, *command, **options):
        """Runs a program of SLURM on the controller's machine."""
        return self.machines["controller"].run(*command, env=self.environment, **options)

    def submit(self, script, *options, directory):
        """Submits a job that runs in a directory; returns its number."""
        options = ["--parsable", f"--chdir={directory}", f"--output={directory}/%j.out", *options]
        return self.run("sbatch", *options, script).stdout.strip()

    def shown(self, number):
        """What SLURM shows of a job: a dictionary of its fields."""
        text = self.run("scontrol", "show", "job", number).stdout
        return dict(part.partition("=")[::2] for part in text.split())

    def wait_for_job(self, number, *states, timeout):
        """Waits until a job has one of these states; returns what SLURM shows of it."""
        deadline = time.monotonic() + timeout
        hurried = set()
        while (shown := self.shown(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{shown}\n{self.logs()}"
            if shown["Reason"] == "BeginTime" and shown["Restarts"] not in hurried:
                # SLURM would wait two minutes before a job that was queued again.
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now+30")
                hurried.add(shown["Restarts"])
            time.sleep(0.5)
        return shown

    def _wait(self, condition, timeout):
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def logs(self):
        """The ends of all logs of the daemons."""
        return "\n".join(
            f"{path}:\n{path.read_text()[-2000:]}" for path in self.directory.glob("*.log")
        )

    def end(self):
        """Ends everything, and removes what is left."""
        for machine in self.machines.values():
            machine.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
