"""Trains a task with tfbig on whatever devices there are.

`--batch_size` is the effective batch: all samples of one update, over all
replicas. How it is split, and over how many replicas, changes time and memory,
not the mathematics.

    python scripts/train.py --batch_size=512 --micro_batch_size=32 \\
        --strategy=mirrored --replicas=2 --precision=mixed_float16
    python scripts/train.py --task=language
    python scripts/train.py --task=speech --micro_batch_size=auto

The output directory then holds history.csv, model.keras and, with matplotlib, curves.png, and in
`monitor` what `tfbig.callbacks.TrainingMonitor` writes about every second. `--resume` resumes an
interrupted run. At its end a run says whether it reached the bar of its task.
"""

import signal
import sys

import command_line
from absl import flags
from training import PROGRAM, directory, long_runs, settings

# TensorFlow, Keras and tfbig take seconds to import, which `--help` and a mistyped flag should
# not. So they are imported after the flags are checked.

flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(long_runs)


def _train(run: directory.RunDirectory, wanted: settings.Settings) -> int:
    with command_line.quiet_start():
        from training import startup

        strategy, pipeline = startup.start()
    import tensorflow as tf
    from training import session

    import tfbig

    training = session.Session(strategy, pipeline, run, wanted)
    try:
        return training.train()
    except KeyboardInterrupt:
        # A second Ctrl-C would leave half a file.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return training.interrupted()
    except OSError as e:
        if not training.is_trained:
            raise
        print(f"\n{PROGRAM}: results cannot be written: {e}; {session.TRAINED}", file=sys.stderr)
        return 1
    except (tfbig.errors.InvalidOptionError, tfbig.errors.BackupError) as e:
        raise command_line.UsageError(e) from None
    except tfbig.errors.TfbigError as e:
        print(f"\n{PROGRAM}: {e}", file=sys.stderr)
        return 1
    except tf.errors.UnavailableError as e:
        print(f"\n{PROGRAM}: another worker ended: {e.message.splitlines()[0]}", file=sys.stderr)
        # Not the code of a preemption, after which clusters start a job again without counting.
        return 1


def _run() -> int:
    wanted = settings.Settings.of_flags()
    run = directory.RunDirectory(
        settings.output_dir(), wanted.identity(), settings.BACKUP_DIR.value
    )
    run.prepare(settings.RESUME.value, settings.OVERWRITE.value)
    return _train(run, wanted)


if __name__ == "__main__":
    command_line.run(PROGRAM, _run, "training has not begun")
