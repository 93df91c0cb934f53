"""How much generated digits are like digits, and all of them."""

import numpy as np


class DigitScore:
    """The inception score, with a classifier of scanned digits in the place of Inception.

    From 1 to 10: 10 if the classifier is certain of each image, and all digits are equally
    frequent; 1 if it takes all images for the same, or cannot tell. Gray noise and a generator
    that always makes the same digit are near 1.

    Args:
        images: scanned digits `(n, 8, 8, 1)` from 0 to 1.
        labels: their classes.

    Reference: Salimans et al. 2016 (arXiv:1606.03498).
    """

    def __init__(self, images, labels):
        from sklearn import linear_model

        # Of scikit-learn, as it is the same on each worker, in each precision and strategy.
        self._classifier = linear_model.LogisticRegression(C=10.0, max_iter=5000)
        self._classifier.fit(_flat(images), labels)

    def of(self, images):
        """The score of images, a float."""
        probability = np.clip(self._classifier.predict_proba(_flat(images)), 1e-12, 1)
        marginal = probability.mean(axis=0)
        divergence = np.sum(probability * np.log(probability / marginal), axis=1)
        return float(np.exp(divergence.mean()))


def _flat(images):
    return np.asarray(images, "float64").reshape(len(images), -1)
