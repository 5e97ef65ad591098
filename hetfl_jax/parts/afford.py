"""Capacity from budgets: the largest level whose training memory, time and traffic a client can afford."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core import tree
from hetfl_jax.core.jaxprs import computed_bytes
from hetfl_jax.core.types import Price, PyTree
from hetfl_jax.models.costs import BACKWARD, Costs
from hetfl_jax.models.windows import Family
from hetfl_jax.parts.local import Local, examples_trained

MEGA = 1e6


class Memory(NamedTuple):
    """Bytes that local training holds at each level, [L] int64."""

    parameters: np.ndarray  #: all variables, as they were received
    gradients: np.ndarray
    optimizer: np.ndarray  #: its state
    activations: np.ndarray  #: all that a forward pass of one batch computes

    @property
    def all(self) -> np.ndarray:
        """[L] their sum."""
        return np.sum(self, axis=0)


class Budget(NamedTuple):
    """What a client may spend; infinity for no limit."""

    seconds: float = math.inf  #: for a round's local work, in expectation
    megabytes: float = math.inf  #: 10^6 bytes that travel in a round, both ways
    memory_mb: float = math.inf  #: besides the device's own


class Afforded(NamedTuple):
    """What clients can afford.

    Level l fits client k if ``seconds[k, l] <= max_seconds``, ``megabytes[l] <= max_mb``, and ``memory_mb[l]`` is at
    most ``max_memory_mb`` and the memory of its device.
    """

    level: np.ndarray  #: [N] int32 the largest level; of those that can afford none, the smallest
    able: np.ndarray  #: [N] bool, who can afford one
    unaffordable: np.ndarray  #: [L] bool, levels that nobody can afford
    memory_mb: np.ndarray  #: [L]
    megabytes: np.ndarray  #: [L]
    seconds: np.ndarray  #: [N, L]


def training_memory(family: Family, local: Local) -> Memory:
    """Bytes of training at every level: counted from shapes and from the program of a forward pass, nothing runs.

    Activations are all intermediate results of a forward pass over a batch, which a backward pass may need: an upper
    bound, since a compiler fuses some of them away.

    Args:
      family: the net at its levels.
      local: how clients train: batch size and optimiser.

    >>> from hetfl_jax.models import MLP, families
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> found = training_memory(fam, local(learning_rate=0.1, batch_size=8, momentum=0.9))
    >>> found.parameters.tolist(), found.gradients.tolist(), found.optimizer.tolist()
    ([264, 152], [264, 152], [264, 152])
    """
    rule = local.optimizer(jnp.float32(0.1), 0.0)

    def batch(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((local.batch_size, *leaf.shape[1:]), leaf.dtype)

    ready = jax.eval_shape(lambda v: family.prepare(v, None), jax.tree.map(batch, family.example))

    def of(level: int) -> tuple[int, int, int, int]:
        shapes: PyTree = family.shapes[level]
        slot = jax.eval_shape(rule.init, shapes["params"])
        held = computed_bytes(family.nets[level].counted, shapes, ready) + tree.nbytes(ready)
        return tree.nbytes(shapes), tree.nbytes(shapes["params"]), tree.nbytes(slot), held

    rows = np.asarray([of(level) for level in range(family.levels)], np.int64)
    return Memory(*rows.T)


def round_seconds(
    costs: Costs, price: Price, local: Local, size: np.ndarray, speed: np.ndarray, down: np.ndarray, up: np.ndarray
) -> np.ndarray:
    """[N, L] float64 seconds that a round should take each client at each level.

    ``(examples forward + 2 backward) * MACs / speed + bits down / down + bits up / up``, for each of its items.

    Args:
      costs, price: of the levels.
      size: [N] examples.
      speed, down, up: [N] multiply-adds, bits received and bits sent a second.

    >>> from types import SimpleNamespace
    >>> from hetfl_jax.parts.local import local
    >>> price, two = Price(np.array([50, 20]), np.array([50, 20])), np.array([10.0, np.inf])
    >>> known, training = SimpleNamespace(macs=np.array([100, 40])), local(learning_rate=0.1, batch_size=4)
    >>> round_seconds(known, price, training, np.array([5, 5]), np.array([1000.0, 100.0]), two, two).tolist()
    [[11.5, 4.6], [15.0, 6.0]]
    """
    trained = np.asarray(examples_trained(local, jnp.asarray(size, jnp.int32)), float)
    examples = (1 + BACKWARD) * trained + price.compared * np.asarray(size, float)
    work = (examples / speed)[:, None] * costs.macs
    return price.items * (work + np.asarray(price.down) / down[:, None] + np.asarray(price.up) / up[:, None])


def afforded(
    budget: Budget, costs: Costs, price: Price, memory: Memory, seconds: np.ndarray, memory_mb: np.ndarray
) -> Afforded:
    """The largest level of every client that fits the budget and the memory of its device.

    Levels are ordered by multiply-adds, then by parameters.

    Args:
      budget: of everybody.
      costs, price, memory: of the levels.
      seconds: [N, L], see ``round_seconds``.
      memory_mb: [N] of the devices.

    Returns:
      Levels and who can afford one, with the numbers that they were compared by.

    Raises:
      ValueError: a budget <= 0, or one that no client meets at any level.

    >>> from types import SimpleNamespace
    >>> known = SimpleNamespace(macs=np.array([100, 40]), parameters=np.array([9, 4]))
    >>> price, memory = Price(np.array([50, 20]), np.array([50, 20])), Memory(*[np.array([2e6, 1e6])] * 4)
    >>> seconds = np.array([[8.0, 4.0], [12.0, 6.0]])
    >>> found = afforded(Budget(seconds=5.0), known, price, memory, seconds, np.array([9.0, 9.0]))
    >>> found.level.tolist(), found.able.tolist(), found.unaffordable.tolist()
    ([1, 1], [True, False], [True, False])
    """
    for name, value in (("seconds", budget.seconds), ("mb", budget.megabytes), ("memory_mb", budget.memory_mb)):
        if not value > 0:
            raise ValueError(f"max_{name} {value:g}, allowed > 0 (capacity.max_{name})")
    needs = memory.all / MEGA
    travels = price.items * (np.asarray(price.down) + np.asarray(price.up)) / (8 * MEGA)
    fits = (seconds <= budget.seconds) & (travels <= budget.megabytes)
    fits &= needs <= np.minimum(memory_mb, budget.memory_mb)[:, None]
    order = np.lexsort((costs.parameters, costs.macs))[::-1]
    able = fits.any(1)
    if not able.any():
        small = order[-1]
        raise ValueError(
            f"no client can afford any level: the smallest takes {needs[small]:.4g} MB of memory (the largest device "
            f"has {memory_mb.max():.4g}), {travels[small]:.4g} MB of traffic and {seconds[:, small].min():.4g} s or "
            "more (capacity.max_memory_mb, max_mb, max_seconds)"
        )
    level = np.where(able, order[fits[:, order].argmax(1)], order[-1])
    return Afforded(level.astype(np.int32), able, ~fits.any(0), needs, travels, seconds)


def sentences(found: Afforded, budget: Budget, names: Sequence[str]) -> list[str]:
    """The rule, its numbers, and who and what is left out, for people.

    Args:
      found: what clients can afford.
      budget: by which.
      names: of the levels.

    >>> found = Afforded(np.array([1, 1]), np.array([True, False]), np.array([True, False]), np.array([9.0, 3.0]),
    ...                  np.array([2.0, 1.0]), np.array([[8.0, 4.0], [12.0, 6.0]]))
    >>> for sentence in sentences(found, Budget(seconds=5.0), ("a", "b")):
    ...     print(sentence)
    the largest level within 5 s and the device's memory
    level a: 9 MB of memory, 2 MB of traffic, 8 to 12 s (median 10); 0 clients
    level b: 3 MB of memory, 1 MB of traffic, 4 to 6 s (median 5); 1 clients
    no client can afford level a: what no other level has is never trained
    1 clients can afford no level and never take part: 1
    """
    limits = {"s": budget.seconds, "MB of traffic": budget.megabytes, "MB of memory": budget.memory_mb}
    told = ", ".join(f"{value:g} {unit}" for unit, value in limits.items() if value < math.inf)
    out = [f"the largest level within {told + ' and ' if told else ''}the device's memory"]
    held = np.bincount(found.level[found.able], minlength=len(names))
    for i, name in enumerate(names):
        low, middle, high = np.quantile(found.seconds[:, i], (0, 0.5, 1))
        out.append(
            f"level {name}: {found.memory_mb[i]:.4g} MB of memory, {found.megabytes[i]:.4g} MB of traffic, "
            f"{low:.4g} to {high:.4g} s (median {middle:.4g}); {held[i]} clients"
        )
    if nobody := [name for name, out_of_reach in zip(names, found.unaffordable) if out_of_reach]:
        out.append(f"no client can afford level {', '.join(nobody)}: what no other level has is never trained")
    if not found.able.all():
        who = np.flatnonzero(~found.able)
        more = ", ..." if who.size > 10 else ""
        some = ", ".join(map(str, who[:10].tolist()))
        out.append(f"{who.size} clients can afford no level and never take part: {some}{more}")
    return out


def saved(found: Afforded, budget: Budget, memory: Memory, names: Sequence[str]) -> dict[str, PyTree]:
    """The same as values for a run's folder.

    Args:
      found: what clients can afford.
      budget: by which.
      memory: of training, in its parts.
      names: of the levels.

    >>> found = Afforded(np.array([1, 1]), np.array([True, False]), np.array([True, False]), np.array([8.0, 4.0]),
    ...                  np.array([2.0, 1.0]), np.array([[8.0, 4.0], [12.0, 6.0]]))
    >>> kept = saved(found, Budget(seconds=5.0), Memory(*np.array([[2, 1]] * 4)), ("a", "b"))
    >>> kept["level"], kept["levels"]["b"]["traffic_mb"], kept["levels"]["b"]["clients"]
    (['b', None], 1.0, 1)
    """
    parts = {name: np.asarray(part).tolist() for name, part in memory._asdict().items()}
    return {
        "max_seconds": budget.seconds,
        "max_mb": budget.megabytes,
        "max_memory_mb": budget.memory_mb,
        "levels": {
            name: {
                "traffic_mb": float(found.megabytes[i]),
                "memory_mb": float(found.memory_mb[i]),
                **{f"{what}_bytes": each[i] for what, each in parts.items()},
                "clients": int((found.level[found.able] == i).sum()),
            }
            for i, name in enumerate(names)
        },
        "level": [names[level] if able else None for level, able in zip(found.level, found.able)],
        "seconds": np.round(found.seconds, 6),
    }  # fmt: skip
