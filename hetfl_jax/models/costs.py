"""What a level costs: parameters, bytes and multiply-adds."""

from typing import NamedTuple

import jax
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.jaxprs import products
from hetfl_jax.core.types import PyTree
from hetfl_jax.models.adapter import Net
from hetfl_jax.models.windows import Family

BACKWARD = 2  #: multiply-adds of a backward pass over those of a forward pass: gradients of activations and of weights


class Costs(NamedTuple):
    """What a level costs."""

    parameters: np.ndarray  #: [L] trainable entries
    bytes: np.ndarray  #: [L] bytes of all variables: what travels one way
    macs: np.ndarray  #: [L] multiply-adds of one example's forward pass (convolutions and matrix products)
    first_macs: np.ndarray  #: [L] those of the first layer, whose input needs no gradient
    layers: np.ndarray  #: [L] convolutions and matrix products


def costs(fam: Family) -> Costs:
    """Parameters, bytes one way, and forward multiply-adds per example, of every level.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(), [dict(width=1.0)], jnp.zeros((1, 784)))
    >>> costs(fam).parameters.tolist(), costs(fam).macs.tolist()
    ([159010], [158800])
    """
    ready = jax.eval_shape(lambda v: fam.prepare(v, None), fam.example)
    batch = jax.tree.leaves(fam.example)[0].shape[0]

    def macs(net: Net, shapes: PyTree) -> list[int]:
        return [n // batch for n in products(jax.make_jaxpr(net.counted)(shapes, ready).jaxpr)]

    layers = [macs(net, s) for net, s in zip(fam.nets, fam.shapes)]
    return Costs(
        np.asarray([sum(leaf.size for leaf in jax.tree.leaves(s["params"])) for s in fam.shapes], np.int64),
        np.asarray([tree.nbytes(s) for s in fam.shapes], np.int64),
        np.asarray([sum(each) for each in layers], np.int64),
        np.asarray([each[0] if each else 0 for each in layers], np.int64),
        np.asarray([len(each) for each in layers], np.int64),
    )
