"""What the workers of a job tell each other besides gradients.

Small texts go through the coordination service that TensorFlow runs for every
multi-worker job. It needs no collective, so workers that disagree find out
instead of waiting for each other.
"""

import dataclasses
import itertools
import json
import time

import tensorflow as tf
from tensorflow.python.eager import context as _context

from tfbig import errors
from tfbig.distribute import _stuck_workers

__all__ = ("Workers",)

# Seconds that a worker waits for what another has to say; set by `get_strategy`.
timeout = 600.0

# Seconds after which a worker that waits looks for the reason.
_LOOK = 2.0

# Every worker asks the same questions in the same order.
_questions = itertools.count()


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers of a strategy.

    Attributes:
        names: tuple of str, such as "worker 0"; the chief first.
        index: int, which of them this process is.
    """

    names: tuple[str, ...]
    index: int

    @classmethod
    def of(cls, strategy):
        """Those of a strategy; a single one unless it spans several processes."""
        resolver = strategy.cluster_resolver
        spec = resolver.cluster_spec().as_dict() if resolver is not None else {}
        names = tuple(
            f"{job} {i}" for job in ("chief", "worker") for i in range(len(spec.get(job, ())))
        )
        if len(names) < 2:
            return cls(("worker 0",), 0)
        return cls(names, names.index(f"{resolver.task_type} {resolver.task_id}"))

    @property
    def count(self):
        return len(self.names)

    @property
    def is_chief(self):
        """Whether this is the one that writes files and prints."""
        return self.index == 0

    def exchange(self, subject, text):
        """Tells all workers a text, and returns those of all, in order.

        All must call it, as often and in the same order.

        Args:
            subject: str, what it is about, for the error message.
            text: str.

        Raises:
            WorkerUnavailableError: If a worker says nothing in `timeout` seconds.
        """
        if self.count == 1:
            return [text]
        service, question = _context.context(), next(_questions)
        service.set_config_key_value(f"tfbig/{question}/{self.index}", text)
        deadline = time.monotonic() + timeout
        answers = [
            self._answer(service, f"tfbig/{question}/{i}", i, subject, deadline)
            for i in range(self.count)
        ]
        # Who answers this question has read the answers to those before.
        if question:
            service.delete_config_key_value(f"tfbig/{question - 1}/{self.index}")
        return answers

    def _answer(self, service, key, index, subject, deadline):
        """What worker `index` has told under a key."""
        while True:
            left = deadline - time.monotonic()
            try:
                return service.get_config_key_value(key, max(1, round(1000 * min(left, _LOOK))))
            except tf.errors.DeadlineExceededError as e:
                if left <= 0:
                    raise self._unavailable(index, subject, e) from None
            except tf.errors.UnavailableError as e:
                raise self._unavailable(index, subject, e) from None
            if what := _stuck_workers.find_stuck(index):
                reason = (
                    f"All workers must run the same program: {self.names[index]} makes another "
                    f"variable, {what}, while {self.names[self.index]} waits for {subject}."
                )
                _stuck_workers.tell_stuck(index, reason)
                raise errors.WorkersDisagreeError(reason)

    def _unavailable(self, index, subject, error):
        return errors.WorkerUnavailableError(
            f"{self.names[index]} does not answer. {self.names[self.index]} waited for "
            f"{subject}. See the output of {self.names[index]}: it ended, hangs, or runs another "
            f"program. TensorFlow says: {error.message}"
        )

    def agree(self, subject, settings):
        """Raises on every worker if their settings are not the same.

        Args:
            subject: str, what the settings are of.
            settings: dictionary of str.
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
