"""The bar of the language task: counts predict a byte from the four before it."""

from __future__ import annotations

import numpy as np

ORDER = 5
# Before the first byte of a document.
_START = 256
_SYMBOLS = 257


class FiveGram:
    """An interpolated Kneser-Ney model of bytes, the best known smoothing of n-grams.

    The probability of a byte after a context of 4 bytes is its count there, less a discount. The
    discounts are redistributed by the context of 3 bytes, and so on. A shorter context counts the
    different bytes before it instead of its occurrences. Without context, every byte has some
    probability.

    Args:
        documents: The text to count in.

    Reference: Chen and Goodman 1999, "An empirical study of smoothing techniques for language
        modeling", with one discount for each order.
    """

    def __init__(self, documents: list[bytes]) -> None:
        grams, counts = np.unique(_grams(documents), return_counts=True)
        self._orders = []
        for order in range(ORDER, 0, -1):
            self._orders.append(_Order(grams, counts))
            # A gram without its first byte, counted once for each different one.
            grams, counts = np.unique(grams % _SYMBOLS ** (order - 1), return_counts=True)

    def bits_per_byte(self, documents: list[bytes]) -> float:
        """Bits per byte of these documents, on average."""
        grams = _grams(documents)
        probability = np.full(len(grams), 1 / 256)
        for order in range(1, ORDER + 1):
            probability = self._orders[ORDER - order].probability(
                grams % _SYMBOLS**order, probability
            )
        return float(-np.mean(np.log2(probability)))


class _Order:
    """The grams of one length: context and byte as one number, sorted."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray) -> None:
        self.grams, self.counts = grams, counts
        once, twice = np.sum(counts == 1), np.sum(counts == 2)
        # Ney, Essen and Kneser 1994. In short texts, no gram may occur once.
        self.discount = once / (once + 2 * twice) if once else 0.5
        self.contexts, first = np.unique(grams // _SYMBOLS, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.followers = np.diff(np.append(first, len(grams)))

    def probability(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """That of each gram's last byte, given that with the context shortened by one byte."""
        count = _look_up(self.grams, self.counts, grams)
        total = _look_up(self.contexts, self.totals, grams // _SYMBOLS)
        followers = _look_up(self.contexts, self.followers, grams // _SYMBOLS)
        known = total > 0
        total = np.where(known, total, 1)
        seen = np.maximum(count - self.discount, 0) / total
        return np.where(known, seen + self.discount * followers / total * shorter, shorter)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _grams(documents: list[bytes]) -> np.ndarray:
    """Each byte with the four before it, as a number in base 257."""
    grams = []
    for document in documents:
        symbols = np.frombuffer(document, np.uint8).astype("int64")
        symbols = np.concatenate([np.full(ORDER - 1, _START), symbols])
        number = np.zeros(len(document), "int64")
        for i in range(ORDER):
            number = number * _SYMBOLS + symbols[i : i + len(document)]
        grams.append(number)
    return np.concatenate(grams)
