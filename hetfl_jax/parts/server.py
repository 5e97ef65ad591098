"""What the server does with the mean change."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetfl_jax.core import tree
from hetfl_jax.core.types import Array, Plan, PyTree, Seen
from hetfl_jax.models import windows
from hetfl_jax.models.windows import Family


class Server(NamedTuple):
    """A server rule with its own state."""

    init: Callable[[PyTree], PyTree]  #: variables -> slot
    #: (slot, variables, mean delta, coverage, any ok, extra) -> (slot, variables); ``extra`` is the drift's sum
    update: Callable[..., tuple[PyTree, PyTree]]
    #: slot -> what clients receive besides the model, ``{}`` or ``{"params": tree}``
    context: Callable[[PyTree], PyTree] = lambda slot: {}
    #: further models that evaluation looks at, by name: (slot, variables) -> the collections that differ
    models: Mapping[str, Callable[[PyTree, PyTree], PyTree]] = MappingProxyType({})
    #: (slot, variables) -> numbers to watch, by name
    info: Callable[[PyTree, PyTree], dict[str, Array]] = lambda slot, variables: {}
    #: (slot, ids) -> what replies of these clients are weighed with, leaves [K, ...]: see ``Plan.known``
    known: Callable[[PyTree, Array], PyTree] = lambda slot, ids: ()
    #: (slot after ``update``, plan, what every item did, ok) -> slot
    learn: Callable[[PyTree, Plan, Seen, Array], PyTree] = lambda slot, plan, seen, ok: slot
    clients: int = 0  #: of the whole population, where the rule divides by them


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate, momentum=0.9, **kw: optax.sgd(learning_rate, momentum, **kw),
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "yogi": optax.yogi,
}


#: plain averaging, as arguments of ``optimizer``
PLAIN = MappingProxyType({"name": "sgd", "learning_rate": 1.0})


def optimizer(name: str = "sgd", learning_rate: float = 1.0, **settings: Any) -> Server:
    """An optax optimizer on the pseudo-gradient ``-mean delta`` (FedOpt: FedAdam, FedYogi, FedAvgM ...).

    Entries without coverage keep their value and their moments bit for bit; statistics see no optimizer, they become
    the mean. ``sgd`` with learning rate 1 is plain averaging.

    Args:
      name: one of ``OPTIMIZERS``.
      learning_rate: of the server, > 0; 1 with ``sgd`` is the mean itself.
      settings: further arguments of the optax optimizer, e.g. ``b1=0.9`` of adam.

    Raises:
      ValueError: an unknown name, or a learning rate <= 0.

    Source: Reddi et al., ICLR 2021 (FedOpt).

    >>> variables = {"params": {"w": jnp.array([1.0, 1.0])}}
    >>> mean, held = {"params": {"w": jnp.array([0.5, 9.0])}}, {"params": {"w": jnp.array([3.0, 0.0])}}
    >>> rule = optimizer("sgd", 0.5)
    >>> rule.update(rule.init(variables), variables, mean, held, jnp.array(True))[1]["params"]["w"].tolist()
    [1.25, 1.0]
    """
    where = "method.args.server_optimizer"
    if name not in OPTIMIZERS:
        raise ValueError(f"server optimizer {name!r} is not one of {', '.join(OPTIMIZERS)} ({where})")
    if not (isinstance(learning_rate, Real) and 0 < learning_rate < float("inf")):
        raise ValueError(f"server learning rate {learning_rate!r}, allowed > 0 ({where})")
    try:
        transform, some = OPTIMIZERS[name](learning_rate, **settings), {"params": jnp.zeros(1)}
        jax.eval_shape(lambda v: transform.update(v, transform.init(v), v), some)
    except (TypeError, ValueError) as error:
        raise ValueError(f"server optimizer {name!r}: {' '.join(str(error).split())} ({where})") from None
    return from_optax(transform)


def from_optax(transform: optax.GradientTransformation) -> Server:
    """Any optax transformation as a server rule; see ``optimizer``.

    Args:
      transform: it sees ``-mean delta`` as a gradient, and the parameters.

    >>> rule = from_optax(optax.sgd(1.0))
    >>> variables, mean = {"params": {"w": jnp.array([1.0])}}, {"params": {"w": jnp.array([0.5])}}
    >>> held = {"params": {"w": jnp.ones(1)}}
    >>> rule.update(rule.init(variables), variables, mean, held, jnp.array(True))[1]["params"]["w"].tolist()
    [1.5]
    """

    def update(
        slot: PyTree, variables: PyTree, mean: PyTree, coverage: PyTree, any_ok: Array, extra: PyTree = ()
    ) -> tuple[PyTree, PyTree]:
        params, covered = variables["params"], coverage["params"]
        gradient = jax.tree.map(jnp.negative, mean["params"])
        step, new_slot = transform.update(gradient, slot, params)
        moved = {name: jax.tree.map(jnp.add, variables[name], mean[name]) for name in variables}
        moved["params"] = optax.apply_updates(params, step)
        # Coverage in the shape of the optimizer's state: where a moment belongs to an entry that nobody held, keep it.
        held = optax.tree.map_params(transform, lambda _, c: c, slot, covered, transform_non_params=jnp.ones_like)
        moments = _covered(new_slot, slot, held)
        # A round in which every client failed counts for nothing, not even for Adam's step count.
        return tree.select(any_ok, moments, slot), _covered(moved, variables, coverage)

    return Server(lambda variables: transform.init(variables["params"]), update)


def _covered(new: PyTree, old: PyTree, coverage: PyTree) -> PyTree:
    """``new`` where somebody held the entry."""
    return jax.tree.map(lambda n, o, c: jnp.where(c > 0, n, o), new, old, coverage)


DENOMINATORS = ("all", "owners")


def feddyn(
    family: Family, clients_per_level: Sequence[int], denominator: str = "all", max_correction: float = 0.0
) -> Server:
    """FedDyn's server: the mean of what took part, plus m, the mean over ALL clients of their sums s_k.

    ``m += (coverage / N) * mean delta`` and ``w <- w + mean delta + m``, entry by entry where somebody held it; m is
    ``-h / alpha`` of the paper. Wants a plain mean over clients. Statistics become the mean, without m.

    Args:
      family: of the model.
      clients_per_level: [L] how many clients there are of each level.
      denominator: N is the number of ``all`` clients, or of the ``owners`` of an entry (corrects rare ones sooner).
      max_correction: if > 0, m stays as it is in a round that would bring ``||m|| / ||w||`` above this.

    The model before the correction is evaluated too, as ``sel``. A round whose result is not finite changes nothing.

    Raises:
      ValueError: an unknown denominator.

    Source: Acar et al., ICLR 2021, algorithm 1.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(), classes=1), [{}], jnp.zeros((1, 1)))
    >>> ones = jax.tree.map(lambda s: jnp.ones(s.shape), fam.shapes[0])
    >>> rule = feddyn(fam, (10,))
    >>> slot, after = rule.update(rule.init(ones), ones, ones, jax.tree.map(lambda v: 5 * v, ones), jnp.array(True))
    >>> float(slot["head"]["bias"][0]), float(after["params"]["head"]["bias"][0])  # m = 5/10, w = 1 + 1 + m
    (0.5, 2.5)
    """
    if denominator not in DENOMINATORS:
        raise ValueError(
            f"denominator {denominator!r} is not one of {', '.join(DENOMINATORS)} (method.args.feddyn_denominator)"
        )
    if len(clients_per_level) != family.levels or not sum(clients_per_level) > 0:
        raise ValueError(
            f"clients_per_level {tuple(clients_per_level)}: need {family.levels} numbers, not all 0 "
            "(method.args.clients_per_level)"
        )
    per_level = jnp.asarray(np.asarray(clients_per_level, np.float32))

    def of_all(path: tuple[str, ...], value: Array) -> Array:
        if denominator == "all":
            return per_level.sum()
        return jnp.maximum(windows.spread(family, ("params", *path), per_level), 1)

    def update(
        slot: PyTree, variables: PyTree, mean: PyTree, coverage: PyTree, any_ok: Array, extra: PyTree = ()
    ) -> tuple[PyTree, PyTree]:
        everyone = windows.map_leaves(of_all, slot)
        change, cover = mean["params"], coverage["params"]
        moved = jax.tree.map(lambda m, d, c, n: m + c / n * d, slot, change, cover, everyone)
        if max_correction:
            within = optax.tree.norm(moved) <= max_correction * optax.tree.norm(variables["params"])
            moved = tree.select(within, moved, slot)
        after = {name: jax.tree.map(jnp.add, variables[name], mean[name]) for name in variables}
        after["params"] = jax.tree.map(jnp.add, after["params"], moved)
        after = _covered(after, variables, coverage)
        fine = any_ok & tree.finite((after, moved))
        return tree.select(fine, moved, slot), tree.select(fine, after, variables)

    def participants(slot: PyTree, variables: PyTree) -> PyTree:
        return {"params": jax.tree.map(jnp.subtract, variables["params"], slot)}

    def info(slot: PyTree, variables: PyTree) -> dict[str, Array]:
        size = optax.tree.norm(variables["params"])
        return {"correction": optax.tree.norm(slot) / jnp.where(size > 0, size, 1)}

    return Server(_zeros, update, models={"sel": participants}, info=info, clients=int(sum(clients_per_level)))


def scaffold(clients: int, learning_rate: float = 1.0) -> Server:
    """SCAFFOLD's server: ``w <- w + learning_rate * mean delta``, ``c <- c + sum of variate changes / clients``.

    Wants a plain mean over clients.

    Args:
      clients: N, in the population.
      learning_rate: of the step along the mean, > 0.

    Raises:
      ValueError: a learning rate <= 0.

    Source: Karimireddy et al., ICML 2020, algorithm 1.

    >>> variables = {"params": {"w": jnp.array([1.0, 1.0])}}
    >>> mean, held = {"params": {"w": jnp.array([0.5, 9.0])}}, {"params": {"w": jnp.array([3.0, 0.0])}}
    >>> rule, sent = scaffold(10), {"params": {"w": jnp.array([5.0, 0.0])}}
    >>> slot, after = rule.update(rule.init(variables), variables, mean, held, jnp.array(True), sent)
    >>> slot["w"].tolist(), after["params"]["w"].tolist()
    ([0.5, 0.0], [1.5, 1.0])
    """
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"server learning rate {learning_rate}, allowed > 0 (method.args.server_learning_rate)")
    averaging = optimizer("sgd", learning_rate)

    def update(
        slot: PyTree, variables: PyTree, mean: PyTree, coverage: PyTree, any_ok: Array, extra: PyTree = ()
    ) -> tuple[PyTree, PyTree]:
        _, after = averaging.update(averaging.init(variables), variables, mean, coverage, any_ok, extra)
        return jax.tree.map(lambda c, d: c + d / clients, slot, extra["params"]), after

    return Server(_zeros, update, context=lambda slot: {"params": slot}, clients=clients)


def _zeros(variables: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, variables["params"])
