"""What train.py can train: a module a task."""

from tasks import digits, language, speech

TASKS = {"digits": digits, "language": language, "speech": speech}
