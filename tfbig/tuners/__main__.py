"""Looks at a search without its program: `python -m tfbig.tuners report searches/products`.

The search may be over or run, also on other machines. It is only read, so it may be in a directory
that cannot be written.
"""

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Sequence

from tfbig import errors
from tfbig.tuners import _progress, _read_only, _record, _report, _tuner_types, _watch

__all__ = ("main",)

_PROGRAM = "python -m tfbig.tuners"

# As of `tfbig.launch`.
INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Looks at a search, which may be over or still run, and changes nothing.",
        epilog="Exit code: 0 if all is well, 1 if there is no result yet, 2 if the search cannot "
        "be read or the arguments are invalid, 130 after Ctrl-C.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="write an HTML page about the search")
    report.add_argument(
        "--output",
        default="report.html",
        metavar="FILE",
        help="the page; an existing file is replaced (default: report.html)",
    )
    watch = commands.add_parser(
        "watch", help="print a line whenever a trial ends, until no process works on the search"
    )
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="S",
        help="seconds between two looks (default: 2)",
    )
    best = commands.add_parser("best", help="print the best values")
    best.add_argument(
        "--num",
        type=_positive,
        metavar="N",
        help="how many trials (default: the best one; with several objectives, the Pareto front)",
    )
    best.add_argument("--json", action="store_true", help="print JSON, a list of trials")
    for command in (report, watch, best):
        command.add_argument(
            "where",
            metavar="PATH_OR_URL",
            help="the directory of the project, its study.db, or the URL of a database",
        )
        command.add_argument(
            "--name", help="the project_name, if the database holds several searches"
        )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1. Received: {text}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0. Received: {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name. Defaults to those of this process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    run = {"report": _write_report, "watch": _follow, "best": _best}[options.command]
    try:
        return run(options)
    except errors.TfbigError as e:
        return _fail(str(e))
    except BrokenPipeError:
        # The reader of the output has enough. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        return _fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(text: str) -> int:
    print(f"tfbig.tuners: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _record_of(options: argparse.Namespace) -> _record.Record:
    # A search that begins to write meanwhile may leave half of two states.
    for _ in range(3):
        opened = _read_only.open_study(options.where, options.name)
        record = opened.record()
        if not opened.is_stale():
            break
    return record


def _write_report(options: argparse.Namespace) -> int:
    record = _record_of(options)
    storage = options.where if "://" in options.where else None
    _report.write_record(record, options.output, storage)
    print(f"{options.output}: {len(record.rows)} trials of {record.name!r}")
    return 0


def _follow(options: argparse.Namespace) -> int:
    reopen = functools.partial(_read_only.open_study, options.where, options.name)
    watch = _watch.Watch(reopen, options.interval)
    try:
        watch.run()
    finally:
        watch.close()
    return 0


def _best(options: argparse.Namespace) -> int:
    record = _record_of(options)
    count = options.num or (1 if record.is_single else len(record.best))
    best = record.best[:count]
    if options.json:
        print(json.dumps([_as_json(record, row) for row in best], indent=2))
    for row in best if not options.json else ():
        names = ", ".join(record.objectives)
        print(f"trial {row.trial}: {names} {_progress.shown_score(row.scores)}")
        for name, value in row.values.items():
            print(f"  {name}: {_progress.shown(value)}")
    if not best:
        print("tfbig.tuners: no trial is complete and feasible yet", file=sys.stderr)
    return 0 if best else 1


def _as_json(record: _record.Record, row: _record.Row) -> dict[str, _tuner_types.Value]:
    return {
        "trial": row.trial,
        "scores": dict(zip(record.objectives, row.scores, strict=True)),
        "values": {name: _plain(value) for name, value in row.values.items()},
    }


def _plain(value: _tuner_types.Value) -> _tuner_types.Value:
    """A value as any reader of JSON understands it: tuples as lists, and no infinite numbers."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
