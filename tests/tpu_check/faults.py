"""Faults in an exchange, planted to test that the checks find them."""

import dataclasses

from tfbig._update import exchange


def changed_exchange(monkeypatch, change):
    """Replaces the result `batch` of `exchange.exchange` with `change(share, batch)`."""
    original = exchange.exchange

    def changed(share, *args):
        return change(share, original(share, *args))

    monkeypatch.setattr(exchange, "exchange", changed)


def double_sum(monkeypatch):
    """Sums gradients a second time."""

    def again(share, batch):
        return dataclasses.replace(batch, gradients=exchange.all_reduce_sum(batch.gradients))

    changed_exchange(monkeypatch, again)
