"""Parametrized models on two workers: the updates of one process."""

import pytest

from tests import job
from tests.mup.update_test import ADAM_RATES, SGD_RATES

RATES = {"sgd": SGD_RATES, "adamw": ADAM_RATES}


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    done = job.run("widths", tmp_path, *RATES, timeout=300)
    assert done.returncode == 0, done.stderr
    results = job.results(tmp_path)
    assert len(results) == 2
    for result in results:
        assert len(result) == 6
        for name, found in result.items():
            assert found["learning_rates"] == RATES[name.partition(",")[0]], name
            assert found["scales"], name
            assert found["deviation"] < 1e-10, (name, found)
