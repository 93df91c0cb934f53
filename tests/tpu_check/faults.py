"""Faults of an exchange, planted in tests of what finds them."""

import dataclasses

from tfbig._update import exchange, replicas


def changed_exchange(monkeypatch, change):
    """Replaces what `exchange.all_reduce_accumulated` returns with `change(share, batch)`."""
    original = exchange.all_reduce_accumulated

    def changed(share, *args):
        return change(share, original(share, *args))

    monkeypatch.setattr(exchange, "all_reduce_accumulated", changed)


def double_sum(monkeypatch):
    """Sums gradients a second time."""

    def again(share, batch):
        return dataclasses.replace(batch, gradients=replicas.all_reduce_sum(batch.gradients))

    changed_exchange(monkeypatch, again)
