"""Faults of an exchange, planted in tests of what finds them."""

import dataclasses

from tfbig import _reduction


def changed_exchange(monkeypatch, change):
    """Replaces what `_reduction.exchange` returns by `change(share, batch)` of it."""
    original = _reduction.exchange

    def exchange(share, *args):
        return change(share, original(share, *args))

    monkeypatch.setattr(_reduction, "exchange", exchange)


def double_sum(monkeypatch):
    """Gradients are summed once more."""

    def again(share, batch):
        return dataclasses.replace(batch, gradients=_reduction.all_reduce_sum(batch.gradients))

    changed_exchange(monkeypatch, again)
