"""Jobs of TensorFlow that `tfbig.launch` starts: who reaches them, and who may be missing."""

import itertools
import re
import socket
import sys
import time

import numpy as np
import pytest

from tests import job
from tests.jobs import elastic
from tfbig.launch import _private_network


@pytest.mark.slow
@pytest.mark.parametrize("network", ["host", "private"])
def test_who_reaches_a_server_of_tensorflow(network, tmp_path):
    if network == "private":
        try:
            _private_network.PrivateNetwork().close()
        except _private_network.PrivateNetworkError as e:
            pytest.skip(f"no private network: {e}")
    options = ["--network", network]
    process = job.start(job.launcher("listening", tmp_path, options=options))
    try:
        deadline = time.monotonic() + 120
        while len(job.results(tmp_path)) < 2:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # The workers have reached one another. Who else does?
        for address in job.results(tmp_path)[0]:
            host, port = address.split(":")
            if network == "host":
                socket.create_connection((host, int(port)), timeout=5).close()
            else:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((host, int(port)), timeout=5)
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert job.alive(str(tmp_path)) == []


@pytest.mark.slow
def test_a_job_that_loses_workers_ends_as_if_it_had_not(tmp_path):
    for name in ("whole", "lost"):
        (tmp_path / name).mkdir()
    alone = [sys.executable, job.JOBS / "elastic.py", tmp_path / "whole"]
    done = job.finish(job.start(alone), 120)
    assert done.returncode == 0, done.stderr
    options = ["--min_workers", 2, "--max_restarts", 3]
    done = job.run("elastic", tmp_path / "lost", workers=3, options=options, timeout=300)
    assert done.returncode == 0, done.stderr
    updates = [tuple(map(int, u)) for u in re.findall(r"(\d) workers, update (\d+)", done.stdout)]
    assert [workers for workers, _ in itertools.groupby(updates, lambda u: u[0])] == [3, 2, 3]
    assert {update for _, update in updates} == set(range(1, elastic.UPDATES + 1))
    whole, lost = (np.load(tmp_path / name / "end.npy") for name in ("whole", "lost"))
    np.testing.assert_allclose(lost, whole, rtol=0, atol=1e-10)
