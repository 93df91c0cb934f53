"""What the workers of a job tell each other besides gradients.

Short texts go through the coordination service that TensorFlow runs for every multi-worker job.
The service needs no collectives, so workers that disagree find out instead of waiting for each
other forever.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context as _context

from tfbig import _types, errors
from tfbig.distribute import _stuck_workers

__all__ = ("Workers",)

# Seconds that a worker waits for another's answer; `get_strategy` sets it.
timeout = 600.0

# Seconds after which a waiting worker checks whether the other one is stuck.
_POLL_SECONDS = 2.0

# Every worker asks the same questions in the same order.
_questions = itertools.count()


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers of a strategy.

    Attributes:
        names: Such as "worker 0"; the chief comes first.
        index: Which of them this process is.
    """

    names: tuple[str, ...]
    index: int

    @classmethod
    def of(cls, strategy: _types.Strategy) -> "Workers":
        """Returns the workers of a strategy: one, unless it spans several processes."""
        resolver = strategy.cluster_resolver
        spec = resolver.cluster_spec().as_dict() if resolver is not None else {}
        names = tuple(
            f"{job} {i}" for job in ("chief", "worker") for i in range(len(spec.get(job, ())))
        )
        if len(names) < 2:
            return cls(("worker 0",), 0)
        return cls(names, names.index(f"{resolver.task_type} {resolver.task_id}"))

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def is_chief(self) -> bool:
        """Whether this is the worker that writes files and prints."""
        return self.index == 0

    def exchange(self, subject: str, text: str, seconds: float | None = None) -> list[str]:
        """Sends a text to all workers, and returns the texts of all, in order.

        All workers must call it equally often and in the same order.

        Args:
            subject: What the texts are about, for the error message.
            text: This worker's text.
            seconds: How long to wait for the others; None stands for `timeout`.

        Raises:
            WorkerUnavailableError: If a worker does not answer in time, or the chief has ended.
        """
        if self.count == 1:
            return [text]
        service, question = _context.context(), next(_questions)
        service.set_config_key_value(f"tfbig/{question}/{self.index}", text)
        deadline = time.monotonic() + (timeout if seconds is None else seconds)
        answers = [
            self._answer(service, f"tfbig/{question}/{i}", i, subject, deadline)
            for i in range(self.count)
        ]
        # A worker that answers this question has read the answers to the previous one.
        if question:
            service.delete_config_key_value(f"tfbig/{question - 1}/{self.index}")
        return answers

    # `Any`: TensorFlow's `Context`, which is not public.
    def _answer(self, service: Any, key: str, index: int, subject: str, deadline: float) -> str:
        """Waits for the answer of worker `index` under a key."""
        while True:
            left = deadline - time.monotonic()
            milliseconds = max(1, round(1000 * min(left, _POLL_SECONDS)))
            try:
                return str(service.get_config_key_value(key, milliseconds))
            except tf.errors.DeadlineExceededError as e:
                if left <= 0:
                    raise self._unavailable(index, subject, e) from None
            except tf.errors.UnavailableError as e:
                raise self._unavailable(index, subject, e) from None
            if variable := _stuck_workers.extra_variable(index):
                reason = (
                    f"All workers must run the same program: {self.names[index]} creates an extra "
                    f"variable, {variable}, while {self.names[self.index]} waits for {subject}."
                )
                _stuck_workers.send_reason(index, reason)
                raise errors.WorkersDisagreeError(reason)

    def _unavailable(
        self, index: int, subject: str, error: tf.errors.OpError
    ) -> errors.WorkerUnavailableError:
        return errors.WorkerUnavailableError(
            f"{self.names[index]} does not respond. {self.names[self.index]} waited for "
            f"{subject}. Check the output of {self.names[index]}: it may have ended, be hanging, "
            f"or run a different program. TensorFlow says: {error.message}"
        )

    def agree(self, subject: str, settings: Mapping[str, str]) -> None:
        """Raises on every worker if the workers' settings differ.

        Args:
            subject: What the settings belong to, for the error message.
            settings: This worker's settings by name.

        Raises:
            WorkersDisagreeError: If a setting differs.
        """
        received = [json.loads(text) for text in self.exchange(subject, json.dumps(settings))]
        for name in sorted(set().union(*received)):
            values = [settings.get(name) for settings in received]
            if len(set(values)) > 1:
                listed = "; ".join(f"{n}: {v}" for n, v in zip(self.names, values, strict=True))
                raise errors.WorkersDisagreeError(
                    f"All workers must run the same program: {subject} must have the same {name} "
                    f"on each. Received: {listed}."
                )
