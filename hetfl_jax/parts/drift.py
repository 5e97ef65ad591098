"""Client-side terms against drift, with the private memory that some of them keep."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array, ClientContext, PyTree


class Drift(NamedTuple):
    """A correction of local training. All trees of a context are at the client's level.

    ``context.sent.variables`` is the model as it came, ``context.sent.context`` what the server sent besides it,
    ``context.memory`` the client's own.
    """

    #: full parameters -> one client's memory, ``{name: {"params": tree}}``; scalars and vectors are kept whole
    init: Callable[[PyTree], PyTree]
    #: (gradient, params, context) -> gradient, before clipping
    gradient: Callable[[PyTree, PyTree, ClientContext], PyTree]
    #: (params after, context, steps) -> (memory, what is summed over clients besides the model: {} or {"params": tree})
    update: Callable[[PyTree, ClientContext, Array], tuple[PyTree, PyTree]]
    #: context -> what is added to the weight decay, after clipping
    decay: Callable[[ClientContext], Array | float] = lambda context: 0.0
    frozen: tuple[str, ...] = ()  #: names of layers that come back as they came
    #: further models that evaluation looks at, by name: (memory of all clients, leaves [N, ...]) -> collections
    models: Mapping[str, Callable[[PyTree], PyTree]] = MappingProxyType({})
    asks_received: bool = False  #: whether it reads ``context.received``


def received(context: ClientContext) -> PyTree:
    """The parameters as they came: ``w_received``, a tree at the client's level.

    Args:
      context: of a client; ``context.sent.variables`` is what the server sent.

    >>> from hetfl_jax.core.types import ClientContext
    >>> from hetfl_jax.parts.compose import Sent
    >>> sent = Sent({"params": {"w": jnp.array([1.0, 2.0])}})
    >>> received(ClientContext(None, 0, 0, (), (), sent, {}))["w"].tolist()
    [1.0, 2.0]
    """
    return context.sent.variables["params"]


def none() -> Drift:
    """No correction: gradients as they are, no memory, nothing sent besides the model.

    >>> none().gradient({"w": 3.0}, {"w": 1.0}, None), none().init({"w": 1.0})
    ({'w': 3.0}, {})
    """
    return Drift(
        lambda params: {},
        lambda gradient, params, context: gradient,
        lambda after, context, steps: (context.memory, {}),
    )


def frozen(layers: Sequence[str]) -> Drift:
    """Layers that are not trained: they come back bit for bit, whatever the weight decay.

    Args:
      layers: names of top-level layers, as in ``family.shapes[0]["params"]``.

    >>> frozen(["conv_0"]).frozen
    ('conv_0',)
    """
    return none()._replace(frozen=tuple(layers))


def proximal(weight: float) -> Drift:
    """FedProx: the gradient of ``weight / 2 * ||params - received||^2``, inside the clipping.

    Args:
      weight: mu, >= 0, in units of 1 / learning rate; 0 changes nothing.

    Raises:
      ValueError: a negative weight.

    Source: Li et al., MLSys 2020 (arXiv 1812.06127), equation 2.

    >>> from hetfl_jax.core.types import ClientContext
    >>> from hetfl_jax.parts.compose import Sent
    >>> came = {"w": jnp.array([1.0, 2.0])}
    >>> told = ClientContext(None, 0, 0, (), (), Sent({"params": came}), {})
    >>> proximal(0.5).gradient({"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 2.0])}, told)["w"].tolist()
    [1.0, 0.0]
    """
    if not 0 <= weight < float("inf"):
        raise ValueError(f"proximal weight {weight}, allowed >= 0 and finite (method.args.proximal_weight)")

    def gradient(gradient: PyTree, params: PyTree, context: ClientContext) -> PyTree:
        return jax.tree.map(lambda g, p, p0: g + weight * (p - p0), gradient, params, received(context))

    return none()._replace(gradient=gradient)


def summed(l2: float = 0.0) -> Drift:
    """The gradient of a sum over the client's examples in place of a mean's: ``n_k gradient + l2 params``.

    Args:
      l2: of every client, >= 0.

    >>> from types import SimpleNamespace
    >>> told = SimpleNamespace(shard=SimpleNamespace(size=4))
    >>> summed(0.5).gradient({"w": jnp.array(2.0)}, {"w": jnp.array(1.0)}, told)["w"].item()
    8.5
    """

    def gradient(gradient: PyTree, params: PyTree, context: ClientContext) -> PyTree:
        return jax.tree.map(lambda g, p: context.shard.size * g + l2 * p, gradient, params)

    return none()._replace(gradient=gradient)


def feddyn(alpha: float, mean_examples: float = 0.0) -> Drift:
    """FedDyn (Acar et al., ICLR 2021): the client's running sum of its changes, s_k, pulls it.

    ``min_w  F_k(w) + alpha_k <s_k, w> + alpha_k / 2 ||w - received||^2``, then ``s_k += w - received``. s_k is in
    parameter units, as in the official code; the paper's dual is ``-alpha_k s_k``. The linear part
    ``alpha_k (s_k - received)`` is clipped with the gradient, the quadratic one is weight decay, after clipping.

    Args:
      alpha: of a client of mean size.
      mean_examples: if > 0, ``alpha_k = alpha * mean_examples / n_k``, else all have ``alpha``.

    Raises:
      ValueError: alpha <= 0.

    >>> from hetfl_jax.core.types import ClientContext
    >>> from hetfl_jax.parts.compose import Sent
    >>> came = {"w": jnp.array([1.0, 2.0])}
    >>> memory = {"sum": {"params": {"w": jnp.array([0.0, 4.0])}}}
    >>> told = ClientContext(None, 0, 0, (), (), Sent({"params": came}), memory)
    >>> feddyn(0.5).gradient({"w": jnp.zeros(2)}, came, told)["w"].tolist()
    [-0.5, 1.0]
    >>> after, sent = feddyn(0.5).update({"w": jnp.array([2.0, 2.0])}, told, 10)
    >>> after["sum"]["params"]["w"].tolist(), sent
    ([1.0, 4.0], {})
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"FedDyn alpha {alpha}, allowed > 0; without FedDyn use fedavg (method.args.feddyn_alpha)")
    if not 0 <= mean_examples < float("inf"):
        raise ValueError(f"mean_examples {mean_examples}, allowed >= 0 and finite (method.args.mean_examples)")

    def strength(context: ClientContext) -> Array | float:
        return alpha * mean_examples / context.shard.size if mean_examples else alpha

    def gradient(gradient: PyTree, params: PyTree, context: ClientContext) -> PyTree:
        sums, weight = context.memory["sum"]["params"], strength(context)
        return jax.tree.map(lambda g, s, p0: g + weight * (s - p0), gradient, sums, received(context))

    def update(after: PyTree, context: ClientContext, steps: Array) -> tuple[PyTree, PyTree]:
        sums = jax.tree.map(lambda s, p, p0: s + (p - p0), context.memory["sum"]["params"], after, received(context))
        return {**context.memory, "sum": {"params": sums}}, {}

    return Drift(_zeros("sum"), gradient, update, strength)


def scaffold(rate: Callable[[Array], Array | float], mean_examples: float = 0.0) -> Drift:
    """SCAFFOLD (Karimireddy et al., ICML 2020, option II): control variates c_k of clients against c of the server.

    The gradient gets ``c / v_k - c_k``, inside the clipping; then ``c_k' = c_k - c + (received - w) / (steps rate)``,
    and the server receives ``v_k (c_k' - c_k)``, where ``v_k = n_k / mean_examples`` (1 without it), as in the code of
    FedDyn's authors.

    Args:
      rate: (round) -> the learning rate that local steps of this round had.

    >>> from hetfl_jax.core.types import ClientContext
    >>> from hetfl_jax.parts.compose import Sent
    >>> came = {"w": jnp.array([1.0, 2.0])}
    >>> common, own = ({"params": {"w": jnp.array(v)}} for v in ([1.0, 1.0], [0.0, 3.0]))
    >>> told = ClientContext(None, 0, 0, (), (), Sent({"params": came}, common), {"variate": own})
    >>> rule = scaffold(lambda round: 0.1)
    >>> rule.gradient({"w": jnp.zeros(2)}, came, told)["w"].tolist()
    [1.0, -2.0]
    >>> [v["params"]["w"].tolist() for v in (rule.update(came, told, 10)[0]["variate"], rule.update(came, told, 10)[1])]
    [[-1.0, 2.0], [-1.0, -1.0]]
    """

    def weight(context: ClientContext) -> Array | float:
        return context.shard.size / mean_examples if mean_examples else 1.0

    def gradient(gradient: PyTree, params: PyTree, context: ClientContext) -> PyTree:
        own, common, v = context.memory["variate"]["params"], context.sent.context["params"], weight(context)
        return jax.tree.map(lambda g, ck, c: g + c / v - ck, gradient, own, common)

    def update(after: PyTree, context: ClientContext, steps: Array) -> tuple[PyTree, PyTree]:
        per_step, v = 1 / (jnp.maximum(steps, 1) * rate(context.round)), weight(context)
        moved = jax.tree.map(
            lambda c, p, p0: (p0 - p) * per_step - c, context.sent.context["params"], after, received(context)
        )
        new = jax.tree.map(jnp.add, context.memory["variate"]["params"], moved)
        sent = {"params": jax.tree.map(lambda d: v * d, moved)}
        return {**context.memory, "variate": {"params": new}}, sent

    return Drift(_zeros("variate"), gradient, update)


def remembering(drift: Drift) -> Drift:
    """``drift`` whose clients also keep the last model they trained (``last``): what FedDyn calls the model "all".

    Args:
      drift: any; its own memory stays beside it.

    Returns:
      A ``Drift`` with ``models["all"]``, the mean of every client's last model.

    >>> list(remembering(none()).init({"w": jnp.zeros(2)})), list(remembering(none()).models)
    (['last'], ['all'])
    """

    def init(params: PyTree) -> PyTree:
        return {**drift.init(params), "last": {"params": params}}

    def update(after: PyTree, context: ClientContext, steps: Array) -> tuple[PyTree, PyTree]:
        memory, sent = drift.update(after, context, steps)
        return {**memory, "last": {"params": after}}, sent

    mean_of_last = lambda memory: jax.tree.map(lambda rows: rows.mean(0), memory["last"])  # noqa: E731
    return drift._replace(init=init, update=update, models={**drift.models, "all": mean_of_last})


def _zeros(name: str) -> Callable[[PyTree], PyTree]:
    return lambda params: {name: {"params": jax.tree.map(jnp.zeros_like, params)}}
