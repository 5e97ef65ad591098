"""How many bits a client receives and sends at each level."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import bits
from hetfl_jax.core.types import Array, ClientContext, Price, PyTree, Shard
from hetfl_jax.models import windows
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import message
from hetfl_jax.parts.drift import Drift
from hetfl_jax.parts.message import Codec


def bits_of(family: Family, parts: Mapping[str, PyTree]) -> np.ndarray:
    """[L] int64 bits of trees of collections as they are at every level.

    Args:
      family: of the model; a leaf that it does not know has its own shape at every level.
      parts: by any name, ``{name: {"params": tree}}``; arrays or their shapes.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> bits_of(fam, {"variables": fam.shapes[0]}).tolist()
    [2112, 1216]
    """
    extents = windows.memory_extents(family, parts)
    sizes = [8 * leaf.dtype.itemsize for leaf in windows.flat(parts).values()]
    return np.asarray([sum(size * int(np.prod(e)) for size, e in zip(sizes, level)) for level in extents], np.int64)


def down_bits(family: Family, sent: PyTree) -> Array:
    """[L, 3] bits that a client of each level receives of a ``Sent``, as digits of ``core.bits``.

    Args:
      family: of the model.
      sent: parameters count as coded where ``sent.coded`` says so, all else as it is.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.compose import Sent
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> bits.total(down_bits(fam, Sent(fam.shapes[0], {}))).tolist()
    [2112, 1216]
    """
    whole = bits_of(family, {"variables": sent.variables, "context": sent.context})
    if isinstance(sent.coded, tuple):
        return jnp.asarray(bits.digits(whole))
    plainly = bits_of(family, {"variables": {"params": sent.variables["params"]}})
    return jnp.asarray(bits.digits(whole - plainly)) + sent.coded


def memory_of(uplink: Codec, variables: PyTree) -> PyTree:
    """One client's memory of a codec, and of those of what else is sent: ``batch_stats_error`` and so on.

    Args:
      uplink: the codec, with ``also`` for what else it codes.
      variables: of the full model.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts import codec
    >>> fam = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 3)))
    >>> list(memory_of(codec.make("signs", fam, error_feedback=True), families.init(fam, jax.random.key(0))))
    ['error']
    """
    kept = dict(uplink.init(variables["params"]))
    for what, codec in uplink.also.items():
        kept |= _named(what, codec.init(variables[_collection(what)]))
    return kept


def encoded(
    family: Family, uplink: Codec | None, delta: PyTree, extra: PyTree, travelling: PyTree, context: ClientContext,
    memory: PyTree,
) -> tuple[PyTree, PyTree, PyTree, Array]:  # fmt: skip
    """(what the server gets of the change, and of the ``extra``, memory, [3] bits of all); what is not coded as it is.

    Args:
      family: of the model.
      uplink: ``None`` sends everything as it is.
      delta: the change, by collection, at the client's level.
      extra: what the drift sends besides, ``{"params": tree}`` or ``{}``.
      travelling: the variables that leave the client, at full shape.
      context: the client's; its key draws, its level counts.
      memory: of the codecs, at the client's level.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts import codec
    >>> fam = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 3)))
    >>> delta, context = families.init(fam, jax.random.key(0)), ClientContext(jax.random.key(0), 0, 0, (), (), (), {})
    >>> signs = codec.make("signs", fam, error_feedback=True)
    >>> coded, plain = (encoded(fam, by, delta, {}, delta, context, memory_of(signs, delta)) for by in (signs, None))
    >>> int(bits.total(coded[3])), int(bits.total(plain[3])), plain[0] is delta
    (194, 2112, True)
    """
    codecs = {} if uplink is None else {"params": uplink, **uplink.also}
    plain = {"model": {k: v for k, v in travelling.items() if k not in codecs}, "extra": extra}
    if "extra" in codecs:
        plain["extra"] = {}
    count = jnp.asarray(bits.digits(bits_of(family, plain)))[windows.index_of(context.level)]
    for place, (what, codec) in enumerate(codecs.items(), 1):
        key = jax.random.fold_in(context.key, (1 << 19) + place)  # apart from epochs and steps
        values = extra["params"] if what == "extra" else delta[what]
        sent, kept, coded = codec.encode(key, values, context, _of(what, memory))
        memory, count = {**memory, **_named(what, kept)}, count + coded
        if what == "extra":
            extra = {**extra, "params": sent}
        else:
            delta = {**delta, what: sent}
    return delta, extra, memory, count


def _collection(what: str) -> str:
    return "params" if what == "extra" else what


def _named(what: str, memory: PyTree) -> PyTree:
    """A codec's memory as it is kept among that of others."""
    if what == "params":
        return memory
    own = _collection(what)
    return {f"{what}_{n}": {own if k == "params" else k: v for k, v in p.items()} for n, p in memory.items()}


def _of(what: str, memory: PyTree) -> PyTree:
    """The way back from ``_named``."""
    if what == "params":
        return memory
    own, start = _collection(what), f"{what}_"
    named = {name.removeprefix(start): part for name, part in memory.items() if name.startswith(start)}
    return {n: {"params" if k == own else k: v for k, v in p.items()} for n, p in named.items()}


def price_of(
    family: Family, codecs: tuple[Codec | None, Codec | None], drift: Drift, init: Callable[..., PyTree],
    send: Callable[..., PyTree], travels: Callable[[PyTree], PyTree],
) -> Price:  # fmt: skip
    """Bits of an item at each level, from shapes; of a codec on a change of zero.

    Args:
      codecs: of the uplink and of the downlink.
      travels: of a ``Sent``, what leaves the server.
      drift: what it sends besides the model counts as sent.
      init, send: of the algorithm; they are traced for shapes alone.

    Returns:
      A ``Price`` with bits down and up, [L] int64, coded and plain.

    Raises:
      ValueError: a codec of what a method sends besides the model, where it sends nothing.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts import codec, drift
    >>> from hetfl_jax.parts.compose import Sent
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> init, send = lambda key: (families.init(fam, key), {}), lambda variables, round: Sent(variables)
    >>> signs = codec.make("signs", fam, error_feedback=True)
    >>> price = price_of(fam, (signs, None), drift.none(), init, send, lambda sent: sent)
    >>> price.down.tolist(), price.up.tolist()
    ([2112, 1216], [194, 166])
    """
    key, now = jax.random.key(0), jnp.int32(0)
    server, memory = jax.eval_shape(init, key)
    sent = jax.eval_shape(send, server, now)
    params, (uplink, downlink) = sent.variables["params"], codecs

    def extra(params: PyTree, sent: PyTree, memory: PyTree) -> PyTree:
        shard = Shard((), (), (), now, now, now)
        return drift.update(params, ClientContext(key, now, 0, shard, (), sent, memory), jnp.int32(1))[1]

    own = jax.eval_shape(extra, params, sent, memory)
    whole = bits_of(family, {"variables": travels(sent).variables})
    down = plain_down = whole + bits_of(family, {"context": sent.context})
    up = plain_up = whole + bits_of(family, {"extra": own})
    if downlink:
        down = down - bits_of(family, {"": {"params": params}}) + np.asarray(message.bits(family, downlink))
    if uplink and "extra" in uplink.also and not own:
        raise ValueError("extra true, but this method sends nothing besides the model: need false (uplink.extra)")
    for what, codec in {"params": uplink, **uplink.also}.items() if uplink else ():
        tree = own if what == "extra" else {what: sent.variables[what]}
        coded = message.bits(message.family_of(family, what), codec)
        up = up - bits_of(family, {"": tree}) + np.asarray(coded)
    return Price(down, up, plain=(plain_down, plain_up))
