"""Cuts a model into contiguous stages, the largest of which has as little work as can be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import keras

from tfbig import _keras, _types, errors

__all__ = ("Part", "cut", "parts_of")


@dataclasses.dataclass
class Part:
    """Layers that cannot be told apart, since they share variables, or one after another.

    Attributes:
        calls: the layers and operations.
        work: floating-point operations of their forward passes, for one sample.
        parameters: elements of their variables.
    """

    calls: list[_types.Layer]
    work: float
    parameters: int


def parts_of(model: keras.Model) -> list[Part]:
    """The smallest parts of a built model that can lie on different stages, in order.

    A layer that uses the variables of an earlier one, such as a head of an embedding's table, goes
    with that.

    Raises:
        UnsupportedModelError: If the model is neither Functional nor Sequential.
    """
    try:
        calls = _keras.work.calls_of(model)
    except TypeError:
        raise errors.UnsupportedModelError(
            "A model that is neither Functional nor Sequential cannot be cut into stages, since "
            f"nothing tells the order of its layers. Received: {type(model).__name__}. Make its "
            "layers within `with pipeline.stage(i):`."
        ) from None
    work = _keras.work.floating_point_operations(model, calls)
    parts: list[Part] = []
    owners: dict[int, Part] = {}
    for call in calls:
        variables = {id(v): v for v in getattr(call, "variables", [])}
        # A seed that layers share does not tie them together.
        weights = {k for k, v in variables.items() if v.dtype.startswith(("float", "bfloat"))}
        part = next((owners[k] for k in weights if k in owners), None)
        if part is None:
            part = Part([], 0.0, 0)
            parts.append(part)
        part.calls.append(call)
        part.work += work[id(call)]
        part.parameters += sum(math.prod(variables[k].shape) for k in weights - owners.keys())
        owners |= dict.fromkeys(weights, part)
    return parts


def cut(parts: Sequence[Part], stages: int, max_parameters: int | None = None) -> list[Part]:
    """Joins parts to so many contiguous stages.

    The largest work of a stage is the least possible; of cuts with the same, one is taken whose
    largest stage has the fewest parameters.

    Args:
        parts: the parts, in order.
        stages: how many stages.
        max_parameters: the most parameters of a stage; None for any.

    Raises:
        InvalidOptionError: If there are fewer layers with variables than stages, or no cut keeps
            `max_parameters`.
    """
    heavy = sum(part.parameters > 0 for part in parts)
    if heavy < stages:
        raise errors.InvalidOptionError(
            "A model cannot have more stages than layers. Received: a pipeline of "
            f"{stages} stages, and a model of {heavy} layer(s) with variables of their own."
        )
    joined = _least(parts, stages, "work", math.inf, max_parameters or math.inf)
    if joined is None:
        largest = max(part.parameters for part in parts)
        raise errors.InvalidOptionError(
            f"No cut into {stages} stages keeps `max_parameters`. Received: max_parameters="
            f"{max_parameters}, and a model of {sum(p.parameters for p in parts)} parameters, of "
            f"which {largest} cannot be divided. Use more stages."
        )
    most_work = max(part.work for part in joined)
    found = _least(parts, stages, "parameters", most_work, max_parameters or math.inf)
    assert found is not None
    return found


def _least(
    parts: Sequence[Part], stages: int, cost: str, max_work: float, max_parameters: float
) -> list[Part] | None:
    """The cut with the least largest `cost`, an attribute of parts; None if no cut keeps bounds."""
    costs = [float(getattr(part, cost)) for part in parts]
    # For the first n parts in s stages: the largest cost, and where the last stage begins.
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for s in range(1, stages + 1):
        for n in range(s, len(parts) + 1):
            own, work, parameters = 0.0, 0.0, 0
            for begin in range(n - 1, s - 2, -1):
                own += costs[begin]
                work += parts[begin].work
                parameters += parts[begin].parameters
                if work > max_work * (1 + 1e-9) or parameters > max_parameters:
                    break
                before = best.get((s - 1, begin))
                # A stage needs a variable, so that something lies on its device.
                if before is None or parameters == 0:
                    continue
                largest = max(before[0], own)
                if (s, n) not in best or largest < best[s, n][0]:
                    best[s, n] = largest, begin
    joined: list[Part] = []
    end = len(parts)
    for s in range(stages, 0, -1):
        if (s, end) not in best:
            return None
        begin = best[s, end][1]
        joined.append(_joined(parts[begin:end]))
        end = begin
    return joined[::-1]


def _joined(parts: Sequence[Part]) -> Part:
    return Part(
        [call for part in parts for call in part.calls],
        sum(part.work for part in parts),
        sum(part.parameters for part in parts),
    )
