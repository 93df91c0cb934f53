"""How well generated images resemble digits, and all ten of them."""

import numpy as np


class DigitScore:
    """The inception score, with a classifier of scanned digits in the place of Inception.

    It is 10 if the classifier is certain of each image and all digits are equally frequent, and 1
    if it cannot tell the images apart. Gray noise, and a generator that always makes the same
    digit, score near 1.

    Args:
        images: Scanned digits `(n, 8, 8, 1)` from 0 to 1.
        labels: Their classes, `(n,)`.

    Reference: Salimans et al. 2016 (arXiv:1606.03498).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        from sklearn import linear_model

        # scikit-learn's is the same on every worker, in every precision and strategy.
        self._classifier = linear_model.LogisticRegression(C=10.0, max_iter=5000)
        self._classifier.fit(_flat(images), labels)

    def of(self, images: np.ndarray) -> float:
        """The score of images."""
        probability = np.clip(self._classifier.predict_proba(_flat(images)), 1e-12, 1)
        marginal = probability.mean(axis=0)
        divergence = np.sum(probability * np.log(probability / marginal), axis=1)
        return float(np.exp(divergence.mean()))


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, "float64").reshape(len(images), -1)
