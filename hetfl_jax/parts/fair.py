"""Fair aggregation: q-FFL's weights, AFL's weights on the simplex, TERM's tilted weights.

The functions of (context, delta) are what ``merge.Weights`` takes; q-FFL's reads ``context.received``, the loss of the
received model on the client's data.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array, ClientContext, PyTree, Tally
from hetfl_jax.parts.merge import share_of

MOST = 60.0  #: largest power of e in a weight: e^60 = 1e26, whose products stay inside float32


def numerator_and_denominator(
    loss: Array, squared_norm: Array, q: Array | float, learning_rate: Array | float, epsilon: float = 1e-10, *,
    scale: Array | float = 1.0, fixed_step: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """What q-FFL multiplies a client's change by, and what it adds to the denominator.

    With F the client's mean loss before training, g = (w - w_k) / lr its gradient (q-FedSGD: the gradient itself) and
    ``r = ((F + epsilon) / scale)^q``:

    ``h = r (q ||g||^2 / (F + epsilon) + 1 / lr)`` and ``w <- w + sum_k (r_k / lr) (w_k - w) / sum_k h_k``.

    The number of examples does not enter. With q = 0 this is the plain mean of the w_k; a large q follows the clients
    of the largest loss.

    Args:
      loss: F, any shape.
      squared_norm: ``||g||^2`` over all parameters together, of the same shape.
      q: >= 0.
      learning_rate: lr of local training, whatever the number of its steps; ``1 / lr`` stands for the smoothness of F.
      epsilon: keeps ``F^(q - 1)`` finite.
      scale: a loss that is the same for all clients of a round; it cancels. The largest F keeps r within 0..1, so that
        a large q does not overflow.
      fixed_step: h is ``1 / lr`` alone, up to the scale (the official ``static_step_size``): a step of ``lr`` times
        the mean of ``F^q g``.

    Returns:
      (r / lr, h) of the shape of ``loss``.

    Source: Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020; fair_flearn ``qffedavg.py``.

    >>> above, below = numerator_and_denominator(jnp.array([1.0, 2.0]), jnp.array([3.0, 3.0]), 1.0, 0.5)
    >>> above.tolist(), below.tolist()
    ([2.0, 4.0], [5.0, 7.0])
    """
    loss = loss + epsilon
    r = (loss / scale) ** q
    if fixed_step:
        return r / learning_rate, jnp.broadcast_to((1 / jnp.asarray(scale, r.dtype)) ** q / learning_rate, r.shape)
    return r / learning_rate, r * (q * squared_norm / loss + 1 / learning_rate)


def squared_norm(delta: PyTree) -> Array:
    """Sum of squares over all leaves.

    >>> float(squared_norm({"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([2.0])}))
    9.0
    """
    return sum((jnp.square(leaf).sum() for leaf in jax.tree.leaves(delta)), jnp.float32(0))


def q_ffl(
    q: Array | float, learning_rate: Array | float, *, epsilon: float = 1e-10, floor: float = 1e-6,
    scale: Array | float = 1.0, fixed_step: bool = False,
) -> Callable[[ClientContext, PyTree], tuple[Array, Array]]:  # fmt: skip
    """q-FedAvg's weights of a reply: (context, delta) -> (numerator, denominator), float32 scalars.

    Where clients hold parts of a model, each entry has its own denominator, the sum over the clients that hold it; a
    client's norm is over what it holds.

    Args:
      floor: a smaller loss counts as this. Without it, a client of loss 0 and 0 < q < 1 adds about
        ``q epsilon^(q - 1) ||g||^2`` to the denominator and stops training.
      scale: what the server knows of the losses (``context.known``) stands in its place; F beyond a factor of
        ``exp(60 / q)`` from it counts as that, so that no power overflows in float32.
      q, learning_rate, epsilon, fixed_step: see ``numerator_and_denominator``.

    Raises:
      ValueError: q below 0, a learning rate or scale not above 0.

    Source: Li et al., ICLR 2020, algorithm 2.

    >>> from types import SimpleNamespace
    >>> told = SimpleNamespace(received=Tally(jnp.float32(8), (), jnp.float32(4)), known=(), share=())
    >>> above, below = q_ffl(1.0, 0.5)(told, {"params": {"w": jnp.array([0.5, 0.5])}})
    >>> round(float(above), 4), round(float(below), 4)  # F = 2, ||g||^2 = 2
    (4.0, 6.0)
    """
    for name, value, fine in (("q", q, ">= 0"), ("learning_rate", learning_rate, "> 0"), ("scale", scale, "> 0")):
        if isinstance(value, int | float) and not (value > 0 or (value == 0 and name == "q")):
            raise ValueError(f"{name} {value}, allowed {fine} (method.args.{name})")

    def weights(context: ClientContext, delta: PyTree) -> tuple[Array, Array]:
        power, rate, least = jnp.asarray(q), jnp.asarray(learning_rate), jnp.asarray(floor)
        unit = scale if isinstance(context.known, tuple) else context.known
        farthest = jnp.exp(MOST / jnp.maximum(power, 1.0))
        loss = jnp.clip(jnp.maximum(received_loss(context), least), unit / farthest, unit * farthest)
        norm = squared_norm(delta["params"]) / jnp.square(rate)
        pair = numerator_and_denominator(loss, norm, power, rate, epsilon, scale=unit, fixed_step=fixed_step)
        share = share_of(context, jnp.float32(1))
        return share * pair[0], share * pair[1]

    return weights


def received_loss(context: ClientContext) -> Array:
    """F_k: the client's mean loss of the model as it came; 0 without examples.

    Args:
      context: of a client whose slots asked for ``received``.

    >>> from types import SimpleNamespace
    >>> float(received_loss(SimpleNamespace(received=Tally(jnp.float32(6), (), jnp.float32(4)))))
    1.5
    """
    received = context.received
    assert isinstance(received, Tally), "these weights need Weights(..., asks_received=True)"
    return received.loss / jnp.maximum(received.examples, 1)


def project_to_simplex(v: Array) -> Array:
    """The nearest point of ``{x : x_k >= 0, sum_k x_k = 1}`` to a vector [K].

    ``x = max(v - tau, 0)`` with the one tau for which x sums to 1: with v sorted downwards, tau is ``(v_1 + ... + v_j -
    1) / j`` for the largest j with ``v_j > tau``.

    Source: Duchi et al., "Efficient Projections onto the l1-Ball", ICML 2008. The projection in fair_flearn has an
    error of one place in its sum.

    >>> project_to_simplex(jnp.array([0.5, 1.5, -1.0])).tolist()
    [0.0, 1.0, 0.0]
    """
    v = v - v.max()
    down = jnp.sort(v, descending=True)
    tau = (jnp.cumsum(down) - 1) / jnp.arange(1, v.size + 1)
    last = jnp.maximum((down > tau).sum(), 1) - 1
    return jnp.maximum(v - tau[last], 0)


def afl_step(weights: Array, loss: Array, rate: Array | float) -> Array:
    """[K] AFL's weights of the clients after a round: ``projection(weights + rate * loss)``.

    Clients of large loss gain weight. The model goes against ``sum_k weights_k g_k / sum_k weights_k``.

    Source: Mohri, Sivek, Suresh, "Agnostic Federated Learning", ICML 2019.

    >>> afl_step(jnp.array([0.5, 0.5]), jnp.array([1.0, 2.0]), 0.5).tolist()
    [0.25, 0.75]
    """
    return project_to_simplex(weights + rate * loss)


def tilted_weights(loss: Array, tilt: Array | float, share: Array | None = None) -> Array:
    """[K] TERM's weights of the clients: ``share_k exp(tilt F_k)``, brought to a sum of 1.

    They are the weights of the gradients in ``(1 / tilt) log sum_k share_k exp(tilt F_k)``. A tilt of 0 leaves the
    shares, a positive one favours large losses, a negative one small losses.

    Args:
      loss: [K] F.
      tilt: 1 / loss.
      share: [K] numbers >= 0; default: all alike.

    Source: Li et al., "Tilted Empirical Risk Minimization", ICLR 2021.

    >>> tilted_weights(jnp.array([1.0, 5.0]), 0.0, jnp.array([1.0, 3.0])).round(4).tolist()
    [0.25, 0.75]
    """
    return jax.nn.softmax(tilt * loss + (0 if share is None else jnp.log(share)))


def tilted(tilt: Array | float, by_examples: bool = True) -> Callable[[ClientContext, PyTree], tuple[Array, Array]]:
    """TERM's weights of a reply: ``share_k exp(tilt (F_k - R))`` with R what the server knows of the losses.

    R is the same for all clients and cancels; near the losses, it keeps the power finite (beyond 60 it is cut).

    Args:
      by_examples: the share of a client is n_k, else 1.

    >>> from types import SimpleNamespace
    >>> received, shard = Tally(jnp.float32(8), (), jnp.float32(4)), SimpleNamespace(size=jnp.int32(4))
    >>> told = SimpleNamespace(received=received, shard=shard, known=jnp.float32(2), share=())
    >>> [float(weight) for weight in tilted(3.0)(told, {})]
    [4.0, 4.0]
    """

    def weights(context: ClientContext, delta: PyTree) -> tuple[Array, Array]:
        own = context.shard.size.astype(jnp.float32) if by_examples else jnp.float32(1)
        power = jnp.clip(tilt * (received_loss(context) - context.known), -MOST, MOST)
        weight = share_of(context, own) * jnp.exp(power)
        return weight, weight

    return weights


def agnostic(context: ClientContext, delta: PyTree) -> tuple[Array, Array]:
    """AFL's weight of a reply: lambda_k, which the server keeps.

    Args:
      context: of the client; ``context.known`` is lambda_k.

    >>> from types import SimpleNamespace
    >>> [round(float(weight), 2) for weight in agnostic(SimpleNamespace(known=jnp.float32(0.25), share=()), {})]
    [0.25, 0.25]
    """
    weight = share_of(context, jnp.float32(1)) * context.known
    return weight, weight
