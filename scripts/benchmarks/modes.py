"""What benchmark.py measures in each of its modes."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import (
    curve_searches,
    in_turn,
    learning_curves,
    network,
    plot,
    population,
    report,
    rows,
    scaling,
    settings,
    table_searches,
    tables,
    tuners,
)
from benchmarks.markdown import Table


@dataclasses.dataclass
class Outcome:
    """What a mode has measured.

    Attributes:
        rows: What --json holds.
        settings: What --json says of the flags.
        tables: What --markdown holds.
        notes: Lines below the tables.
        is_complete: Whether every row was measured.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, int]
    tables: list[Table]
    notes: list[str] = dataclasses.field(default_factory=list)
    is_complete: bool = True


def measure(program: str, keep: Callable[[Outcome], None]) -> Outcome:
    """Measures what the flags ask for, and prints it.

    Args:
        program: Path of benchmark.py, which also runs in the workers of --network.
        keep: With --tuners, given what is there after each row: the next may take long, or fail.

    Raises:
        UsageError: If that is impossible.
        network.UnavailableError: If --network does not work here.
        tables.UnavailableError: If the tables of --tables cannot be had.
    """
    settings.check()
    if settings.TABLES.value:
        return _of_tables(keep)
    if settings.TUNERS.value:
        return _of_tuners(keep)
    if settings.SCALING.value:
        return _on_paper()
    if settings.NETWORK.value:
        return _over_network(program)
    return _in_turn() if settings.IN_TURN.value else _in_processes()


def _of_tuners(keep: Callable[[Outcome], None]) -> Outcome:
    trials, seeds = settings.TRIALS.value, settings.seeds()

    def outcome(measured: list[dict[str, Any]]) -> Outcome:
        return Outcome(measured, {"trials": trials, "seeds": seeds}, tuners.tables(measured))

    return outcome(tuners.compare(trials, seeds, lambda measured: keep(outcome(measured))))


def _of_tables(keep: Callable[[Outcome], None]) -> Outcome:
    trials, seeds = settings.TRIALS.value, settings.seeds()
    problems = tables.load(settings.TABLES_DIRECTORY.value)
    curves = learning_curves.load()
    found = Outcome([], {"trials": trials, "seeds": seeds}, [])

    def with_table(measured: list[dict[str, Any]], *made: Table) -> Outcome:
        return dataclasses.replace(found, rows=found.rows + measured, tables=[*found.tables, *made])

    in_tables = table_searches.compare(
        problems,
        trials,
        seeds,
        lambda rows: keep(with_table(rows, *table_searches.tables_of(rows, problems))),
        settings.SEARCHES.value,
    )
    found = with_table(in_tables, *table_searches.tables_of(in_tables, problems))
    if settings.SEARCHES.value:
        return found
    in_curves, trained = curve_searches.compare(
        curves, seeds, lambda rows: keep(with_table(rows, curve_searches.table(rows)))
    )
    found = with_table(in_curves, curve_searches.table(in_curves))
    populations = population.compare(
        curves, trained, seeds, lambda rows: keep(with_table(rows, population.table(rows)))
    )
    return with_table(populations, population.table(populations))


def _over_network(program: str) -> Outcome:
    counts = settings.steps_list((1, 4, 16))
    cluster = network.Cluster(settings.NETWORK_HOSTS.value, settings.NETWORK_MEGABITS.value)
    measured = network.compare(cluster, program, counts, *settings.numbers())
    about = {"micro_batch_size": settings.MICRO_BATCH_SIZE.value}
    return Outcome(
        measured, about | dataclasses.asdict(cluster), [network.table(cluster, measured)]
    )


def _on_paper() -> Outcome:
    training = scaling.Training(settings.PARAMETERS.value, settings.MICRO_BATCH_SECONDS.value)
    counts = settings.steps_list((1, 4, 16, 64))
    found = scaling.tables(training, counts)
    scaling.show(found)
    measured = scaling.rows(training, counts) + scaling.remedies(training)
    return Outcome(measured, {"parameters": training.parameters}, found)


def _in_turn() -> Outcome:
    tasks = settings.tasks()
    measured = in_turn.measure(tasks)
    return Outcome(measured, {"threads": tasks[0].threads}, [in_turn.table(measured)])


def _in_processes() -> Outcome:
    tasks = settings.tasks()
    # `timeout` sends it. As an exception it also ends the process that is being measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    measured = rows.make(tasks)
    rows.measure(
        measured, settings.RUNS.value, settings.TIMEOUT.value, settings.PEERS_DIRECTORY.value
    )
    print(
        f"{settings.RUNS.value} runs of {settings.STEPS.value} effective batches each, "
        f"{tasks[0].threads} threads"
    )
    for k, whole in dict.fromkeys(
        (task.gradient_accumulation_steps, task.batch_size) for task in tasks
    ):
        print(f"K={k}: effective batch {whole}, micro-batch {whole // k}")
    report.show(measured)
    if settings.PNG.value is not None:
        plot.draw(measured, settings.PNG.value)
    return Outcome(
        report.document(measured),
        {"threads": tasks[0].threads},
        report.tables(measured),
        report.losses(measured),
        is_complete=not any(row.error for row in measured),
    )
