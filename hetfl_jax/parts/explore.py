"""Selections that weigh clients of known value against clients that were not seen yet: Active FL and Oort.

Both cost O(N log N) a round, N the clients of the population.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.absent import HIGHEST, LOWEST, quantile_among
from hetfl_jax.core.types import Array, Cohort, Devices, Plan, Population, PyTree, Seen
from hetfl_jax.parts.choose import FILL, LOSS, PICK, need, need_cohort, remembered, round_off
from hetfl_jax.parts.select import Ask, Select, per_client


def active(cohort: int, *, dropped: float = 0.75, sharpness: float = 0.01, explored: float = 0.1) -> Select:
    """Active FL as Power-of-Choice's supplement codes it: distinct clients by their loss in their latest training.

    1. The value v_k of a client is its mean loss in its latest local training, none (``LOWEST``) before.
    2. The ``floor(dropped * N)`` smallest values are dropped, until the client takes part again.
    3. ``floor((1 - explored) * cohort)`` clients are drawn without replacement, with probabilities in proportion to
       ``exp(sharpness * v_k)``; the others, also where fewer have a value, uniformly among the remaining clients.

    Args:
      dropped: share of all clients, 0 <= d < 1.
      sharpness: 1 / loss, >= 0; 0 draws the clients that have a value alike.
      explored: share of the cohort, 0..1.

    Raises:
      ValueError: a value out of range, and (when the round is built) a cohort above the population.

    Source: Goetz et al., "Active Federated Learning", 2019, in the form of the supplement of Cho, Wang, Joshi 2022.

    >>> (active(3).init(2) == LOWEST).tolist()
    [True, True]
    """
    need(cohort >= 1, f"cohort of {cohort} clients, allowed >= 1", "cohort")
    need(0 <= dropped < 1, f"dropped {dropped}, allowed 0 <= d < 1", "dropped")
    need(sharpness >= 0, f"sharpness {sharpness}, allowed >= 0", "sharpness")
    need(0 <= explored <= 1, f"explored {explored}, allowed 0..1", "explored")
    by_value = int(round_off((1 - explored) * cohort))

    def choose(key: Array, round: Array, table: PyTree, population: Population, ask: Ask) -> tuple[Cohort, PyTree]:
        there, clients = population.size > 0, population.size.shape[0]
        need_cohort(cohort, clients)
        smallest = jnp.argsort(table, stable=True)[: int(round_off(dropped * clients))]
        table = table.at[smallest].set(LOWEST)
        noise = [
            jax.random.gumbel(jax.random.fold_in(key, purpose), (clients,), jnp.float32, mode="high")
            for purpose in (PICK, FILL)
        ]
        known = there & (table > LOWEST)
        drawn = jnp.where(known, sharpness * jnp.where(known, table, 0) + noise[0], LOWEST)
        value, ids = jax.lax.top_k(drawn, by_value)
        taken = jnp.zeros(clients, bool).at[ids].set(value > LOWEST)
        value, ids = jax.lax.top_k(jnp.where(taken, HIGHEST, jnp.where(there, noise[1], LOWEST)), cohort)
        return Cohort(ids, value > LOWEST), table

    def update(table: PyTree, plan: Plan, seen: Seen, ok: Array) -> PyTree:
        new = remembered(table, plan, seen, ok)
        return jnp.where(jnp.isnan(new), LOWEST, new)

    init = lambda clients: jnp.full(clients, LOWEST, jnp.float32)  # noqa: E731
    return Select(init, choose, update, hears=LOSS, needs=per_client(4))


class Known(NamedTuple):
    """What Oort remembers."""

    loss: Array  #: [N] mean loss of the latest local training
    last: Array  #: [N] int32 the round of it, from 1; 0 if there was none
    now: Array  #: int32 scalar, the round that ``choose`` was called in, from 1


def oort(
    cohort: int, cap: int, *, by_size: bool = True, explored: float = 0.9, decay: float = 0.95, least: float = 0.2,
    cut: float = 0.7, clip: float = 0.98, bonus: float = 0.1, durations: Sequence[float] | None = None,
    by_speed: bool = False, preferred: float = 0.0, threshold: float = 0.3, penalty: float = 2.0,
) -> Select:  # fmt: skip
    """Oort: clients of large loss, much data and little delay, and a shrinking share of clients that are new.

    With n_k examples, rounds t counted from 1 and t_k the latest round of client k:

    1. ``u_k = min(n_k, cap) * loss_k``, cut at its quantile ``clip`` and brought to 0..1 over the clients seen so far.
    2. ``v_k = u_k + sqrt(bonus * ln(t) / t_k)``, times ``(preferred / durations_k)^penalty`` if the client is slower
       than ``preferred``, the quantile ``threshold`` of all durations by default.
    3. ``max(least, explored * decay^(t - 1))`` of the cohort are new clients, those with most examples up to ``cap``,
       ties at random. The others are drawn without replacement, in proportion to v_k, among the clients whose v_k is at
       least ``cut`` times the value of the best client that would not be taken by value alone. Where one kind has too
       few clients, the other fills the cohort.

    loss_k is the mean loss of the client's latest local training. Oort's code has the root of the mean squared loss of
    examples in the first local epoch instead; what an item reports has no squares.

    Args:
      cap: examples that count at most, in Oort local epochs * batch size.
      by_size: whether u_k has the factor ``min(n_k, cap)``.
      durations: [N] seconds that each client takes for a round.
      by_speed: without ``durations``, take them from the population's devices. Without either, speed does not count.
      preferred: seconds, > 0 with ``durations``; 0 leaves them to ``threshold``.

    Raises:
      ValueError: a value out of range, and (when the round is built) a cohort above the population or a number of
        durations that is not the population's.

    Source: Lai et al., "Oort: Efficient Federated Learning via Guided Participant Selection", OSDI 2021.

    >>> oort(2, cap=20).init(3).last.tolist()
    [0, 0, 0]
    """
    need(cohort >= 1, f"cohort of {cohort} clients, allowed >= 1", "cohort")
    need(cap >= 1, f"cap of {cap} examples, allowed >= 1", "cap")
    shares = {"explored": explored, "decay": decay, "least": least, "cut": cut, "clip": clip}
    for name, share in shares.items():
        need(0 <= share <= 1, f"{name} {share}, allowed 0..1", name)
    need(bonus >= 0, f"bonus {bonus}, allowed >= 0", "bonus")
    need(0 <= threshold <= 1, f"threshold {threshold}, allowed 0..1", "threshold")
    given = _durations(durations, by_speed, preferred, penalty)

    def init(clients: int) -> Known:
        return Known(jnp.zeros(clients, jnp.float32), jnp.zeros(clients, jnp.int32), jnp.int32(0))

    def speed_of(population: Population) -> Array | None:
        """[N] ``min(1, preferred / durations_k)^penalty``, or nothing where speed does not count."""
        known = given is not None or by_speed
        return _speed(population, given, preferred, threshold) ** penalty if known else None

    def value_of(state: Known, size: Array, known: Array, speed: Array | None) -> Array:
        """[N] v_k; of the clients that are not known, anything."""
        raw = state.loss * jnp.minimum(size, cap) if by_size else state.loss
        raw = jnp.where(known, raw, 0)
        low = jnp.where(known.any(), jnp.where(known, raw, HIGHEST).min(), 0)
        high = quantile_among(raw, known, clip)
        value = (jnp.minimum(raw, high) - low) / jnp.maximum(high - low, 1e-12)
        value += jnp.sqrt(bonus * jnp.log(state.now.astype(jnp.float32)) / jnp.maximum(state.last, 1))
        return value if speed is None else value * speed

    def choose(key: Array, round: Array, state: Known, population: Population, ask: Ask) -> tuple[Cohort, PyTree]:
        size, clients = population.size, population.size.shape[0]
        need_cohort(cohort, clients)
        state = state._replace(now=jnp.asarray(round, jnp.int32) + 1)
        known = (size > 0) & (state.last > 0) & jnp.isfinite(state.loss)
        new = (size > 0) & (state.last == 0)
        value = jnp.where(known, value_of(state, size, known, speed_of(population)), LOWEST)
        share = 1 - jnp.maximum(least, explored * jnp.power(jnp.float32(decay), round))
        by_value = jnp.floor(cohort * share + 1e-6).astype(jnp.int32)
        by_value = jnp.minimum(jnp.maximum(by_value, cohort - new.sum()), known.sum())
        next_best = -jnp.sort(-value)[jnp.minimum(by_value, clients - 1)]
        threshold = jnp.where(next_best > LOWEST, cut * next_best, LOWEST)
        keys = jax.random.fold_in(key, PICK), jax.random.fold_in(key, FILL)
        noise = [jax.random.gumbel(k, (clients,), jnp.float32, mode="high") for k in keys]
        drawn = jnp.where(known & (value >= threshold), jnp.log(jnp.maximum(value, 1e-4)) + noise[0], LOWEST)
        rank = jnp.zeros(clients, jnp.int32).at[jnp.argsort(-drawn)].set(jnp.arange(clients))
        group = jnp.where(known & (rank < by_value), 0, jnp.where(new, 1, 2))
        ids = jnp.lexsort((noise[1], -jnp.minimum(size, cap), group))[:cohort].astype(jnp.int32)
        return Cohort(ids, group[ids] < 2), state

    def update(state: Known, plan: Plan, seen: Seen, ok: Array) -> Known:
        took_part = jnp.zeros(state.last.shape, bool).at[plan.ids].max(ok)
        return state._replace(
            loss=remembered(state.loss, plan, seen, ok), last=jnp.where(took_part, state.now, state.last)
        )

    note = "" if by_speed or given is not None else "no client has a speed here, so Oort's term for slow clients is off"
    return Select(init, choose, update, hears=LOSS, needs=per_client(6, note))


def _speed(population: Population, given: np.ndarray | None, preferred: float, threshold: float) -> Array:
    """[N] ``min(1, preferred / durations_k)``."""
    if given is None and not isinstance(population.devices, Devices):
        raise ValueError("by_speed of clients without devices: need devices.name (select.args.by_speed)")
    seconds = jnp.asarray(population.devices.seconds if given is None else given)  # type: ignore[union-attr]
    clients = population.size.shape[0]
    need(seconds.shape == (clients,), f"{seconds.size} durations, allowed {clients}", "durations")
    wanted = preferred or quantile_among(seconds, population.size > 0, threshold)
    return jnp.minimum(1, wanted / seconds)


def _durations(
    durations: Sequence[float] | None, by_speed: bool, preferred: float, penalty: float
) -> np.ndarray | None:  # fmt: skip
    """[N] float32 seconds that were given."""
    need(penalty >= 0, f"penalty {penalty}, allowed >= 0", "penalty")
    need(preferred >= 0, f"preferred {preferred} seconds, allowed >= 0", "preferred")
    if durations is None:
        need(by_speed or preferred == 0, f"preferred {preferred} seconds, allowed 0 without durations", "preferred")
        return None
    need(preferred > 0, f"preferred {preferred} seconds, allowed > 0", "preferred")
    seconds = np.asarray(durations, np.float32)
    need(bool((seconds > 0).all()), f"a duration of {seconds.min()} seconds, allowed > 0", "durations")
    return seconds
