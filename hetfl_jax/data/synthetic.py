"""Generators of data that differ by client: one linear model each, or one teacher net that each client bends."""

from collections.abc import Iterator

import numpy as np

DIMENSION, CLASSES = 60, 10


def sizes(rng: np.random.RandomState, clients: int, sigma: float) -> np.ndarray:
    """[N] examples of each client: ``floor(LogNormal(4, sigma)) + 50``.

    Args:
      rng: is advanced by N draws.
      sigma: deviation of the size's logarithm; 2 in the published sets.

    >>> sizes(np.random.RandomState(1), 3, 1.0).tolist()
    [327, 79, 82]
    """
    return rng.lognormal(4, sigma, clients).astype(int) + 50


def linear_clients(
    clients: int, seed: int, *, alpha: float = 1.0, beta: float = 1.0, sigma: float = 2.0, iid: bool = False,
    hybrid: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """The examples of one client after the other: x [n_k, 60] float64 and y [n_k] int32.

    ``n_k = floor(LogNormal(4, sigma)) + 50``; ``u_k ~ N(0, alpha)``, ``W_k [60, 10]`` and ``b_k [10]`` have entries of
    N(u_k, 1); ``B_k ~ N(0, beta)``, ``v_k [60]`` has entries of N(B_k, 1); ``x ~ N(v_k, diag(j^-1.2))`` with j = 1..60;
    ``y = argmax(x W_k + b_k)``. All second parameters are standard deviations. An iid client has v = 0 and the W and b
    that all iid clients share, with entries of N(0, 1); what else it draws is thrown away.

    Args:
      iid: all clients are iid.
      hybrid: this many of the first clients are.

    Raises:
      ValueError: a value out of range, or both ``iid`` and ``hybrid``.

    Source: fair_flearn, ``data/synthetic*/generate_*.py``, in its call order: sizes, u, B, v of the clients that are
    not iid, the shared W and b if there are iid clients, then W, b and x client by client.

    >>> [x.shape for x, y in linear_clients(2, seed=1)]
    [(1456, 60), (66, 60)]
    """
    if clients < 1:
        raise ValueError(f"{clients} clients, allowed >= 1 (data.clients)")
    for name, value in (("alpha", alpha), ("beta", beta), ("sigma", sigma), ("hybrid", hybrid)):
        if not value >= 0:
            raise ValueError(f"{name} {value}, allowed >= 0 (data.options)")
    if iid and hybrid:
        raise ValueError(f"hybrid {hybrid} with iid, allowed 0 (data.options)")
    first = clients if iid else min(hybrid, clients)  # clients from here on have a model of their own
    rng = np.random.RandomState(seed)
    number = sizes(rng, clients, sigma)
    model_mean = rng.normal(0, alpha, clients)
    centre_mean = rng.normal(0, beta, clients)
    centre = np.zeros((clients, DIMENSION))
    for i in range(first, clients):
        centre[i] = rng.normal(centre_mean[i], 1, DIMENSION)

    def model(mean: float) -> tuple[np.ndarray, np.ndarray]:
        return rng.normal(mean, 1, (DIMENSION, CLASSES)), rng.normal(mean, 1, CLASSES)

    shared = model(0) if first else None
    deviation = np.arange(1, DIMENSION + 1) ** -0.6

    def client(i: int) -> tuple[np.ndarray, np.ndarray]:
        own = model(model_mean[i])
        w, b = shared if shared is not None and i < first else own
        x = centre[i] + rng.normal(size=(number[i], DIMENSION)) * deviation
        return x, np.argmax(x @ w + b, 1).astype(np.int32)

    return map(client, range(clients))


def teacher_clients(
    clients: int, seed: int, *, covariate: float = 1.0, concept: float = 0.5, hidden: int = 64, least: int = 20,
    most: int = 600,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """The examples of one client after the other, labelled by a net with ReLUs: x [n_k, 60] float64, y [n_k] int32.

    ``n_k = min(floor(LogNormal(4, 1)) + least, most)``, whatever else a client draws; ``x ~ N(v_k, diag(j^-1.2))`` with
    j = 1..60, ``v_k ~ N(0, covariate^2 diag(j^-1.2))``; ``y = argmax(relu(x A + a) (B + concept D_k))``, where A
    [60, H], a [H], B and every client's own D_k [H, 10] have entries of N(0, 1). The columns of B have mean 0.

    Args:
      covariate: standard deviation of the clients' centres; 0: all clients see alike examples.
      concept: how much a client's labels differ from the others'; 0: all clients label alike.
      hidden: H, of the teacher.
      least, most: examples of a client.

    Raises:
      ValueError: a value out of range.

    >>> [x.shape for x, y in teacher_clients(2, seed=1)]
    [(97, 60), (144, 60)]
    """
    if clients < 1:
        raise ValueError(f"{clients} clients, allowed >= 1 (data.clients)")
    for name, value in (("covariate", covariate), ("concept", concept), ("least", least)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} {value}, allowed >= 0 (data.options)")
    if hidden < 1 or most < max(least, 1):
        raise ValueError(f"hidden {hidden}, most {most}: allowed >= 1, and at least least {least} (data.options)")
    rng = np.random.default_rng(seed)
    number = np.minimum(rng.lognormal(4, 1, clients).astype(int) + least, most)
    first, offset, last = (rng.normal(size=shape) for shape in ((DIMENSION, hidden), hidden, (hidden, CLASSES)))
    last -= last.mean(0)
    deviation = np.arange(1, DIMENSION + 1) ** -0.6

    def client(i: int) -> tuple[np.ndarray, np.ndarray]:
        own = np.random.default_rng([seed, i])
        centre = covariate * own.normal(size=DIMENSION) * deviation
        bent = last + concept * own.normal(size=last.shape)
        x = centre + own.normal(size=(number[i], DIMENSION)) * deviation
        return x, np.argmax(np.maximum(x @ first + offset, 0) @ bent, 1).astype(np.int32)

    return map(client, range(clients))
