"""scripts/operation_times.py: what is counted as what."""

import pytest
from benchmarks import operations


def test_time_within_a_span_is_not_its_own():
    spans = [
        operations.Span(0, 100, "outer"),
        operations.Span(10, 40, "inner"),
        operations.Span(20, 25, "innermost"),
        operations.Span(40, 60, "inner"),
        operations.Span(100, 130, "outer"),
    ]
    assert sorted(operations.own_times(spans)) == [
        ("inner", 20),
        ("inner", 25),
        ("innermost", 5),
        ("outer", 30),
        ("outer", 50),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model/dense/MatMul:_MklMatMul", operations.PRODUCTS),
        ("model/attention/einsum:_MklEinsum", operations.PRODUCTS),
        ("conv:_FusedConv2D", operations.PRODUCTS),
        ("MatMul_1.72", operations.PRODUCTS),
        ("dot.44", operations.PRODUCTS),
        ("model/mul:Mul", "Mul"),
        ("add_select_fusion.1", "add_select_fusion"),
        ("ExecutorState::Process", operations.SCHEDULING),
    ],
)
def test_events_are_counted_by_operation(name, kind):
    assert operations.kind(name) == kind


def test_lines_add_up():
    found = {"Mul": (1.0, 10), "Sum": (2.0, 5), "Sub": (0.5, 1), "Neg": (0.5, 2)}
    shown = operations.lines("row", found, 2)
    assert [line[1:] for line in shown] == [
        ("Sum", "5", "2.00", "50.0%"),
        ("Mul", "10", "1.00", "25.0%"),
        (operations.OTHERS, "3", "1.00", "25.0%"),
        ("in all", "18", "4.00", "100.0%"),
    ]
