"""InclusiveFL's rules between models of unlike depth: what they share, and what a deeper one teaches a shallower one.

T models stand in stacked trees of parameters, leaves [T, ...], each of depth ``depths[t]``; what a model lacks is there
and never read. Layers are top-level names that end in a number, such as ``dense_2``; a model of depth d has 0 .. d - 1.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Array, PyTree
from hetfl_jax.models import windows

LOCAL = ("head", "pooler")  #: never shared
_LAYER = re.compile(r"(\w+?)_(\d+)")


def layer_of(name: str) -> tuple[str, int] | None:
    """Kind and number of an encoder layer, ``None`` for anything else.

    >>> layer_of("dense_2"), layer_of("head_2"), layer_of("embedding")
    (('dense', 2), None, None)
    """
    found = _LAYER.fullmatch(name)
    return (found[1], int(found[2])) if found and found[1] not in LOCAL else None


def known(name: str) -> bool:
    """Whether it is clear which models have a layer: it is never shared, or has a number.

    >>> known("dense_2"), known("head_1"), known("layer4_block0_conv1")
    (True, True, False)
    """
    return layer_of(name) is not None or re.sub(r"_?\d+$", "", name) in LOCAL


def owners(name: str, depths: Sequence[int], dropped: Sequence[int] = ()) -> np.ndarray:
    """[T] which models share a top-level name: those that have it, but not in their last layer.

    >>> owners("dense_1", (4, 2, 1)).tolist(), owners("head", (4, 2)).tolist()
    ([True, False, False], [False, False])
    """
    here = np.asarray([t not in dropped for t in range(len(depths))])
    if re.sub(r"_?\d+$", "", name) in LOCAL:
        return here & False
    layer = layer_of(name)
    return here & (np.asarray(depths) - 1 > layer[1]) if layer else here


def share(models: PyTree, examples: Array, depths: Sequence[int], dropped: Sequence[int] = ()) -> PyTree:
    """``v_t <- sum_j S_j v_j / sum_j S_j`` over the models that share v, for every one of them.

    Where none of them saw an example this round, the old values stay (the published code divides by zero there).

    Args:
      models: stacked parameters.
      examples: [T] S, examples that each model's clients saw.
      depths: of the models.
      dropped: models that take no part.

    Source: Liu et al., KDD 2022.

    >>> models = {"dense_0": jnp.array([[1.0], [3.0]]), "dense_1": jnp.array([[5.0], [9.0]])}
    >>> {name: v.ravel().tolist() for name, v in share(models, jnp.array([1.0, 3.0]), (3, 2)).items()}
    {'dense_0': [2.5, 2.5], 'dense_1': [5.0, 9.0]}
    """

    def leaf(path: windows.Path, value: Array) -> Array:
        own = owners(path[0], depths, dropped)
        if own.sum() < 1:
            return value
        weight = examples * own
        total = weight.sum()
        mean = jnp.tensordot(weight, value, 1, precision=jax.lax.Precision.HIGHEST) / jnp.where(total > 0, total, 1)
        takes = jnp.asarray(own).reshape(-1, *[1] * (value.ndim - 1)) & (total > 0)
        return jnp.where(takes, mean.astype(value.dtype), value)

    return windows.map_leaves(leaf, models)


def next_larger(depths: Sequence[int]) -> list[int | None]:
    """For each model the one with the next larger depth, ``None`` for the largest.

    >>> next_larger((5, 2, 3))
    [None, 2, 0]
    """
    order = np.argsort(depths)
    above: dict[int, int] = {int(a): int(b) for a, b in pairwise(order)}
    return [above.get(t) for t in range(len(depths))]


def momentum(gradients: PyTree, depths: Sequence[int]) -> PyTree:
    """What each model's last layer learns from the next larger model, leaves [T, ...] of ONE layer, by kind of layer.

    ``m_s = mean over j = L_s - 1 .. L_s' - 1 of G^s'_j``; zero for the largest model.

    Args:
      gradients: changes of all models by layer, leaves [T, ...].
      depths: [T] of the models.

    Raises:
      ValueError: layers of unlike shape.

    Source: Liu et al., KDD 2022.

    >>> gradients = {f"dense_{i}": jnp.array([[i + 1.0], [10.0]]) for i in range(3)}
    >>> momentum(gradients, (3, 2))["dense"].ravel().tolist()  # the mean of layers 1 and 2 of the larger model
    [0.0, 2.5]
    """
    kinds = sorted({layer[0] for name in gradients if (layer := layer_of(name))})
    above = next_larger(depths)

    def of(kind: str, t: int) -> PyTree:
        larger = above[t]
        if larger is None:
            return jax.tree.map(lambda g: jnp.zeros_like(g[0]), gradients[f"{kind}_{depths[t] - 1}"])
        layers = [gradients[f"{kind}_{j}"] for j in range(depths[t] - 1, depths[larger])]
        if len({str(jax.tree.map(jnp.shape, layer)) for layer in layers}) > 1:
            raise ValueError(
                f"layers {kind}_{depths[t] - 1}..{kind}_{depths[larger] - 1} differ in shape: InclusiveFL's momentum "
                "needs equal layers, and no depth below 2 where the first layer differs (family.hidden, mix)"
            )
        return jax.tree.map(lambda *g: sum(leaf[larger] for leaf in g) / len(g), *layers)

    return {
        kind: jax.tree.map(lambda *rows: jnp.stack(rows), *(of(kind, t) for t in range(len(depths)))) for kind in kinds
    }


def mix(gradients: PyTree, momenta: PyTree, beta: float, depths: Sequence[int], known: Array) -> PyTree:
    """``g <- beta m + (1 - beta) g`` on the last layer of every model for which m is ``known`` [T].

    Args:
      gradients: changes of all models by layer, leaves [T, ...].
      momenta: of ``momentum``, by kind of layer.
      beta: 0..1.
      depths: [T] of the models.
      known: [T] bool.

    >>> gradients = {f"dense_{i}": jnp.ones((2, 1)) for i in range(3)}
    >>> mixed = mix(gradients, {"dense": jnp.array([[0.0], [5.0]])}, 0.5, (3, 2), jnp.array([False, True]))
    >>> mixed["dense_1"].ravel().tolist(), mixed["dense_2"].ravel().tolist()
    ([1.0, 3.0], [1.0, 1.0])
    """
    out = dict(gradients)
    for t, depth in enumerate(depths):
        for kind, rows in momenta.items():

            def one(g: Array, m: Array, t: int = t) -> Array:
                return g.at[t].set(jnp.where(known[t], beta * m[t] + (1 - beta) * g[t], g[t]))

            name = f"{kind}_{depth - 1}"
            out[name] = jax.tree.map(one, out[name], rows)
    return out
