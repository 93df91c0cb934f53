"""Where the numbers of a benchmark come from."""

from __future__ import annotations

import dataclasses
import datetime
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from importlib import metadata

from benchmarks import peers

_ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Provenance:
    """What one must know to repeat a measurement.

    Attributes:
        command: As one types it in the root of the repository.
        date: Of the start, in UTC.
        commit: Of the repository, and whether files differ from it.
        machine: Model of the processor, cores, memory, system.
        versions: What is installed, by name.
    """

    command: str
    date: str
    commit: str
    machine: str
    versions: dict[str, str]

    def lines(self) -> list[str]:
        """The same as lines of Markdown."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"Command: `{self.command}`",
            f"Date: {self.date}",
            f"Commit: {self.commit}",
            f"Machine: {self.machine}",
            f"Versions: {versions}",
        ]


def collect(program: str, packages: tuple[str, ...], peer_names: list[str]) -> Provenance:
    """The provenance of a measurement that begins now.

    Args:
        program: Path of the program that measures.
        packages: Packages of this environment, as pip names them.
        peer_names: Peers that are measured too.
    """
    path = pathlib.Path(program).resolve()
    name = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path
    versions = {"Python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in packages}
    for peer in peer_names:
        versions |= dict(wanted.split("==") for wanted in peers.requirements(peer))
    return Provenance(
        command=f"python {name} {shlex.join(sys.argv[1:])}".strip(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        commit=_commit(),
        machine=f"{_processor()}, {_cores()}, {_memory()}, {platform.system()}",
        versions=versions,
    )


def _commit() -> str:
    commit = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if not commit:
        return "unknown (no git repository)"
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain")
    return f"`{commit}`" + (", with uncommitted changes" if changed else "")


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    name = _output("sysctl", "-n", "machdep.cpu.brand_string")  # macOS.
    return name or platform.processor() or platform.machine()


def _cores() -> str:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return f"{count} cores" if usable == count else f"{usable} of {count} cores"


def _memory() -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{memory / 2**30:.1f} GiB of memory"


def _output(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()
