"""Which size each update has: by a table, by a function, or by the gradient noise scale."""

from __future__ import annotations

import bisect
import hashlib
import math
import weakref
from collections.abc import Callable, Mapping

import keras

from tfbig import _integers, _keras, errors
from tfbig.callbacks import _update_count
from tfbig.distribute import _workers

__all__ = ("RULES", "BatchSizes", "FollowNoise", "policy_of")


def checked_size(size: object, where: str) -> int:
    """Returns a size as an int, or raises if it is not an integer >= 1."""
    number = _integers.as_integer(size)
    if number is None or number < 1:
        raise errors.InvalidOptionError(
            f"Each batch size must be an integer >= 1. Received: {size!r} for {where}. Pass "
            "samples of an update, over all replicas."
        )
    return number


class Policy:
    """Decides the size of each update.

    Attributes:
        first: the size of update 0.
        smallest: the smallest size, as far as it is known.
        largest: the largest of all sizes; None if that is not known.
        is_known: whether sizes are known before training comes to them.
        noise_scale: returns the gradient noise scale during a `fit`.
    """

    first: int
    smallest: int
    largest: int | None = None
    is_known = True
    noise_scale: Callable[[], float] | None = None

    def begin(self, model: keras.Model, update: int) -> None:
        """Called before the first update of a `fit` that does not resume."""

    def keep(self, model: keras.Model, size: int) -> None:
        """Called with the size that a model had when it was interrupted."""

    def size_of(self, update: int) -> int:
        """The size of an update; asked for in order while training."""
        raise NotImplementedError

    def description(self) -> str:
        """What must be the same on all workers."""
        raise NotImplementedError


