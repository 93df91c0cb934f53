"""A worker that has joined its job waits to be ended: listening.py DIRECTORY.

Leaves the addresses of the job.
"""

import json
import os
import signal
import sys

import tfbig
from tests import job


def main(directory):
    tfbig.distribute.get_strategy("multi_worker", timeout=60)
    job.leave(directory, json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
