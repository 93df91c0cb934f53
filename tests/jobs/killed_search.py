"""Kills the processes of searches at random moments, until they have got through.

    killed_search.py DIRECTORY STORAGE KIND [--kills N] [--stops N] [--workers N] [--points]

This process imports everything and forks the workers, which start in no time. Leaves
what became of each search in a file of DIRECTORY.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback

import keras_tuner

from tests.jobs.killed_search_points import POINTS, dies_at
from tfbig.tuners import (
    _asha,
    _grid_search,
    _hyperband,
    _oracle,
    _population_oracle,
    _trials,
    _tuner,
)

# Seconds after which the trial of a stopped process is run by another.
GRACE = 1.0


class Search(_tuner.Tuner):
    """Trials that take a moment, and report after each step."""

    # The largest value of "b".
    most = 4

    def run_trial(self, trial, *args, **kwargs):
        hp = trial.hyperparameters
        x = hp.Choice("a", [1, 2, None]) or 0
        x += hp.Int("b", 1, self.most)
        for epoch in range(self.oracle.epochs_of(trial.trial_id) or 3):
            time.sleep(0.03)
            self.oracle.report(trial.trial_id, {"loss": x + 1 / (1 + epoch)}, epoch + 1)
        return {"loss": x + 1 / (1 + epoch)}


def oracle_of(kind, storage, trials):
    space = keras_tuner.HyperParameters()
    arguments = {
        "objective": keras_tuner.Objective("loss", "min"),
        "storage": storage,
        "seed": 0,
        "grace_period": GRACE,
    }
    if kind == "grid":
        return _grid_search.GridSearchOracle(**arguments)
    if kind == "defined":
        # By trials alone: 60 combinations.
        Search.most = 20
        return _oracle.StudyOracle(max_trials=trials, sampler="random", **arguments)
    space.Float("c", 0, 1)
    arguments["hyperparameters"] = space
    if kind == "hyperband":
        return _hyperband.HyperbandOracle(max_epochs=9, factor=3, **arguments)
    if kind == "asha":
        return _asha.ASHAOracle(max_trials=trials, max_epochs=9, **arguments)
    if kind == "population":
        sizes = {"population_size": trials, "max_epochs": 4, "epochs_per_generation": 2}
        return _population_oracle.PopulationOracle(**sizes, **arguments)
    pruner = "median" if kind == "pruned" else None
    sampler = {"pruned": "tpe"}.get(kind, kind)
    return _oracle.StudyOracle(max_trials=trials, sampler=sampler, pruner=pruner, **arguments)


def fork(function):
    pid = os.fork()
    if pid:
        return pid
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


class Killer:
    """The processes of one search, some of which are killed or stopped."""

    def __init__(self, options, name, point=None):
        self.options = options
        self.name = name
        self.point = point
        self.rng = random.Random(name)
        self.running = set()

    def tuner(self):
        o = self.options
        oracle = oracle_of(o.kind, None if o.storage == "file" else o.storage, o.trials)
        return Search(oracle, directory=o.directory, project_name=self.name)

    def search(self):
        if self.point:
            dies_at(self.point, self.options.directory / f"{self.point} died")
        self.tuner().search(verbose=0)

    def leave(self):
        oracle = self.tuner().oracle
        # A process that finds the last values taken gives its place back, and leaves a void trial.
        trials = [t for t in oracle.study.get_trials() if not _trials._is_void(t)]
        found = {
            "states": [t.state.name for t in trials],
            "indices": [t.user_attrs[_trials.INDEX] for t in trials],
            "values": [json.loads(t.user_attrs[_trials.VALUES]) for t in trials],
            "processes": len({t.user_attrs[f"{_trials.RUN}0"][0] for t in trials}),
            "steps": [sorted(t.intermediate_values) for t in trials],
            "rows": [row.state for row in oracle._ledger.trials()],
        }
        (self.options.directory / f"{self.name}.json").write_text(json.dumps(found))

    def start(self):
        self.running.add(fork(self.search))

    def run(self):
        """Runs the search to its end; returns how many processes died."""
        for _ in range(self.options.workers):
            self.start()
        kills, stops, deaths = self.options.kills, self.options.stops, 0
        while self.running:
            time.sleep(self.rng.uniform(0.01, 0.2))
            if kills:
                kills -= 1
                os.kill(self.rng.choice(sorted(self.running)), signal.SIGKILL)
            elif stops:
                stops -= 1
                pid = self.rng.choice(sorted(self.running))
                os.kill(pid, signal.SIGSTOP)
                time.sleep(2 * GRACE)
                os.kill(pid, signal.SIGCONT)
            deaths += self.look()
        if status := os.waitpid(fork(self.leave), 0)[1]:
            # Not the status itself, which is 256 for an exit code of 1: the code would be 0.
            sys.exit(os.waitstatus_to_exitcode(status))
        return deaths

    def look(self):
        """Starts anew what has died; returns how many."""
        deaths = 0
        for pid in sorted(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            self.running.remove(pid)
            if os.WIFSIGNALED(status):
                deaths += 1
                self.start()
            elif status:
                sys.exit(f"worker {pid} failed")
        return deaths


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("storage")
    parser.add_argument("kind")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--points", action="store_true")
    options = parser.parse_args()
    names = list(POINTS) if options.points else [options.kind]
    for name in names:
        point = name if options.points else None
        print(Killer(options, f"{options.directory.name} {name}", point).run())


if __name__ == "__main__":
    main()
