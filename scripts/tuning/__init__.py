"""The parts of tune.py: `settings` has the flags, `tasks` what is searched, `search` the search."""

PROGRAM = "tune.py"
