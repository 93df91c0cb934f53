"""What train.py can train: a module a task."""

from tasks import digits, language

TASKS = {"digits": digits, "language": language}
