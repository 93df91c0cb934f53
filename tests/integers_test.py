"""Every option that is an integer takes those of NumPy, and nothing that is none."""

import json
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

import tfbig
from tfbig import callbacks, distribute, errors
from tfbig._update import attention_option, batch_split, capacity, head_option, replicas
from tfbig.callbacks import _batch_sizes
from tfbig.distribute import _strategy
from tfbig.tuners import (
    _asha,
    _budget,
    _hyperband,
    _options,
    _oracle,
    _population_oracle,
    _process_memory,
    _samplers,
    _widths,
)


def attribute(cls, option, name, *args):
    """An attribute of an object that is made with an option of another name."""
    return lambda value: getattr(cls(*args, **{option: value}), name)


def attributes(cls, names, *args):
    return {f"{cls.__name__}, {name}": attribute(cls, name, name, *args) for name in names}


def devices(value):
    with (
        mock.patch.object(_strategy, "_make_logical_cpus"),
        mock.patch.object(tf.distribute, "MirroredStrategy", len),
    ):
        return _strategy._mirrored(value)


# By name: what takes an option, and returns it as the package keeps it.
OPTIONS = {
    **attributes(batch_split.BatchSplit, ["gradient_accumulation_steps", "micro_batch_size"]),
    "head_chunk_size": head_option.checked,
    "attention_chunk_size": attention_option.checked,
    "memory_budget": capacity.checked_budget,
    "exchange_bucket_bytes": replicas.checked_bucket_bytes,
    **attributes(
        tfbig.DynamicLossScale, ["growth_interval", "hysteresis", "max_consecutive_skips"]
    ),
    **attributes(
        callbacks.SpikeGuard,
        ["window", "warm_up", "patience", "max_rollbacks", "snapshot_every"],
    ),
    **attributes(callbacks.BackupAndRestore, ["save_freq", "keep"], "directory"),
    **attributes(callbacks.TrainingMonitor, ["frequency"], "directory"),
    "batch size": lambda value: _batch_sizes.policy_of({0: value}, None, None).first,
    "interval": lambda value: _batch_sizes.policy_of("noise_scale", (4, 8), value).interval,
    **attributes(distribute.Pipeline, ["in_flight", "max_parameters"], ["CPU:0", "CPU:1"]),
    "devices": devices,
    "port": _strategy._checked_port,
    **attributes(_budget.Limits, ["max_total_epochs", "patience"]),
    "process_memory": _process_memory.checked,
    **attributes(_oracle.StudyOracle, ["max_trials", "seed"], "loss"),
    "executions_per_trial": lambda v: _options.checked_tuner_options(v, None, 1, False)[0],
    "folds": lambda v: _options.checked_tuner_options(1, v, 1, False)[1],
    "keep_best_k": lambda v: _options.checked_tuner_options(1, None, v, False)[2],
    **attributes(_asha.ASHAOracle, ["max_epochs"], "loss"),
    "ASHAOracle, min_epochs": lambda v: _asha.ASHAOracle("loss", min_epochs=v)._epochs[0],
    "ASHAOracle, factor": attribute(_asha.ASHAOracle, "factor", "_factor", "loss"),
    **attributes(_hyperband.HyperbandOracle, ["max_epochs"], "loss"),
    "HyperbandOracle, factor": attribute(_hyperband.HyperbandOracle, "factor", "_factor", "loss"),
    "hyperband_iterations": lambda v: len(
        _hyperband.HyperbandOracle("loss", max_epochs=1, hyperband_iterations=v)._brackets
    ),
    **attributes(_population_oracle.PopulationOracle, ["population_size", "max_epochs"], "loss"),
    "epochs_per_generation": lambda v: _population_oracle.PopulationOracle(
        "loss", epochs_per_generation=v
    ).generations[0],
    "num_initial_points": lambda v: _samplers.beginning_at_random("tpe", v).make.keywords[
        "n_startup_trials"
    ],
    "scale_width": lambda v: _widths.Widths.of((v, 100)).search,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_integer_of_numpy_is_an_integer(option):
    found = OPTIONS[option](np.int64(4))
    assert (found, type(found)) == (4, int)


@pytest.mark.parametrize("value", [True, np.True_, 2.5, "4"], ids=repr)
@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_no_integer_is_refused(option, value):
    with pytest.raises(errors.InvalidOptionError, match="integer"):
        OPTIONS[option](value)


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "memory_budget"])
def test_a_whole_float_is_no_integer(option):
    with pytest.raises(errors.InvalidOptionError, match="integer"):
        OPTIONS[option](4.0)


def test_a_number_of_retries_may_be_of_numpy():
    scale = tfbig.DynamicLossScale(retry=np.int64(4), hysteresis=np.int64(2))
    assert type(scale.retry) is int
    assert tfbig.DynamicLossScale(**json.loads(json.dumps(scale.get_config()))) == scale
    for value in (0, 4.0, "4"):
        with pytest.raises(errors.InvalidOptionError, match="`retry` must be a bool or an integer"):
            tfbig.DynamicLossScale(retry=value)
