"""What a codec is, and how long its messages are."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import bits as counts
from hetfl_jax.core import tree
from hetfl_jax.core.types import Array, ClientContext, PyTree, Shard
from hetfl_jax.models import windows
from hetfl_jax.models.windows import Family


class Codec(NamedTuple):
    """A rule for what is sent instead of a change of the parameters.

    Shapes are those of the client's level, dense or masked; dead entries of a masked change are zero and stay so.
    Random draws are taken at the full shape of a leaf and cut, so that masked equals dense.
    """

    init: Callable[[PyTree], PyTree]  #: full parameters -> memory, ``{name: {"params": tree}}``, ``{}`` for none
    #: (key, delta, context, memory) -> (what the receiver gets, memory, [3] int32 bits by ``core.bits``);
    #: ``delta`` is a tree of parameters
    encode: Callable[[Array, PyTree, ClientContext, PyTree], tuple[PyTree, PyTree, Array]]
    #: [L] int64 bits of a message of each level, where neither the change nor anything else decides on them
    length: np.ndarray | None = None
    #: codecs of what else is sent, where that is coded: ``batch_stats``, and the ``extra`` of a drift
    also: "Mapping[str, Codec]" = MappingProxyType({})


def family_of(family: Family, what: str) -> Family:
    """``family`` as a codec of ``batch_stats`` wants it: their leaves stand where the parameters do; else as it is.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,), norm="bn_tracked"), [{}], jnp.zeros((1, 3)))
    >>> list(family_of(fam, "batch_stats").shapes[0]["params"])
    ['norm_0']
    """
    if what != "batch_stats":
        return family
    shapes = tuple({"params": level.get(what, {})} for level in family.shapes)
    found = {("params", *path[1:]): window for path, window in family.windows.items() if path[0] == what}
    return family._replace(shapes=shapes, windows=found)


def bits(family: Family, codec: Codec) -> list[int]:
    """Bits of a message of each level; for codecs whose length depends on the change, of one that is zero.

    Args:
      family: of the model.
      codec: any.

    Returns:
      [L] whole numbers.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.codec import qsgd
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> bits(fam, qsgd(fam, 5)), bits(fam, qsgd(fam, 5, length="elias"))
    ([392, 280], [128, 128])
    """
    if codec.length is not None:
        return [int(length) for length in codec.length]
    memory, found = codec.init(tree.zeros(family.shapes[0]["params"])), []
    for level, shapes in enumerate(family.shapes):

        def count(key: Array, level: int = level, shapes: PyTree = shapes) -> Array:
            own = {name: windows.narrow(family, part, level) for name, part in memory.items()}
            context = ClientContext(key, jnp.int32(0), level, cast(Shard, None), (), (), own)
            return codec.encode(key, tree.zeros(shapes["params"]), context, own)[2]

        # A loop is one program, and of this one nothing but the count is left.
        found.append(int(counts.total(np.asarray(jax.lax.map(count, jax.random.split(jax.random.key(0), 1))))[0]))
    return found