class _Table(Policy):
    """Sizes by the update from which each holds."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        for update in sizes:
            number = _integers.as_integer(update)
            if number is None or number < 0:
                raise errors.InvalidOptionError(
                    "`sizes` must have updates for keys: integers >= 0. Received: "
                    f"{update!r} in {dict(sizes)}."
                )
        if 0 not in sizes:
            raise errors.InvalidOptionError(
                "`sizes` must say what the batch size is from update 0 on. Received: "
                f"{dict(sizes)}. Use {{0: 256, 2_000: 512}}, for example."
            )
        self._updates = sorted(sizes)
        self._sizes = [checked_size(sizes[u], f"update {u}") for u in self._updates]
        self.first = self._sizes[0]
        self.largest = max(self._sizes)
        self.smallest = min(self._sizes)

    def size_of(self, update: int) -> int:
        return self._sizes[bisect.bisect_right(self._updates, update) - 1]

    def description(self) -> str:
        return str(dict(zip(self._updates, self._sizes, strict=True)))


class _Function(Policy):
    """Sizes by a function of the user."""

    def __init__(self, function: Callable[[int], int]) -> None:
        self._function = function
        self.first = self.smallest = self.size_of(0)

    def size_of(self, update: int) -> int:
        return checked_size(self._function(update), f"update {update}")

    def description(self) -> str:
        # A function cannot be compared; what it returns is, before each epoch.
        return f"a function, {self.first} at first"


class FollowNoise(Policy):
    """Sizes that follow the gradient noise scale: they double while it is at least as large.

    Args:
        smallest: the first size.
        largest: the largest size.
        interval: after how many updates it is decided.
    """

    largest: int
    is_known = False

    def __init__(self, smallest: int, largest: int, interval: int) -> None:
        self.first = self.smallest = smallest
        self.largest = largest
        self.interval = interval
        self.size = smallest
        # The model that the size is of.
        self._model: Callable[[], keras.Model | None] = lambda: None

    def begin(self, model: keras.Model, update: int) -> None:
        if update == 0:
            self.keep(model, self.smallest)
        elif self._model() is not model:
            # As far as it has come in another process, or with another callback.
            self.keep(model, self.smallest)
            noise_scale = self._measured()
            while math.isfinite(noise_scale) and noise_scale >= self._larger > self.size:
                self.size = self._larger

    def keep(self, model: keras.Model, size: int) -> None:
        self.size = min(max(size, self.smallest), self.largest)
        self._model = weakref.ref(model)

    def size_of(self, update: int) -> int:
        # False for NaN, before anything was measured.
        if update and update % self.interval == 0 and self._measured() >= self._larger:
            self.size = self._larger
        return self.size

    @property
    def _larger(self) -> int:
        return min(2 * self.size, self.largest)

    def _measured(self) -> float:
        assert self.noise_scale is not None
        return self.noise_scale()

    def description(self) -> str:
        return f"noise_scale from {self.smallest} to {self.largest} every {self.interval}"


def policy_of(sizes: object, bounds: object, interval: object) -> Policy:
    """The policy of the arguments of `BatchSizeSchedule`."""
    if isinstance(sizes, str) and sizes == "noise_scale":
        return _follow_noise(bounds, 100 if interval is None else interval)
    for name, value in (("bounds", bounds), ("interval", interval)):
        if value is not None:
            raise errors.InvalidOptionError(
                f"`{name}` is for `sizes='noise_scale'`. Received: {name}={value!r} with "
                f"sizes={sizes!r}. Leave it out."
            )
    if isinstance(sizes, Mapping):
        return _Table(sizes)
    if callable(sizes):
        return _Function(sizes)
    raise errors.InvalidOptionError(
        "`sizes` must be a dictionary from updates to batch sizes, a function of the update, or "
        f"'noise_scale'. Received: sizes={sizes!r}. Use {{0: 256, 2_000: 512}}, for example."
    )


def _follow_noise(bounds: object, interval: object) -> FollowNoise:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise errors.InvalidOptionError(
            "`sizes='noise_scale'` needs `bounds`, the smallest and the largest batch size. "
            f"Received: bounds={bounds!r}. Use bounds=(256, 4096), for example."
        )
    smallest, largest = (checked_size(size, f"bounds={bounds!r}") for size in bounds)
    if largest < smallest:
        raise errors.InvalidOptionError(
            "`bounds` must be the smallest and the largest batch size, in this order. Received: "
            f"bounds={bounds!r}."
        )
    rule = "an integer >= 1, a number of updates"
    updates = _integers.checked("interval", interval, rule=rule)
    return FollowNoise(smallest, largest, updates)


class BatchSizes:
    """The size of each update of a `fit`; what `_keras.resized_batches.Sizes` asks for.

    Args:
        model: the model that is trained.
        policy: decides the sizes.
        factor_of: what the learning rate is multiplied by, given the size over the first size;
            None to leave it as it is.
    """

    def __init__(
        self,
        model: keras.Model,
        policy: Policy,
        factor_of: Callable[[float], float] | None,
    ) -> None:
        self._replicas: int = model.distribute_strategy.num_replicas_in_sync
        self._check_replicas(policy.smallest, "the smallest size")
        self.model = model
        self.policy = policy
        policy.noise_scale = self._noise_scale
        self.largest = policy.largest
        self.size = policy.first
        self.samples = 0
        self.is_used = False
        self._workers = _workers.Workers.of(model.distribute_strategy)
        # The next update; None before the first epoch.
        self._update: int | None = None
        self._count: _update_count.UpdateCount | None = None
        self._factor_of = factor_of
        self._factors = []
        if factor_of is not None:
            optimizers = [o for _, o in _keras.optimizer.optimizers_of(model)]
            if any(map(_keras.learning_rate_factor.is_new, optimizers)):
                # What was traced knows of no factor.
                model.train_function = None
            self._factors = [
                f for o in optimizers for f in _keras.learning_rate_factor.factors_of(o)
            ]

    def begin(self) -> None:
        if self._update is None:
            self._count = _update_count.UpdateCount(self.model)
            self._update = self._count.updates
            self.policy.begin(self.model, self._update)

    def next(self) -> int:
        assert self._update is not None
        self.size = self._size_of(self._update)
        if self._factor_of is not None:
            for factor in self._factors:
                factor.assign(self._factor_of(self.size / self.policy.first))
        self._update += 1
        return self.size

    def end(self) -> None:
        """Leaves the learning rate as it is without a schedule, however training has ended."""
        self.policy.noise_scale = None
        for factor in self._factors:
            factor.assign(1.0)
        if self._count is not None and self._update is not None:
            self._count.updates = self._update
            self._count.correct()

    def updates_of(self, samples: int) -> int | None:
        if not self.policy.is_known:
            return None
        self.begin()
        assert self._update is not None
        update = self._update
        while samples > 0:
            samples -= self._size_of(update)
            update += 1
        return update - self._update

    def agree(self, updates: int | None) -> None:
        """Raises if workers would not have the same sizes for so many updates."""
        if self._workers.count == 1 or updates is None or not self.policy.is_known:
            return  # By the noise scale, they decide together.
        assert self._update is not None
        sizes = [self._size_of(self._update + k) for k in range(updates)]
        digest = hashlib.sha256(str(sizes).encode()).hexdigest()[:12]
        self._workers.agree("BatchSizeSchedule", {"sizes": f"{sizes[:3]} ... (digest {digest})"})

    def state(self) -> dict[str, int]:
        self.begin()
        assert self._update is not None
        return {"update": self._update, "size": self.size}

    def restore(self, state: dict[str, int]) -> None:
        self._count = _update_count.UpdateCount(self.model)
        self._update, self.size = state["update"], state["size"]
        self.policy.keep(self.model, self.size)

    def _noise_scale(self) -> float:
        """The gradient noise scale now, in samples; the same on all workers."""
        found = repr(self.model.noise_scale_state.current())
        return float(self._workers.exchange("the gradient noise scale", found)[0])

    def _size_of(self, update: int) -> int:
        size = self.policy.size_of(update)
        self._check_replicas(size, f"update {update}")
        return size

    def _check_replicas(self, size: int, where: str) -> None:
        if size < self._replicas:
            raise errors.InvalidOptionError(
                "Each batch size must be at least the number of replicas, of which each takes a "
                f"share. Received: {size} for {where}, with {self._replicas} replicas. Use a "
                "larger size, or fewer replicas."
            )


# What a rule multiplies the learning rate by, given the size over the first size.
RULES: dict[str | None, Callable[[float], float] | None] = {
    "linear": float,
    "square_root": math.sqrt,
    None: None,
}
