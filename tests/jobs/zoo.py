"""Trains programs of the zoo on all workers.

    zoo.py DIRECTORY PROGRAM...

Each with SGD and with its own optimizer. Leaves digests of the results and, on the chief, the
deviations from plain Keras on one device.
"""

import sys
import warnings

import keras

import tfbig
from tests import job
from tests.jobs.exactness import digest
from tests.zoo import program, trained


def main(directory, *names):
    keras.config.set_floatx("float64")
    warnings.filterwarnings("ignore", "`gradient_accumulation_steps` is larger")
    program.load()
    strategy = tfbig.distribute.get_strategy(timeout=60)
    result = {"replicas": strategy.num_replicas_in_sync, "digests": {}, "deviations": {}}
    for name in names:
        zoo_program = program.PROGRAMS[name]
        for label, optimizer in (("sgd", "sgd"), ("own", zoo_program.adaptive)):
            keras.backend.clear_session()
            # Every worker, for the weights to begin with.
            plain = trained.plain(name, optimizer)
            keras.backend.clear_session()
            with strategy.scope():
                training = trained.Training(
                    zoo_program, optimizer, plain.initial, gradient_accumulation_steps=2
                )
                found = training.run()
            result["digests"][f"{name}/{label}"] = digest(found)
            if tfbig.distribute.is_chief(strategy):
                result["deviations"][f"{name}/{label}"] = found.deviation(plain.result)
    job.leave(directory, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
