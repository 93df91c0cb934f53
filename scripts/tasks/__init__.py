"""What train.py can train: a module a task."""

from tasks import digits, gan, language, speech

TASKS = {"digits": digits, "gan": gan, "language": language, "speech": speech}
