"""Trains parametrized models on all workers.

    widths.py DIRECTORY OPTIMIZER...

Leaves, for each optimizer and set of options, how much the weights deviate from those
of plain Keras in one process, and whether what is multiplied at each weight is the same.
"""

import sys

import keras
import numpy as np

import tfbig
from tests import job
from tests.mup import models
from tests.mup.update_test import make_optimizer, trained

OPTIONS = {
    "whole": {},
    "cut": {"gradient_accumulation_steps": 2, "loss_scale": "dynamic"},
    "sharded": {"shard": "optimizer"},
}


def scales(model):
    return [list(vars(scale).values()) for scale in tfbig.mup.scales(model).values()]


def main(directory, *optimizers):
    keras.config.set_floatx("float64")
    strategy = tfbig.distribute.get_strategy(timeout=60)
    results = {}
    for optimizer in optimizers:
        alone = models.parametrized(make_optimizer(optimizer))
        expected_scales, expected = scales(alone), trained(alone)
        for kind, options in OPTIONS.items():
            with strategy.scope():
                model = models.parametrized(make_optimizer(optimizer), tfbig.Model, **options)
            found = trained(model)
            results[f"{optimizer}, {kind}"] = {
                "deviation": max(
                    float(np.max(np.abs(a - b))) for a, b in zip(found, expected, strict=True)
                ),
                "scales": scales(model) == expected_scales,
                "learning_rates": [
                    scale.learning_rate for scale in tfbig.mup.scales(model).values()
                ],
            }
    job.leave(directory, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
