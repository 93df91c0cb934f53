"""Starts a multi-worker job on this machine: `python -m tfbig.launch --workers N script.py ...`.

Every worker is a process with its own `TF_CONFIG`, which `tfbig.distribute.get_strategy` reads.
Each line of output is labeled with its worker. The first worker that fails ends the job: its exit
code becomes the launcher's, and all other workers are ended. `--max_restarts R` restarts the job
up to R times; a program that backs up with `tfbig.callbacks.BackupAndRestore` resumes where it
was. With `--min_workers M`, a restart leaves out workers that fail again and again.

TensorFlow's workers listen on all interfaces of the machine, and do whatever they are told by
whoever connects. `--network=private` starts them in a network of their own.

With `--independent` the workers do not form a job: each runs the program on its own, like the
processes of a search, with a GPU of its own if there are any. A worker that fails does not affect
the others; `--max_restarts R` allows R restarts, counted over all workers.

On several machines, SLURM or Kubernetes starts the processes; see docs/strategies.md.
"""

from tfbig.launch._command_line import main

__all__ = ("main",)
