"""Environments for what a user would pick instead of tfbig, made on demand."""

import pathlib
import shutil
import subprocess
import sys
from importlib import metadata

ROOT = pathlib.Path(__file__).parents[2]
_SECONDS = 1800  # Gigabytes may be downloaded.

# pip's own settings (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) say where the CPU build of PyTorch is:
# by default Linux gets the build with CUDA, gigabytes that stay unused.
_REQUIREMENTS = {
    "torch": ("torch==2.13.0", "accelerate==1.15.0", "numpy==2.4.6"),
    "jax": ("jax==0.10.2", "jaxlib==0.10.2", "numpy==2.4.6"),
}
PEERS = tuple(_REQUIREMENTS)


class UnavailableError(Exception):
    """An environment cannot be made; the message says why, in one line."""


def requirements(peer: str) -> tuple[str, ...]:
    """What pip installs for a peer, each with its version."""
    # The same Keras as under tfbig.
    keras = (f"keras=={metadata.version('keras')}",) if peer == "jax" else ()
    return _REQUIREMENTS[peer] + keras


def run(command: list[str], purpose: str) -> None:
    """Runs pip or the like.

    Raises:
        UnavailableError: If it fails.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UnavailableError(f"{purpose}: {e}") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        # pip prints the cause as ERROR lines, and hints after them.
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].strip() if errors else f"exit code {done.returncode}"
        raise UnavailableError(f"{purpose}: {reason}")


def python(peer: str, directory: pathlib.Path | str = ROOT) -> pathlib.Path:
    """Path of the interpreter that has a peer; makes its environment if there is none.

    Args:
        peer: One of `PEERS`.
        directory: Where `.venv-PEER` is or will be.

    Raises:
        UnavailableError: If it cannot be made.
    """
    environment = pathlib.Path(directory) / f".venv-{peer}"
    interpreter = environment / "bin" / "python"
    wanted = requirements(peer)
    # Written last, so that an interrupted attempt is repeated.
    stamp = environment / "installed.txt"
    if stamp.exists() and stamp.read_text().split() == list(wanted):
        return interpreter
    print(f"making {environment}: {', '.join(wanted)}", file=sys.stderr, flush=True)
    run([sys.executable, "-m", "venv", "--clear", str(environment)], f"python -m venv for {peer}")
    (environment / ".gitignore").write_text("*\n")
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        run([*install, *wanted], f"pip install for {peer}")
    except BaseException:
        # Even half of PyTorch is large.
        shutil.rmtree(environment, ignore_errors=True)
        raise
    stamp.write_text("\n".join(wanted) + "\n")
    return interpreter
