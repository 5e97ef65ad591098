"""How evenly a model serves the clients: figures of the accuracies of all clients."""

import numpy as np


def fairness(accuracy: np.ndarray, examples: np.ndarray) -> dict[str, float]:
    """Figures of q-FFL's tables for the accuracies a_1 .. a_m of m clients on their own test data.

    | name | figure |
    | --- | --- |
    | mean_over_clients | ``sum_k a_k / m`` |
    | mean_over_examples | ``sum_k n_k a_k / sum_k n_k`` (the tables' average) |
    | variance | ``10^4 / m * sum_k (a_k - mean)^2``, in percent squared |
    | worst_tenth, best_tenth | mean of the ``max(1, floor(m / 10))`` smallest and largest |
    | cosine | of the angle between a and (1, ..., 1); ``1 / cosine^2 - 1 = variance / mean^2`` in equal units |
    | angle | that angle in degrees |
    | kl | ``sum_k b_k ln(m b_k)`` with ``b = a / sum a`` and ``0 ln 0 = 0``, in nats |

    Without any correct answer cosine, angle and kl are NaN.

    Args:
      accuracy: [m] fractions 0..1.
      examples: [m] test examples of each client.

    Raises:
      ValueError: no clients, two shapes, or no examples at all.

    Source: Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020; fair_flearn ``plot_fairness.py``.

    >>> found = fairness(np.array([0.5, 1.0]), np.array([30, 10]))
    >>> found["mean_over_clients"], found["mean_over_examples"], found["variance"], found["worst_tenth"]
    (0.75, 0.625, 625.0, 0.5)
    """
    a, n = np.asarray(accuracy, np.float64), np.asarray(examples, np.float64)
    if a.ndim != 1 or not a.size or a.shape != n.shape:
        raise ValueError(f"accuracies {a.shape} with examples {n.shape}: need one of each for every client")
    if not n.sum() > 0:
        raise ValueError(f"{n.sum():.0f} test examples of all clients, allowed > 0")
    ordered, tenth, mean = np.sort(a), max(1, a.size // 10), a.mean()
    cosine = angle = kl = float("nan")
    if mean > 0:
        cosine = float(np.clip(mean / np.sqrt(np.square(a).mean()), -1, 1))
        angle = float(np.degrees(np.arccos(cosine)))
        part = a[a > 0] / a.sum()
        kl = float((part * np.log(a.size * part)).sum())
    return {
        "mean_over_clients": float(mean),
        "mean_over_examples": float((n * a).sum() / n.sum()),
        "variance": float(1e4 * np.square(a - mean).mean()),
        "worst_tenth": float(ordered[:tenth].mean()),
        "best_tenth": float(ordered[-tenth:].mean()),
        "cosine": cosine,
        "angle": angle,
        "kl": kl,
    }


def quantiles(scores: np.ndarray, parts: int = 50) -> list[float]:
    """The distribution of scores over clients in ``parts + 1`` numbers: what shares 0, 1/parts, ..., 1 have at most.

    Rounded to four decimals.

    >>> quantiles(np.array([0.5, 1.0, 0.0]), 4)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return np.quantile(np.asarray(scores, np.float64), np.linspace(0, 1, parts + 1)).round(4).tolist()
