"""The data of the digits task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """1,797 scanned digits of 8x8 pixels, which scikit-learn ships.

    Returns:
        `(x, y)` for training and `(x, y)` for validation; x of shape (n, 8, 8, 1) from 0 to 1.
    """
    import keras
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(keras.config.floatx()).reshape(-1, 8, 8, 1)
    # The same split for every seed, so that runs can be compared.
    x, x_validation, y, y_validation = train_test_split(
        x, y, test_size=0.2, stratify=y, random_state=0
    )
    return (x, y), (x_validation, y_validation)
