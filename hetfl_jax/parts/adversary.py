"""Perturbed pixels: the PGD attack, training against it, and how models stand it.

Any net of images can be attacked: the attack runs where the net's input is, prepared and augmented, and knows where
pixels 0 and 1 lie there, channel by channel. Source: Madry et al. (ICLR 2018); settings and the loss of two branches as
in Split-Mix (Hong et al., ICLR 2022).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetfl_jax.core.random import draw
from hetfl_jax.core.types import Array, Batch, ClientContext, Level, PyTree, Question, Shard
from hetfl_jax.models.windows import Family, index_of
from hetfl_jax.parts.objective import Aux, Forward, Objective, last_exit

EPSILON = 8 / 255
STEP = 10 / 255 / 7


class Attack(NamedTuple):
    """Projected gradient ascent in the largest-entry norm; lengths are of pixels in [0, 1]."""

    epsilon: float = EPSILON  #: how far a pixel may move
    step: float = STEP
    steps: int = 7
    random_start: bool = True


class Adversary(NamedTuple):
    """An attack, and what it is for."""

    attack: Attack
    weight: float  #: lambda of training: ``(1 - lambda) clean + lambda noisy``; at 0 nothing is attacked
    knobs: tuple[float, ...]  #: shares of the noise branch at which models are judged, the first one the model's own


class Pixels(NamedTuple):
    """Where pixels lie in a net's input."""

    low: Array  #: [C] of pixel 0
    high: Array  #: [C] of pixel 1


