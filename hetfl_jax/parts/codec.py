"""What travels: a codec stands between a change and the merge, or inside ``send``.

``make(name, family, **args)`` gives a codec by name; each factory takes the family first. Notation: ``d`` the entries
of one leaf that the client's level has, ``x`` these entries. What is sent leaf by leaf is sent apart for each of them.

Bits are those of an actual message at the client's own level; a float has 32. Sums over a leaf are taken at its full
shape, filled up with zeros, as random draws are: so a masked client sends what a dense one sends, bit for bit (of
``low_rank`` up to the rounding of sums, which a compiler may order otherwise).
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from hetfl_jax.core import bits as counts
from hetfl_jax.core.types import Array, ClientContext, PyTree
from hetfl_jax.models import windows
from hetfl_jax.models.windows import Family, Path
from hetfl_jax.parts import message, sparse

Codec = message.Codec


def _leafwise(family: Family, code: Callable[[sparse.Part], Array], length: Callable[[int], int]) -> Codec:
    """A codec without memory: ``code`` of each leaf, ``length`` bits for a leaf of which a level has d > 0 entries."""
    of_leaves = [[length(int(d)) if d else 0 for d in entries] for entries in sparse.sizes(family).values()]
    bits = np.asarray(of_leaves, np.int64).sum(axis=0)
    fixed = counts.digits(bits)

    def encode(key: Array, delta: PyTree, context: ClientContext, memory: PyTree) -> tuple[PyTree, PyTree, Array]:
        parts = sparse.parts(family, key, delta, context.level)
        sent = windows.map_leaves(lambda path, value: parts[path].only(code(parts[path])), delta)
        return sent, memory, jnp.asarray(fixed)[windows.index_of(context.level)]

    return Codec(lambda params: {}, encode, bits)


def _check(right: bool, value: str, allowed: str, key: str) -> None:
    if not right:
        raise ValueError(f"{value}, allowed {allowed} (uplink.args.{key})")


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def none(family: Family) -> Codec:
    """The change itself: ``32 d`` bits a leaf.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, none(fam))
    [2112, 1216]
    """
    return _leafwise(family, lambda part: part.value, lambda d: 32 * d)


def qsgd(family: Family, levels: int, scope: str = "tensor", scaling: str = "l2", length: str = "fixed") -> Codec:
    """QSGD: ``scale * sign(x_i) * xi_i / s``, where xi_i is ``s |x_i| / scale`` rounded to a whole number at random.

    Args:
      levels: s, intervals of [0, scale]; there are s + 1 magnitudes.
      scope: what has one scale: a "tensor", a "layer" (leaves of one module) or the "whole" change.
      scaling: "l2": the norm ``||x||_2`` (QSGD, FedPAQ); "max": ``max |x_i|``; both unbiased. "shrunk": "l2", and the
        result times ``1 / (1 + min(d / s^2, sqrt(d) / s))`` with d the entries in the scope: biased, but in the mean
        nearer to x than 0 is, which error feedback needs.
      length: "fixed": ``d (1 + ceil(log2(s + 1))) + 32`` bits a scope; "joint", sign and level in one number:
        ``ceil(d log2(2 s + 1)) + 32``; "elias": 32 a scope, and for each entry that is not 0 the Elias codes of its
        distance from the one before and of its level, and a sign: what this message has.

    Raises:
      ValueError: levels outside 1..2^24, an unknown scope, scaling or length.

    Source: Alistarh et al. 2017 (NIPS), Reisizadeh et al. 2020 (FedPAQ, AISTATS).

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, qsgd(fam, 5)), message.bits(fam, qsgd(fam, 5, scope="whole"))
    ([392, 280], [296, 184])
    """
    _check(_whole(levels) and 1 <= levels <= 2**24, f"quantisation levels {levels}", "1..2^24", "levels")
    scopes = {"tensor": None, "layer": -1, "whole": 0}  # how much of a leaf's path names its scope
    _check(scope in scopes, f"scope {scope}", ", ".join(scopes), "scope")
    _check(scaling in ("l2", "max", "shrunk"), f"scaling {scaling}", "l2, max, shrunk", "scaling")
    _check(length in ("fixed", "joint", "elias"), f"length {length}", "fixed, joint, elias", "length")
    sizes: dict[Path, np.ndarray] = {}  # [L] entries of each scope
    for path, entries in sparse.sizes(family).items():
        sizes[path[: scopes[scope]]] = sizes.get(path[: scopes[scope]], np.array(0)) + entries
    each = {"fixed": 1 + int(levels).bit_length(), "joint": np.log2(2 * levels + 1), "elias": 0}[length]
    bits = [np.where(d > 0, np.ceil(d * each).astype(np.int64) + 32, 0) for d in sizes.values()]
    fixed = counts.digits(np.sum(bits, 0))

    def shrink(entries: np.ndarray) -> np.ndarray:
        return (1 / (1 + np.minimum(entries / levels**2, np.sqrt(entries) / levels))).astype(np.float32)

    def encode(key: Array, delta: PyTree, context: ClientContext, memory: PyTree) -> tuple[PyTree, PyTree, Array]:
        sums: dict[Path, Array] = {}
        sent, whole = {}, jnp.asarray(fixed)[windows.index_of(context.level)]
        parts = sparse.parts(family, key, delta, context.level)
        for path, part in parts.items():
            group = path[: scopes[scope]]
            if scaling == "max":
                sums[group] = jnp.maximum(sums.get(group, 0.0), jnp.abs(part.value).max())
            else:
                sums[group] = sums.get(group, 0.0) + part.total(jnp.square(part.value))
        ends: dict[Path, tuple[PyTree, PyTree]] = {}
        for path, part in parts.items():
            group, x = path[: scopes[scope]], part.value
            scale = sums[group] if scaling == "max" else jnp.sqrt(sums[group])
            level = sparse.stochastic_levels(x, scale, levels, part.uniform())
            factor = part.at(shrink(sizes[group])) if scaling == "shrunk" else 1.0
            sent[path] = scale * factor * jnp.sign(x) * (level / levels)
            if length == "elias":
                own, ends[group] = sparse.elias_bits(part, level, *ends.get(group, (0, -1)))
                whole = whole + own
        return windows.map_leaves(lambda path, value: sent[path], delta), memory, whole

    return Codec(lambda params: {}, encode, None if length == "elias" else np.sum(bits, 0))


def uniform(family: Family, bits: int) -> Codec:
    """``2^bits`` equal steps from the smallest to the largest entry of a leaf, rounded at random: unbiased.

    ``low + (high - low) xi / (2^b - 1)`` with xi the exact place rounded up with the probability of its fraction;
    ``b d + 64`` bits a leaf.

    Raises:
      ValueError: bits outside 1..16.

    Source: uniform stochastic quantisation, Suresh et al. 2017 (ICML), section 2.2.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, uniform(fam, 8))
    [784, 560]
    """
    _check(_whole(bits) and 1 <= bits <= 16, f"bits {bits}", "1..16", "bits")
    steps = 2**bits - 1

    def code(part: sparse.Part) -> Array:
        present = part.at(part.entries > 0)
        most = float(jnp.finfo(part.value.dtype).max)
        low = jnp.where(present, part.only(part.value, most).min(), 0)
        high = jnp.where(present, part.only(part.value, -most).max(), 0)
        level = sparse.stochastic_levels(part.value - low, high - low, steps, part.uniform())
        return low + (high - low) * (level / steps)

    return _leafwise(family, code, lambda d: bits * d + 64)


def signs(family: Family) -> Codec:
    """Scaled signs: ``||x||_1 / d * sign(x)`` for each leaf, with sign(0) = 1; ``d + 32`` bits a leaf. Biased.

    Source: Karimireddy et al. 2019 (ICML), EF-SIGNSGD.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, signs(fam))
    [194, 166]
    """

    def code(part: sparse.Part) -> Array:
        mean = part.total(jnp.abs(part.value)) * part.at((1 / np.maximum(part.entries, 1)).astype(np.float32))
        return jnp.where(part.value < 0, -mean, mean)

    return _leafwise(family, code, lambda d: d + 32)


def top_k(family: Family, fraction: float) -> Codec:
    """The ``k = ceil(fraction d)`` entries of largest magnitude of each leaf, of equal ones the first. Biased.

    ``k (32 + ceil(log2 d))`` bits a leaf: values and where they are.

    Raises:
      ValueError: a fraction outside (0, 1].

    Source: Stich, Cordonnier, Jaggi 2018 (NeurIPS).

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, top_k(fam, 0.1))
    [294, 178]
    """
    return _sparsifier(family, fraction, lambda part, k: sparse.keep(part, k, jnp.abs(part.value), False))


def random_k(family: Family, fraction: float, unbiased: bool = True) -> Codec:
    """``k = ceil(fraction d)`` entries of each leaf, each set of k as likely, times ``d / k`` if ``unbiased``.

    ``k (32 + ceil(log2 d))`` bits a leaf: values and where they are.

    Raises:
      ValueError: a fraction outside (0, 1].

    Source: Stich, Cordonnier, Jaggi 2018 (NeurIPS); Wangni et al. 2018 (NeurIPS) for the unbiased one.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, random_k(fam, 0.5))
    [1224, 688]
    """

    return _sparsifier(family, fraction, lambda part, k: sparse.keep_random(part, k, unbiased))


def _sparsifier(family: Family, fraction: float, keep: Callable[[sparse.Part, np.ndarray], Array]) -> Codec:
    _check(0 < fraction <= 1, f"fraction {fraction}", "0 < fraction <= 1", "fraction")

    def code(part: sparse.Part) -> Array:
        return keep(part, sparse.chosen(part.entries, fraction))

    def length(d: int) -> int:
        return int(sparse.chosen(np.array(d), fraction)) * (32 + (d - 1).bit_length())

    return _leafwise(family, code, length)


def drive(family: Family, unbiased: bool = True) -> Codec:
    """DRIVE: signs of a randomly rotated leaf, one bit an entry, turned back by the receiver, who knows the rotation.

    ``z = H D x / sqrt(m)`` with random signs D and the Hadamard matrix H of size m, the power of two >= d; the receiver
    gets ``S D H sign(z) / sqrt(m)`` with ``S = ||x||^2 / ||z||_1``. Its product with x is then ``||x||^2``; its mean is
    x for a uniformly random rotation, and for this one nearly so at large d. If not ``unbiased``, ``S = ||z||_1 / m``,
    which is nearest to x. ``m + 32`` bits a leaf.

    Source: Vargaftik et al. 2021 (NeurIPS).

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, drive(fam))
    [228, 186]
    """
    code = lambda part: sparse.rotated_signs(part, unbiased)  # noqa: E731
    return _leafwise(family, code, lambda d: sparse.power_of_two(d) + 32)


def low_rank(family: Family, rank: int) -> Codec:
    """PowerSGD: ``P = orthonormal(M Q); Q = M^T P``, sent is ``P Q^T``; the client keeps Q for its next message.

    M is a leaf as a matrix [m, n], n its last axis. Where r (m + n) >= m n, and of leaves with one axis, the leaf
    itself is sent. ``32 r (m + n)`` bits a leaf, or ``32 d``. The memory ``factor`` is Q^T [r, n] of each leaf, n that
    of the full leaf at every level. It starts with normal numbers, the same for all clients. Biased.

    Raises:
      ValueError: a rank below 1 or above that of every leaf.

    Source: Vogels, Karimireddy, Jaggi 2019 (NeurIPS), algorithm 1.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, low_rank(fam, 1))  # kernels of [3, 4] and [4, 10], at level 1 [3, 2] and [2, 10]
    [1120, 928]
    """
    full = [window.extents[0] for path, window in family.windows.items() if path[0] == "params"]
    most = max((int(min(shape[:-1].prod(), shape[-1])) for shape in full if shape.size > 1), default=1)
    _check(_whole(rank) and 1 <= rank <= most, f"rank {rank}", f"1..{most}, the highest of a leaf", "rank")
    how = {path: sparse.factors(family, path, rank) for path in sparse.sizes(family)}
    bits = np.zeros(family.levels, np.int64)
    for path, d in sparse.sizes(family).items():
        matrix = family.windows["params", *path].extents
        if (plan := how[path]) is None:
            bits += 32 * d
        else:
            bits += 32 * np.where(plan.pays, rank * (matrix[:, :-1].prod(1) + matrix[:, -1]), d)
    fixed = counts.digits(bits)

    def init(params: PyTree) -> PyTree:
        keys = {path: jax.random.fold_in(jax.random.key(0), place) for place, path in enumerate(how)}
        shapes = {path: (rank, leaf.shape[-1]) for path, leaf in windows.flat(params).items() if how[path] is not None}
        drawn = {path: jax.random.normal(keys[path], shape) for path, shape in shapes.items()}
        return {"factor": {"rows": unflatten_dict(drawn)}}

    def encode(key: Array, delta: PyTree, context: ClientContext, memory: PyTree) -> tuple[PyTree, PyTree, Array]:
        sent, kept = windows.flat(delta), windows.flat(memory["factor"]["rows"])
        for path, part in sparse.parts(family, key, delta, context.level).items():
            if (plan := how[path]) is not None:
                sent[path], kept[path] = sparse.product(part, kept[path], plan)
        whole = jnp.asarray(fixed)[windows.index_of(context.level)]
        new = {"factor": {"rows": unflatten_dict(kept)}}
        return windows.map_leaves(lambda path, value: sent[path], delta), new, whole

    return Codec(init, encode, bits)


def error_feedback(codec: Codec, ef21: bool = False) -> Codec:
    """A codec whose clients remember what their messages left out.

    ``sent = C(x + e); e = x + e - sent``: what was sent and what is kept make up all changes. With ``ef21`` the client
    and the receiver keep an estimate g of the change instead: ``g = g + C(x - g)``, and g is what the receiver uses.
    The codec must bring its input nearer to 0 in the mean, as ``make`` sees to.

    Source: Karimireddy et al. 2019 (ICML); Richtarik, Sokolov, Fatkhullin 2021 (NeurIPS) for EF21.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 3)))
    >>> codec = error_feedback(signs(fam))
    >>> list(codec.init(families.init(fam, jax.random.key(0))["params"]))
    ['error']
    """
    name = "estimate" if ef21 else "error"

    def init(params: PyTree) -> PyTree:
        return {**codec.init(params), name: {"params": jax.tree.map(jnp.zeros_like, params)}}

    def encode(key: Array, delta: PyTree, context: ClientContext, memory: PyTree) -> tuple[PyTree, PyTree, Array]:
        kept, inner = memory[name]["params"], {n: part for n, part in memory.items() if n != name}
        wanted = jax.tree.map(jnp.subtract if ef21 else jnp.add, delta, kept)
        sent, inner, bits = codec.encode(key, wanted, context, inner)
        if ef21:
            kept = sent = jax.tree.map(jnp.add, kept, sent)
        else:
            kept = jax.tree.map(jnp.subtract, wanted, sent)
        return sent, {**inner, name: {"params": kept}}, bits

    return Codec(init, encode, codec.length)


#: factories by name: ``CODECS[name](family, **args)``
CODECS: dict[str, Callable[..., Codec]] = {
    of.__name__: of for of in (none, qsgd, uniform, signs, top_k, random_k, drive, low_rank)
}
_CONTRACTION: dict[str, dict[str, PyTree]]  # arguments that make a codec a contraction, for error feedback
_CONTRACTION = {"qsgd": {"scaling": "shrunk"}, "random_k": {"unbiased": False}, "drive": {"unbiased": False}}
_remembering = error_feedback


def make(
    name: str, family: Family, error_feedback: bool | str = False, statistics: bool = False, extra: bool = False,
    **args: Any,
) -> Codec:  # fmt: skip
    """A codec by name, with its arguments.

    With error feedback, qsgd is "shrunk" and random_k and drive are not ``unbiased``, unless the arguments say
    otherwise: the error of a codec that is not a contraction grows.

    Args:
      error_feedback: True, or "ef21", see ``error_feedback``.
      statistics: whether the changes of batch statistics are coded too; else they travel as they are, 32 bits each.
      extra: likewise what a method sends besides the model, such as SCAFFOLD's variate.

    Raises:
      ValueError: an unknown name or argument, a missing one, or a value that the codec does not allow.

    Warns:
      UserWarning: a sparsifier or signs without error feedback, or of batch statistics.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> message.bits(fam, make("top_k", fam, error_feedback=True, fraction=0.1))
    [294, 178]
    >>> make("qsgd", fam, bits=3)
    Traceback (most recent call last):
    ValueError: bits of qsgd, allowed levels, scope, scaling, length (uplink.args.bits)
    """
    if name not in CODECS:
        raise ValueError(f"codec {name}, allowed {', '.join(CODECS)} (uplink.name)")
    known = list(inspect.signature(CODECS[name]).parameters.values())[1:]
    names = ", ".join(parameter.name for parameter in known) or "none"
    for key in args:
        _check(key in [parameter.name for parameter in known], f"{key} of {name}", names, key)
    for parameter in known:
        missing = parameter.default is inspect.Parameter.empty and parameter.name not in args
        _check(not missing, f"{name} without {parameter.name}", names, parameter.name)
    if error_feedback not in (False, True, "ef21"):
        raise ValueError(f"error feedback {error_feedback}, allowed false, true, ef21 (uplink.error_feedback)")
    if statistics and "batch_stats" not in family.shapes[0]:
        raise ValueError("statistics true, but the net tracks none: need false (uplink.statistics)")

    def of(what: str) -> Codec:
        mine = message.family_of(family, what)
        if not error_feedback:
            return CODECS[name](mine, **args)
        return _remembering(CODECS[name](mine, **_CONTRACTION.get(name, {}) | args), error_feedback == "ef21")

    also = ["batch_stats"] * statistics + ["extra"] * extra
    made = of("params")._replace(also={what: of(what) for what in also})
    if name in ("top_k", "random_k", "signs"):
        if not error_feedback:
            text = f"{name} without error feedback loses a part of every change (uplink.error_feedback)"
            warnings.warn(text, stacklevel=2)
        if statistics:
            warnings.warn(f"statistics through {name}: a variance may fall below 0 (uplink.statistics)", stacklevel=2)
    return made
