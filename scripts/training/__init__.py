"""The parts of train.py.

`settings` has the flags, `startup` makes the strategy, `stages` the pipeline, `session` trains, and
`results` judges and saves; `directory` says whether a run may begin or resume in --output_dir.
"""

PROGRAM = "train.py"
