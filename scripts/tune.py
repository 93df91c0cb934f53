"""Searches the hyperparameters of a task with tfbig, with any of its tuners.

Every trial is kept in `--output_dir`: a search that was interrupted, even killed,
resumes when it is started again with the same flags. Several processes with the
same flags share one search:

    python scripts/tune.py --tuner=bayesian --max_trials=20
    python -m tfbig.launch --workers 2 --independent \\
        scripts/tune.py --tuner=bayesian --max_trials=20 --threads=1

The output directory then holds the study, the weights of the best trials and report.html.
"""

import command_line
from absl import flags
from tuning import PROGRAM, search, settings

# TensorFlow, Keras and tfbig take seconds to import, which `--help` and a mistyped flag should
# not. So they are imported after the flags are checked.

flags.adopt_module_key_flags(settings)


if __name__ == "__main__":
    command_line.run(
        PROGRAM, lambda: search.tune(settings.prepare_output_dir()), "no trial has begun"
    )
