"""What tfbig is to do, in plain numpy and float64, to be checked by eye.

No TensorFlow and no Keras here. A network of one hidden layer, weighted mean squared
error, clipping by the global norm, SGD with momentum; and the loss scale.
"""

import dataclasses

import numpy as np


def summed_loss(weights, x, y, sample_weight):
    """Sum over samples of weight times squared error (a mean over outputs).

    Args:
        weights: List of arrays `(features, hidden)`, `(hidden,)`,
            `(hidden, outputs)`, `(outputs,)`.
        x: Array `(samples, features)`.
        y: Array `(samples, outputs)`.
        sample_weight: Array `(samples,)`.

    Returns:
        The sum, and its gradients with respect to the weights.
    """
    w1, b1, w2, b2 = weights
    hidden = np.tanh(x @ w1 + b1)
    error = hidden @ w2 + b2 - y
    loss = np.sum(sample_weight * np.mean(error**2, axis=1))

    d_output = sample_weight[:, np.newaxis] * 2 * error / y.shape[1]
    d_hidden = (d_output @ w2.T) * (1 - hidden**2)
    return loss, [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_output, d_output.sum(0)]


def split(samples, parts):
    """Index arrays of `parts` parts of nearly equal size; may be empty."""
    return np.array_split(np.arange(samples), parts)


def batch_loss(weights, x, y, sample_weight, replicas, micro_batches):
    """The loss of the effective batch and its gradients, summed piece by piece."""
    total, gradients = 0.0, [np.zeros_like(w) for w in weights]
    for share in split(len(x), replicas):
        for part in split(len(share), micro_batches):
            i = share[part]
            loss, parts = summed_loss(weights, x[i], y[i], sample_weight[i])
            total += loss
            gradients = [g + p for g, p in zip(gradients, parts, strict=True)]
    # Divided once, by the samples of the whole batch.
    return total / len(x), [g / len(x) for g in gradients]


def clip_by_global_norm(gradients, limit):
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients))
    return [g * min(1.0, limit / norm) for g in gradients]


def momentum_update(weights, velocity, gradients, learning_rate, momentum):
    velocity = [momentum * v - learning_rate * g for v, g in zip(velocity, gradients, strict=True)]
    return [w + v for w, v in zip(weights, velocity, strict=True)], velocity


@dataclasses.dataclass
class LossScale:
    """The loss scale after a number of updates.

    Attributes:
        scale: What the loss is multiplied by; a float32, as it is stored.
        finite: Finite updates since the last skip or growth.
        patience: Skips that leave the scale as it is, plus one. Only growth restores
            it, as in Megatron-LM.
        skipped: All skips so far.
    """

    scale: np.float32
    finite: int
    patience: int
    skipped: int


def loss_scales(is_finite, initial, growth, backoff, growth_interval, floor, ceiling, hysteresis):
    """The `LossScale` after each update, given whether its gradient was finite."""
    now = LossScale(np.float32(initial), 0, hysteresis, 0)
    for finite in is_finite:
        now = dataclasses.replace(now)
        if not finite:
            now.finite = 0
            now.skipped += 1
            now.patience -= 1
            if now.patience <= 0:
                now.scale = np.float32(max(now.scale * np.float32(backoff), floor))
        else:
            now.finite += 1
            if now.finite == growth_interval:
                now.finite = 0
                now.patience = hysteresis
                now.scale = np.float32(min(now.scale * np.float32(growth), ceiling))
        yield now
