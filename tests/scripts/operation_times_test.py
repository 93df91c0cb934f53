"""scripts/operation_times.py: what is counted as what."""

import operation_times
import pytest


def test_time_within_a_span_is_not_its_own():
    spans = [
        operation_times.Span(0, 100, "outer"),
        operation_times.Span(10, 40, "inner"),
        operation_times.Span(20, 25, "innermost"),
        operation_times.Span(40, 60, "inner"),
        operation_times.Span(100, 130, "outer"),
    ]
    assert sorted(operation_times.own_times(spans)) == [
        ("inner", 20),
        ("inner", 25),
        ("innermost", 5),
        ("outer", 30),
        ("outer", 50),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model/dense/MatMul:_MklMatMul", operation_times.PRODUCTS),
        ("model/attention/einsum:_MklEinsum", operation_times.PRODUCTS),
        ("conv:_FusedConv2D", operation_times.PRODUCTS),
        ("MatMul_1.72", operation_times.PRODUCTS),
        ("dot.44", operation_times.PRODUCTS),
        ("model/mul:Mul", "Mul"),
        ("add_select_fusion.1", "add_select_fusion"),
        ("ExecutorState::Process", operation_times.SCHEDULING),
    ],
)
def test_events_are_counted_by_operation(name, kind):
    assert operation_times.kind(name) == kind


def test_lines_add_up():
    found = {"Mul": (1.0, 10), "Sum": (2.0, 5), "Sub": (0.5, 1), "Neg": (0.5, 2)}
    shown = operation_times.lines("row", found, 2)
    assert [line[1:] for line in shown] == [
        ("Sum", "5", "2.00", "50.0%"),
        ("Mul", "10", "1.00", "25.0%"),
        (operation_times.OTHERS, "3", "1.00", "25.0%"),
        ("in all", "18", "4.00", "100.0%"),
    ]
