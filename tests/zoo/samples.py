"""Small random data of the kinds on which programs of the zoo train."""

import numpy as np


def tokens(rng, n, length=6, vocabulary=9):
    """Tokens from 1, zero-padded to a length; the first row has full length."""
    lengths = rng.integers(2, length + 1, size=(n, 1))
    lengths[0] = length
    is_token = np.arange(length) < lengths
    return np.where(is_token, rng.integers(1, vocabulary, size=(n, length)), 0)


def next_tokens(x):
    """The next tokens, which a language model predicts."""
    return np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)


def images(rng, n, size=8, channels=3):
    return rng.uniform(size=(n, size, size, channels))


def classes(rng, n, count=3):
    return rng.integers(0, count, size=n)
