"""How long each kind of operation ran, as the profiler of TensorFlow saw it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator

# The kernels of TensorFlow, those of oneDNN, and what XLA calls them.
_PRODUCT = re.compile(r"(_Mkl|_?Fused)*(Batch)?(MatMul|Einsum|Conv2D)|dot|convolution")
PRODUCTS, SCHEDULING, OTHERS = "products, convolutions", "scheduling", "all others"

# What the profiler calls the loop of TensorFlow's executor between operations.
_EXECUTOR = "ExecutorState::Process"


@dataclasses.dataclass(frozen=True)
class Span:
    """From when to when something ran, in picoseconds; a span lies within another or beside it."""

    begin: int
    end: int
    name: str


def own_times(spans: list[Span]) -> Iterator[tuple[str, int]]:
    """The time of each span without those within it, in picoseconds, by its name."""
    open_: list[tuple[Span, int]] = []

    def closed(until: float) -> Iterator[tuple[str, int]]:
        while open_ and open_[-1][0].end <= until:
            span, within = open_.pop()
            yield span.name, span.end - span.begin - within
            if open_:
                outer, before = open_[-1]
                open_[-1] = outer, before + span.end - span.begin

    for span in sorted(spans, key=lambda s: (s.begin, -s.end)):
        yield from closed(span.begin)
        open_.append((span, 0))
    yield from closed(float("inf"))


def kind(name: str) -> str:
    """What an event of the profiler is counted as: "layer/mul:Mul" and "mul_fusion.3"."""
    if name == _EXECUTOR:
        return SCHEDULING
    operation = re.sub(r"\.\d+$", "", name.rpartition(":")[2])
    return PRODUCTS if _PRODUCT.match(operation) else operation


def events(directory: str) -> Iterator[list[Span]]:
    """What ran, by thread, but the program's own, which waits for the others."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    (host,) = (plane for plane in space.planes if plane.name == "/host:CPU")
    names = {i: metadata.name for i, metadata in host.event_metadata.items()}
    for line in host.lines:
        if line.name == "python":
            continue
        yield [
            Span(e.offset_ps, e.offset_ps + e.duration_ps, names[e.metadata_id])
            for e in line.events
        ]


def lines(
    row: str, found: dict[str, tuple[float, float]], most: int
) -> list[tuple[str, str, str, str, str]]:
    """The lines of a row: the kinds that take most, and the others together."""
    total = sum(time for time, _ in found.values())
    listed = sorted(found, key=lambda k: -found[k][0])[:most]
    rest = [found[k] for k in found if k not in listed]
    shown = [(k, *found[k]) for k in listed]
    shown.append((OTHERS, sum(time for time, _ in rest), sum(count for _, count in rest)))
    shown.append(("in all", total, sum(count for _, count in found.values())))
    return [
        (row, what, f"{count:,.0f}", f"{time:.2f}", f"{time / total:.1%}")
        for what, time, count in shown
    ]
