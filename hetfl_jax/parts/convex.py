"""Convex problems: whether a net is linear in its parameters, and how smooth its clients' losses then are."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.random import draw
from hetfl_jax.core.settings import at_once
from hetfl_jax.core.types import Array, Population, PyTree
from hetfl_jax.models.windows import Family

ITERATIONS = 2000  #: of the power method, at most


@at_once
def is_linear(family: Family, tolerance: float = 1e-4) -> bool:
    """Whether the full net's outputs are linear in its parameters: ``f(a + b) + f(0) = f(a) + f(b)`` on random ones.

    >>> from hetfl_jax.models import MLP, families
    >>> [is_linear(families.family(MLP(hidden=h), [{}], jnp.zeros((1, 3)))) for h in ((), (4,))]
    [True, False]
    """
    if set(family.shapes[0]) != {"params"}:
        return False
    keys = iter(jax.random.split(jax.random.key(0), 3 + 2 * len(jax.tree.leaves(family.shapes[0]))))
    a, b = ({"params": _like(family, lambda shape: draw(jax.random.normal, next(keys), shape))} for _ in range(2))
    ready = jax.eval_shape(lambda x: family.prepare(x, None), family.example)
    if not jnp.issubdtype(ready.dtype, jnp.floating):
        return False
    x = draw(jax.random.normal, next(keys), (5, *ready.shape[1:]))
    run = lambda variables: family.nets[0].apply(variables, x)[0]  # noqa: E731
    together, zero = run(jax.tree.map(jnp.add, a, b)), run(jax.tree.map(jnp.zeros_like, a))
    apart = run(a) + run(b)
    return bool(jnp.abs(together + zero - apart).max() <= tolerance * jnp.maximum(jnp.abs(apart).max(), 1e-6))


@at_once
def smoothness(family: Family, population: Population, squares: bool = False, l2: float = 0.0) -> np.ndarray:
    """[N] how smooth each client's loss is, summed over its examples: ``lambda_max(sum_i J_i' B J_i) + l2``.

    J_i is the derivative of the outputs of example i by the parameters, and B is ``(I - 11'/C) / 2``, above the
    curvature of the cross-entropy of C outputs everywhere, or 2 for ``squares``, of ``(f - y)^2``. With two outputs
    0 and ``x' theta``, logistic regression, this is ``lambda_max(X'X) / 4 + l2``. By the power method, from below.

    Args:
      family: of a net that is linear in its parameters.
      population: the clients' examples.

    Source: Boehning 1992 (Ann. Inst. Statist. Math.) for B.

    >>> from hetfl_jax.data.population import population
    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(), classes=1), [{}], jnp.zeros((1, 1)))
    >>> x = np.array([[1.0], [1.0], [3.0]])
    >>> people = population(x, np.zeros(3), np.arange(3), np.array([2, 1]))
    >>> smoothness(fam, people, squares=True).round(3).tolist()  # 2 (x^2 + 1) an example, with the bias
    [8.0, 20.0]
    """
    most = int(population.size.max())
    params = _like(family, lambda shape: jax.random.normal(jax.random.key(0), shape))

    def bounded(outputs: Array) -> Array:
        return 2 * outputs if squares else (outputs - outputs.mean(-1, keepdims=True)) / 2

    def of(client: Array) -> Array:
        place = jnp.arange(most)
        there = place < population.size[client]
        rows = population.rows[population.offset[client] + jnp.where(there, place, 0)]
        x = family.prepare(population.x[rows], None)
        outputs = lambda p: family.nets[0].apply({"params": p}, x)[0][-1]  # noqa: E731
        _, forward = jax.linearize(outputs, jax.tree.map(jnp.zeros_like, params))
        back = jax.linear_transpose(forward, params)

        def step(state: tuple[Array, PyTree, Array, Array]) -> tuple[Array, PyTree, Array, Array]:
            number, vector, _, before = state
            curved = jnp.where(there[:, None], bounded(forward(vector)), 0)
            (product,) = back(curved)
            length = _norm(product)
            return number + 1, jax.tree.map(lambda v: v / jnp.maximum(length, 1e-30), product), before, length

        def goes_on(state: tuple[Array, PyTree, Array, Array]) -> Array:
            number, _, before, now = state
            return (number < ITERATIONS) & (jnp.abs(now - before) > 1e-7 * now)

        length = _norm(params)
        start = jax.tree.map(lambda v: v / length, params)
        return jax.lax.while_loop(goes_on, step, (jnp.int32(0), start, length * 0 - 1, length * 0))[3]

    return np.asarray(jax.lax.map(of, jnp.arange(population.size.shape[0])), np.float64) + l2


def given_or_found(
    given: Sequence[float], clients: int, family: Family, population: Population | None, squares: bool, l2: float
) -> Array:
    """[N] smoothness as given, or of a population.

    Raises:
      ValueError: neither, or numbers that do not fit.

    Args:
      given: one number > 0 a client, or none.
      clients: N.
      family, population, squares, l2: see ``smoothness``, which finds what is not given; else unused.

    >>> given_or_found([2.0, 4.0], 2, None, None, False, 0.0).tolist()
    [2.0, 4.0]
    """
    if not len(given) and population is None:
        raise ValueError(f"no smoothness: need one number for each of {clients} clients (method.args.smoothness)")
    if len(given):
        found = np.asarray(given, float)
    else:
        assert population is not None
        found = smoothness(family, population, squares, l2)
    if found.shape != (clients,) or not (found > 0).all():
        raise ValueError(f"{found.size} numbers for {clients} clients: need one > 0 each (method.args.smoothness)")
    return jnp.asarray(found)


def _like(family: Family, draw: PyTree) -> PyTree:
    return jax.tree.map(lambda shape: draw(shape.shape), tree.zeros(family.shapes[0]["params"]))


def _norm(values: PyTree) -> Array:
    return jnp.sqrt(jnp.stack([jnp.square(leaf).sum() for leaf in jax.tree.leaves(values)]).sum())