def pgd(
    *, weight: float = 0.5, epsilon: float = EPSILON, step: float = STEP, steps: int = 7, random_start: bool = True,
    knobs: Sequence[float] = (0.0,),
) -> Adversary:  # fmt: skip
    """The adversary that a config's block ``adversary`` describes.

    Args:
      weight: lambda of the training loss ``(1 - lambda) clean + lambda noisy``; 0 trains on clean images alone.
      epsilon, step: in pixels of [0, 1].
      knobs: shares of the noise branch at which models are judged; more than 0 needs ``family.norm=bn_dual``.

    Raises:
      ValueError: a value out of range.

    >>> pgd(weight=0.5).attack.steps
    7
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight {weight} of noisy examples, allowed 0..1 (adversary.args.weight)")
    if wrong := [knob for knob in knobs if not 0 <= knob <= 1]:
        raise ValueError(f"knob {wrong[0]}, the share of the noise branch: allowed 0..1 (adversary.args.knobs)")
    if not knobs or len(set(knobs)) < len(knobs):
        raise ValueError(f"knobs {tuple(knobs)}: need one or more, each once (adversary.args.knobs)")
    if not (0 < epsilon <= 1 and 0 < step <= 1 and steps >= 1):
        raise ValueError(
            f"epsilon {epsilon}, step {step}, {steps} steps: need 0 < epsilon <= 1, 0 < step <= 1 and 1 or more steps "
            "(adversary.args)"
        )
    return Adversary(Attack(epsilon, step, steps, random_start), weight, tuple(knobs))


def pixels_of(family: Family) -> Pixels:
    """Where pixels 0 and 1 lie in the input of a family's nets.

    Raises:
      ValueError: examples that are no images, or are not normalised channel by channel.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 2, 2, 3)), lambda x, key: (x - 0.5) / 0.25)
    >>> pixels_of(fam).low.tolist(), pixels_of(fam).high.tolist()
    ([-2.0, -2.0, -2.0], [2.0, 2.0, 2.0])
    """
    shape, dtype = family.example.shape, family.example.dtype
    if len(shape) != 4:
        raise ValueError(f"an attack on examples of shape {shape[1:]}: need images [H, W, C] (adversary.name)")
    most = 255 if jnp.issubdtype(dtype, jnp.integer) else 1
    with jax.ensure_compile_time_eval():
        at = lambda share: family.prepare(jnp.full(shape, share * most, dtype), None)  # noqa: E731
        low, high, between = (np.asarray(at(share), np.float64) for share in (0.0, 1.0, 0.2))
    straight = low.shape == shape and np.allclose(between, low + 0.2 * (high - low), atol=1e-5)
    if not straight or any(np.ptp(v, (0, 1, 2)).max() > 0 for v in (low, high)) or (high <= low).any():
        raise ValueError(
            "an attack on images that are not normalised by one mean and std a channel: need augment none, flip or "
            "crop_flip (data.augment)"
        )
    return Pixels(jnp.asarray(low[0, 0, 0], jnp.float32), jnp.asarray(high[0, 0, 0], jnp.float32))


def attacked(
    logits: Callable[[Array], Array], x: Array, labels: Array, valid: Array, key: Array, attack: Attack,
    pixels: Pixels, start: Array | None = None,
) -> Array:  # fmt: skip
    """Images whose summed cross-entropy is larger: ``d <- clip(d + step sign(grad))``, then pixels clipped to [0, 1].

    Args:
      logits: [B, H, W, C] prepared -> [B, classes], in evaluation mode and without gradients of parameters.
      x: [B, H, W, C] prepared; rows that are not ``valid`` [B] count for nothing.
      labels: [B] int32.
      key: draws the start, where the attack has a random one.
      attack: lengths in pixels of [0, 1], and steps.
      pixels: where pixels 0 and 1 lie in ``x``.
      start: the first perturbation, in units of ``x``; by default uniform within epsilon, or 0.

    Returns:
      [B, H, W, C] perturbed images, prepared.

    Source: Madry et al., ICLR 2018, section 2.1.

    >>> logits = lambda x: jnp.stack([x[:, 0, 0, 0], -x[:, 0, 0, 0]], -1)  # the label 0 likes a bright pixel
    >>> x, attack = jnp.full((1, 1, 1, 1), 0.5), Attack(epsilon=0.25, step=0.125, steps=3, random_start=False)
    >>> given = jnp.array([0]), jnp.array([True]), jax.random.key(0)
    >>> attacked(logits, x, *given, attack, Pixels(jnp.zeros(1), jnp.ones(1))).ravel().tolist()
    [0.25]
    """
    unit = pixels.high - pixels.low

    def inside(d: Array) -> Array:
        return jnp.clip(x + d, pixels.low, pixels.high) - x

    def loss(d: Array) -> Array:
        each = optax.softmax_cross_entropy_with_integer_labels(logits(x + d), labels)
        return jnp.where(valid, each, 0.0).sum()

    def climb(_: Array, d: Array) -> Array:
        moved = d + attack.step * unit * jnp.sign(jax.grad(loss)(d))
        return inside(jnp.clip(moved, -attack.epsilon * unit, attack.epsilon * unit))

    if start is None and attack.random_start:
        start = inside(attack.epsilon * unit * draw(jax.random.uniform, key, x.shape, x.dtype, -1.0, 1.0))
    return x + jax.lax.fori_loop(0, attack.steps, climb, jnp.zeros_like(x) if start is None else start)


def adversarial(inner: Objective, adversary: Adversary, family: Family) -> Objective:
    """``(1 - lambda) inner(x) + lambda inner(x + d)``, with the attack d on the net in evaluation mode.

    In a net of two branches clean images go through the clean one; attack and perturbed images through the noise one.
    Statistics are those after both passes, the clean one first. A step of the attack is counted as two forward passes:
    its backward pass makes no gradient of weights.

    Args:
      inner: the loss of a batch, of classes.
      adversary: the attack and lambda; at 0 the result is ``inner`` itself.
      family: of images, whose nets are attacked.

    Returns:
      An objective that counts the attack's passes as work of the client's level.

    Raises:
      ValueError: as ``pixels_of``.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.objective import cross_entropy
    >>> fam, inner = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 2, 2, 3))), cross_entropy()
    >>> noisy, clean = (adversarial(inner, pgd(weight=weight), fam) for weight in (0.5, 0.0))
    >>> noisy.work_levels, noisy.loss is inner.loss, clean is inner
    (1, False, True)
    """
    weight, attack, pixels = adversary.weight, adversary.attack, pixels_of(family)
    _check(inner, adversary, family)
    if not weight:
        return inner

    def counted(context: ClientContext, *passes: Aux) -> Array:
        here = jax.nn.one_hot(index_of(context.level), family.levels, dtype=jnp.int32)
        each = [jnp.stack([here * one.examples] * 2) if one.work is None else one.work for one in passes]
        return sum(each[1:], each[0]).at[0].add(here * 2 * attack.steps * passes[0].examples)

    def loss(forward: Forward, batch: Batch, context: ClientContext) -> tuple[Array, Aux]:
        start, key = jax.random.split(jax.random.fold_in(context.key, 1))
        noisy = forward._replace(options={**forward.options, "noise": 1.0})
        still = noisy._replace(variables=jax.lax.stop_gradient(forward.variables))

        def logits(x: Array) -> Array:
            exits, active, _ = still(x, train=False)
            return last_exit(exits, active)

        x = jax.lax.stop_gradient(attacked(logits, batch.x, batch.labels, batch.valid, start, attack, pixels))
        if weight == 1:
            value, only = inner.loss(noisy, batch._replace(x=x), context)
            return value, only._replace(work=counted(context, only))
        clean, first = inner.loss(forward._replace(options={**forward.options, "noise": 0.0}), batch, context)
        if jax.tree.leaves(first.stats):
            noisy = noisy._replace(variables={**noisy.variables, "batch_stats": first.stats})
        value, second = inner.loss(noisy, batch._replace(x=x), context._replace(key=key))
        both = first._replace(stats=second.stats, work=counted(context, first, second))
        return (1 - weight) * clean + weight * value, both

    return inner._replace(loss=loss, work_levels=family.levels)


def _check(inner: Objective, adversary: Adversary, family: Family) -> None:
    if inner.numbers:
        raise ValueError("an attack on labels that are numbers: need classes (objective.name)")
    norm = getattr(family.nets[0].module, "norm", "none")
    if any(adversary.knobs) and not norm.startswith("bn_dual"):
        raise ValueError(
            f"knobs {adversary.knobs} with norm {norm!r}, which has one branch: need bn_dual, or (0,) "
            "(adversary.args.knobs)"
        )
    if norm == "bn_dual_shared" and (between := [knob for knob in adversary.knobs if 0 < knob < 1]):
        raise ValueError(f"knob {between[0]} with norm {norm!r}, allowed 0 and 1 (adversary.args.knobs)")


#: (variables, tier, x prepared, shard or None, valid, share of the noise branch) -> exits [E, B, C]
Outputs = Callable[[PyTree, Level, Array, Shard | None, Array, Array | float], Array]


def judged(
    adversary: Adversary | None, family: Family, outputs: Outputs, asked: Sequence[Question]
) -> tuple[Question, ...]:
    """The questions of a method, the first one at every knob, and ``robust``: the same on images that are attacked.

    The attack is on the very model that is judged, an ensemble or one between its branches. Without an adversary the
    questions stay as they are.

    Args:
      adversary: the attack and the knobs, or ``None``.
      family: of images.
      outputs: of the model, told the share of the noise branch.
      asked: the method's questions, the score first.

    Raises:
      ValueError: as ``pixels_of``.

    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,)), [{}], jnp.zeros((1, 2, 2, 3)))
    >>> asked = judged(pgd(knobs=(0.0, 0.5)), fam, None, [Question("", None, None)])
    >>> [question.name for question in asked], asked[1].further
    (['', 'robust'], ('lambda0.5',))
    """
    if adversary is None:
        return tuple(asked)
    first, knobs, pixels = asked[0], adversary.knobs, pixels_of(family)
    names = ["", *(f"lambda{knob:g}" for knob in knobs[1:])]

    def at_knobs(of: Callable[[Array | float], Array]) -> dict[str, Array]:
        if len(knobs) == 1:
            return {"": of(knobs[0])}
        return dict(zip(names, jax.lax.map(of, jnp.asarray(knobs))))

    def clean(variables: PyTree, tier: Level, batch: Batch, shard: Shard | None) -> dict[str, Array]:
        x = family.prepare(batch.x, None)
        return at_knobs(lambda knob: outputs(variables, tier, x, shard, batch.valid, knob)[-1])

    def robust(variables: PyTree, tier: Level, batch: Batch, shard: Shard | None) -> dict[str, Array]:
        x, key = family.prepare(batch.x, None), jax.random.key(0)

        def of(knob: Array | float) -> Array:
            logits = lambda x: outputs(variables, tier, x, shard, batch.valid, knob)[-1]  # noqa: E731
            return logits(attacked(logits, x, batch.labels, batch.valid, key, adversary.attack, pixels))

        return at_knobs(of)

    own = first if knobs == (0.0,) else first._replace(read=clean)
    attack = Question("robust", first.variables, robust, first.memory, first.own, tuple(names[1:]))
    return (own, *asked[1:], attack)
