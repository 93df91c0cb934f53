"""`Pipeline`: stages of a model on devices of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import tensorflow as tf

from tfbig import _integers, _keras, _types, errors

__all__ = ("Pipeline",)


class Pipeline:
    """Stages of a model: each device is responsible for a part of the layers.

    For a model that does not fit on one device. While a stage works on one micro-batch, the stages
    after it work on those before: several micro-batches of an update run at the same time. With S
    stages and K micro-batches, each stage waits for at least (S - 1) / (K + S - 1) of the time.

    Pass it to a model as `pipeline=`. A Functional or Sequential model is cut into contiguous
    stages of about the same work. To choose the layers of a stage, make them within `stage`.

    Args:
        devices: the device of each stage, such as ``["GPU:0", "GPU:1"]``. With several replicas in
            a process, a tuple of devices for each stage, one for each replica:
            ``[("GPU:0", "GPU:1"), ("GPU:2", "GPU:3")]`` are two replicas of two stages.
        in_flight: the most micro-batches that run at the same time. More keep the devices busier,
            and take more memory. Stage s holds at most ``in_flight - s`` of them. Defaults to one
            more than there are stages.
        max_parameters: the most parameters of a stage that is found; None for any number.

    Raises:
        InvalidOptionError: If fewer than two stages are given, a device twice, or stages with
            different numbers of devices.

    Example:

    >>> pipeline = tfbig.distribute.Pipeline(["GPU:0", "GPU:1"])
    >>> pipeline.in_flight
    3
    """

    def __init__(
        self,
        devices: Sequence[str | Sequence[str]],
        in_flight: int | None = None,
        max_parameters: int | None = None,
    ) -> None:
        self.devices = _checked_devices(devices)
        self.in_flight = _integers.checked_or_none("in_flight", in_flight) or len(self.devices) + 1
        self.max_parameters = _integers.checked_or_none("max_parameters", max_parameters)
        self._stages: list[_keras.stages.Stage] | None = None

    def __repr__(self) -> str:
        devices = [d[0] if len(d) == 1 else d for d in self.devices]
        return f"Pipeline({devices}, in_flight={self.in_flight})"

    @property
    def stages(self) -> list[_keras.stages.Stage]:
        """The stages, with full names of devices.

        Raises:
            InvalidOptionError: If a device does not exist.
        """
        # Not in the constructor: the names start TensorFlow, and may depend on the strategy.
        if self._stages is None:
            names = [tuple(map(_known_name, devices)) for devices in self.devices]
            _refuse_twice([name for stage in names for name in stage], self.devices)
            self._stages = [
                _keras.stages.Stage(i, devices, self.in_flight) for i, devices in enumerate(names)
            ]
        return self._stages

    @contextlib.contextmanager
    def stage(self, index: int) -> Iterator[None]:
        """Within it, layers that are made belong to a stage, and so do their variables.

        Args:
            index: number of the stage, from 0.

        Raises:
            InvalidOptionError: If there is no such stage, if a device of it does not exist, or
                within `sharded_weights`.
        """
        number = _integers.as_integer(index)
        if number is None or not 0 <= number < len(self.devices):
            raise errors.InvalidOptionError(
                f"`stage` takes the number of a stage, from 0 to {len(self.devices) - 1}. "
                f"Received: {index!r}."
            )
        if _keras.sharded_variable.is_dividing():
            raise errors.InvalidOptionError(
                "Layers on stages must be made outside of `sharded_weights`, since a stage has its "
                f"weights whole. Received: stage {index} within it. Enter `strategy.scope()` "
                "instead."
            )
        self.check_strategy(tf.distribute.get_strategy())
        with _keras.stages.within(self.stages[number]):
            yield

    def check_strategy(self, strategy: _types.Strategy) -> None:
        """Raises if there is not a device of each stage for each replica of this process.

        Raises:
            UnsupportedStrategyError: If the strategy is a TPUStrategy.
            InvalidOptionError: If the numbers differ.
        """
        if _keras.devices.is_tpu(strategy):
            raise errors.UnsupportedStrategyError(
                "Stages need MirroredStrategy, MultiWorkerMirroredStrategy or one replica: all "
                "cores of a TPU run one program. Received: TPUStrategy. Leave `pipeline` out."
            )
        replicas = len(_keras.collectives.local_replicas(strategy))
        if len(self.devices[0]) != replicas:
            raise errors.InvalidOptionError(
                "A stage needs a device for each replica of this process. Received: "
                f"{len(self.devices[0])} device(s) a stage, and {replicas} replica(s). Pass a "
                "tuple of devices for each stage, such as [('GPU:0', 'GPU:1'), ('GPU:2', "
                "'GPU:3')] for two replicas of two stages, and make the pipeline's layers in the "
                "scope of the strategy."
            )


def _checked_devices(
    devices: Sequence[str | Sequence[str]],
) -> tuple[tuple[str, ...], ...]:
    """The devices, as a tuple for each stage."""
    form = "Pass a list with a device for each stage, such as ['GPU:0', 'GPU:1']."
    if not isinstance(devices, list | tuple):
        raise errors.InvalidOptionError(
            f"`devices` must be a list. Received: devices={devices!r}. {form}"
        )
    if not all(isinstance(d, str | list | tuple) for d in devices):
        raise errors.InvalidOptionError(
            f"Devices are named by strings. Received: devices={devices!r}. {form}"
        )
    stages = tuple((d,) if isinstance(d, str) else tuple(d) for d in devices)
    if len(stages) < 2:
        raise errors.InvalidOptionError(
            f"A pipeline needs two stages or more. Received: devices={devices!r}. {form}"
        )
    names = [name for stage in stages for name in stage]
    if not all(isinstance(name, str) for name in names):
        raise errors.InvalidOptionError(
            f"Devices are named by strings. Received: devices={devices!r}. {form}"
        )
    _refuse_twice(names, devices)
    numbers = {len(stage) for stage in stages}
    if len(numbers) > 1 or numbers == {0}:
        raise errors.InvalidOptionError(
            "All stages need as many devices as there are replicas. Received: "
            f"{[len(stage) for stage in stages]} devices in devices={devices!r}."
        )
    return stages


def _refuse_twice(names: list[str], devices: object) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise errors.InvalidOptionError(
            f"Each stage needs a device of its own. Received: {', '.join(twice)} twice in "
            f"devices={devices!r}."
        )


def _known_name(device: str) -> str:
    """The name of a device with job and task.

    Raises:
        InvalidOptionError: If there is no such device.
    """
    known = _keras.devices.full_names()
    name = _keras.devices.full_name(device)
    if name not in known:
        raise errors.InvalidOptionError(
            "`devices` must be there when the first layer is made. Received: "
            f"{device!r}. There are {', '.join(known)}."
        )
    return name
