"""Each trial in a process of its own: the program is run again, up to its `search`.

There, it runs one trial and ends. Nothing has to be pickled, and nothing that a trial leaves
in memory stays.
"""

import os
import signal
import subprocess
import sys

from tfbig import errors

__all__ = ("check", "end_trial_process", "is_trial_process", "run_trials")

# Names, for the process of a trial, the search that it belongs to.
_VARIABLE = "TFBIG_TRIAL_OF"

# Exit codes of a process of a trial: there may be another trial, or there is none.
_ONE_MORE, _NONE_LEFT = 75, 76


def check(workers):
    """Raises where there is no program to run again, or only part of one."""
    if workers.count > 1:
        raise errors.InvalidOptionError(
            "isolate=True runs this program again, not the other workers that train a trial with "
            f"it. Received: a distribution_strategy over {workers.count} workers."
        )
    if not hasattr(sys.modules["__main__"], "__file__"):
        raise errors.InvalidOptionError(
            "isolate=True runs the program again for each trial. Received: a session without a "
            "program, as a notebook is. Write the search into a file."
        )


def is_trial_process(search):
    """Whether this process is to run one trial of a search."""
    return os.environ.get(_VARIABLE) == search


def end_trial_process(is_over):
    """Ends the process of a trial, without what the program does after its search."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_NONE_LEFT if is_over else _ONE_MORE)


def run_trials(search, on_death):
    """Runs one process after the other, until there are no trials any more.

    Args:
        search: str, which search.
        on_death: function of a process id and a sentence: called where a process died in the
            middle of a trial. Returns whether that was so.

    Raises:
        SearchError: If a process ended in another way.
    """
    while True:
        process = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], env={**os.environ, _VARIABLE: search}
        )
        try:
            code = process.wait()
        except BaseException:
            # Ctrl-C reaches it as well; it lets others take its trial.
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if code == _NONE_LEFT:
            return
        if code == _ONE_MORE:
            continue
        if code < 0:
            what = f"was ended by {signal.Signals(-code).name}"
        else:
            what = f"ended with exit code {code}"
        if not on_death(process.pid, f"The process of the trial {what}."):
            raise errors.SearchError(
                f"The process of a trial {what} before the trial began. With isolate=True the "
                "program is run again for each trial; see what it printed."
            )
