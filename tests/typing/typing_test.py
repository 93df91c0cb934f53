"""What an editor knows of tfbig: Pylance and Pyright infer it from the annotations."""

import json
import pathlib
import re
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).with_name("program.py")


def reported(path):
    """The pairs of line and rule that the type checker reports as errors."""
    run = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "--level", "error", path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(run.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return {(d["range"]["start"]["line"] + 1, d["rule"]) for d in found["generalDiagnostics"]}


def test_a_type_checker_sees_fit_the_options_and_what_tuners_return():
    lines = PROGRAM.read_text().splitlines()
    marks = ((i, re.search(r"# error: (\w+)", line)) for i, line in enumerate(lines, 1))
    assert reported(PROGRAM) == {(i, mark[1]) for i, mark in marks if mark}
