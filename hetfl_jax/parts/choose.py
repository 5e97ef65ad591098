"""Who takes part, drawn by amount of data and by the model's loss: Power-of-Choice and its baselines.

``n_k`` are the examples of client k. These selections cost O(N) a round, N the clients of the population. Each of their
draws has a key of its own, so two selections that differ only in their score see the same candidates. A client without
examples (``intermittent`` makes some) is never a valid item; the cohort then has fewer valid items.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.absent import HIGHEST, LOWEST
from hetfl_jax.core.random import permute
from hetfl_jax.core.types import Array, Cohort, Devices, Plan, Population, PyTree, Seen, Tally
from hetfl_jax.parts.select import Ask, Select, per_client, stateless

CANDIDATES, FIRST, PICK, FILL, ABSENT = range(5)  #: what a key is for

KINDS = ("pow", "cpow", "rpow", "adapow")
LOSS = 32  #: bits of a loss that an item sends
LARGE = 4096  #: clients from which on a draw reads their weights once


def draw_without_replacement(key: Array, weight: Array, count: int) -> Array:
    """[count] distinct clients drawn one after the other, each in proportion to its weight among those that are left.

    The clients with the largest ``log(weight_k) + Gumbel_k`` in descending order are such a draw, in its order. The
    noise of client k depends on the key and k only. Of a large population, draws with replacement are made until there
    are enough different clients, which is the same law and reads the weights once. Clients of weight 0 come last.

    Args:
      weight: [N] numbers >= 0; whole ones with a sum below 2^31.

    >>> draw_without_replacement(jax.random.key(0), jnp.array([0, 5, 0, 1]), 2).sort().tolist()
    [1, 3]
    """
    clients = weight.shape[0]
    large = clients >= LARGE and 16 * count <= clients and not jnp.issubdtype(weight.dtype, jnp.floating)
    return _different(key, weight, count) if large else _by_noise(key, weight, jnp.zeros(clients, bool), count)


def _by_noise(key: Array, weight: Array, taken: Array, count: int) -> Array:
    """The ``count`` of largest noisy weight, those without weight last, and the ``taken`` ones after them."""
    noise = jax.random.gumbel(key, weight.shape, jnp.float32, mode="high")
    some = weight > 0
    chance = jnp.log(jnp.where(some, weight, 1).astype(jnp.float32)) + noise
    return jax.lax.top_k(jnp.where(taken, LOWEST, jnp.where(some, chance, LOWEST / 2)), count)[1]


def _different(key: Array, weight: Array, count: int) -> Array:
    """The first ``count`` different clients of draws with replacement; where these are too few, the rest by noise."""
    drawn = draw_with_replacement(key, weight, 2 * count + 16)
    first = repetitions(drawn) == 0
    ids, found = drawn[jnp.argsort(~first, stable=True)[:count]], first.sum()

    def completed() -> Array:
        taken = jnp.zeros(weight.shape, bool).at[drawn].set(True)
        rest = _by_noise(jax.random.fold_in(key, 1), weight, taken, count)
        place = jnp.arange(count)
        return jnp.where(place < found, ids, rest[jnp.maximum(place - found, 0)])

    return jax.lax.cond(found >= count, lambda: ids, completed)


def draw_with_replacement(key: Array, weight: Array, count: int) -> Array:
    """[count] clients, each drawn in proportion to its weight; a client may come several times.

    Args:
      weight: [N] integers >= 0 with a sum of 1 to 2^31 - 1.

    >>> draw_with_replacement(jax.random.key(0), jnp.array([0, 7, 0]), 3).tolist()
    [1, 1, 1]
    """
    clients = weight.shape[0]
    block = math.isqrt(clients)  # sums of blocks first: a running sum over all would be many passes
    rows = jnp.pad(weight.astype(jnp.int32), (0, -clients % block)).reshape(-1, block)
    each = rows.sum(1)
    end = jnp.cumsum(each)
    draw = jax.random.randint(key, (count,), 0, jnp.maximum(end[-1], 1))
    row = jnp.minimum(jnp.searchsorted(end, draw, side="right"), end.size - 1)
    inside = jnp.cumsum(rows[row], 1)
    place = (inside <= (draw - end[row] + each[row])[:, None]).sum(1)
    return jnp.minimum(row * block + place, clients - 1).astype(jnp.int32)


def largest(ids: Array, score: Array, count: int) -> Cohort:
    """The ``count`` clients of largest score; of equal scores the earlier ones; ``LOWEST`` and NaN are not valid.

    Args:
      ids: [d] candidates in the order in which they were drawn.
      score: [d] a score of each.

    >>> best = largest(jnp.array([7, 3, 9, 4]), jnp.array([1.0, 2.0, jnp.nan, 2.0]), 4)
    >>> best.ids.tolist(), best.valid.tolist()
    ([3, 4, 7, 9], [True, True, True, False])
    """
    score = jnp.where(score > LOWEST, score, LOWEST)
    place = jnp.argsort(score, stable=True, descending=True)[:count]
    return Cohort(ids[place], score[place] > LOWEST)


def repetitions(ids: Array) -> Array:
    """[K] how many earlier items belong to the same client.

    >>> repetitions(jnp.array([4, 2, 4, 4])).tolist()
    [0, 0, 1, 2]
    """
    order = jnp.argsort(ids, stable=True)
    place = jnp.arange(ids.size, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones(1, bool), jnp.diff(ids[order]) != 0])
    start = jax.lax.cummax(jnp.where(begins, place, 0))
    return jnp.zeros_like(place).at[order].set(place - start)


def mean_loss(tally: Tally) -> Array:
    """Loss per example; ``LOWEST`` where there is no example.

    Args:
      tally: sums, leaves [K].

    >>> found = mean_loss(Tally(jnp.array([8.0, 3.0]), (), jnp.array([4.0, 0.0])))
    >>> float(found[0]), bool(found[1] == LOWEST)
    (2.0, True)
    """
    return jnp.where(tally.examples > 0, tally.loss / jnp.maximum(tally.examples, 1), LOWEST)


def remembered(table: Array, plan: Plan, seen: Seen, ok: Array) -> Array:
    """A table [N] of mean losses of the latest local training; clients that did not take part keep their entry.

    ``table_k = sum of losses / number of examples`` over all that client k trained on in this round. With batches of
    equal size this is the mean over its steps of the mini-batch loss, in training mode, while the weights change.

    Args:
      table: [N] float32.
      plan: ids [K] of the items.
      seen: what they did.
      ok: [K] bool, whose reply counts.

    >>> plan = Plan(jnp.array([2, 0]), jnp.ones(2, bool), jnp.zeros(2, int))
    >>> seen = Seen(Tally(jnp.array([8.0, 3.0]), (), jnp.array([4.0, 3.0])), (), (), ())
    >>> remembered(jnp.full(3, 9.0), plan, seen, jnp.array([True, False])).tolist()
    [9.0, 9.0, 2.0]
    """

    _, client = jnp.unique(plan.ids, return_inverse=True, size=plan.ids.size)  # the table itself is passed over once

    def per_client(values: Array) -> Array:
        return jnp.zeros(plan.ids.shape, jnp.float32).at[client].add(jnp.where(ok, values, 0))[client]

    examples = per_client(seen.tally.examples)
    mean = per_client(seen.tally.loss) / jnp.maximum(examples, 1)
    return table.at[plan.ids].set(jnp.where(examples > 0, mean, table[plan.ids]))


def need(fine: bool, message: str, key: str) -> None:
    """A ``ValueError`` that names the argument, unless its value is fine.

    >>> need(False, "cohort of 0 clients, allowed >= 1", "cohort")
    Traceback (most recent call last):
    ValueError: cohort of 0 clients, allowed >= 1 (select.args.cohort)
    """
    if not fine:
        raise ValueError(f"{message} (select.args.{key})")


def need_cohort(cohort: int, clients: int) -> None:
    """A ``ValueError`` for a cohort larger than the population, when the round is built.

    >>> need_cohort(4, 3)
    Traceback (most recent call last):
    ValueError: cohort of 4 clients, allowed 1..3 (select.args.cohort)
    """
    need(cohort <= clients, f"cohort of {cohort} clients, allowed 1..{clients}", "cohort")


def weighted(cohort: int) -> Select:
    """``cohort`` distinct clients, drawn one after the other in proportion to their examples (q-FFL's sampling).

    A client's chance to be in the cohort is not ``cohort * p_k``, since what is left after each draw changes.

    Args:
      cohort: K, >= 1 and at most the clients of the population.

    Raises:
      ValueError: a cohort below 1, or (when the round is built) above the population.

    Source: fair_flearn, ``fedbase.py``, sampling 2.

    >>> people = Population(None, None, None, None, jnp.array([0, 5, 3]), None, None)
    >>> sorted(weighted(2).choose(jax.random.key(0), 0, (), people, None)[0].ids.tolist())
    [1, 2]
    """
    need(cohort >= 1, f"cohort of {cohort} clients, allowed >= 1", "cohort")

    def choose(key: Array, population: Population) -> Cohort:
        need_cohort(cohort, population.size.shape[0])
        ids = draw_without_replacement(jax.random.fold_in(key, CANDIDATES), population.size, cohort)
        return Cohort(ids, population.size[ids] > 0)

    return stateless(choose, per_client(2))


def random_with_replacement(cohort: int) -> Select:
    """``cohort`` draws with replacement, in proportion to examples; the first round draws all clients alike.

    A client that is drawn twice trains twice, on mini-batches of its own, and counts twice. The first of its items has
    the stream 0, its repetitions 1, 2, ...

    Args:
      cohort: K draws of a round, >= 1.

    Raises:
      ValueError: a cohort below 1.

    Source: baseline ``rand`` in the supplement of Power-of-Choice (Cho, Wang, Joshi, AISTATS 2022).

    >>> people = Population(None, None, None, None, jnp.array([0, 7, 0]), None, None)
    >>> drawn = random_with_replacement(3).choose(jax.random.key(0), 1, (), people, None)[0]
    >>> drawn.ids.tolist(), drawn.stream.tolist()
    ([1, 1, 1], [0, 1, 2])
    """
    need(cohort >= 1, f"cohort of {cohort} clients, allowed >= 1", "cohort")

    def choose(key: Array, round: Array, state: PyTree, population: Population, ask: Ask) -> tuple[Cohort, PyTree]:
        some = population.size > 0
        first = draw_with_replacement(jax.random.fold_in(key, FIRST), some, cohort)
        later = draw_with_replacement(jax.random.fold_in(key, CANDIDATES), population.size, cohort)
        ids = jnp.where(round == 0, first, later)
        return Cohort(ids, some[ids], repetitions(ids)), state

    return Select(lambda clients: (), choose, repeats=True, needs=per_client(2))


def power_of_choice(
    cohort: int, candidates: int, *, kind: str = "pow", examples: int = 0, level: int | None = None, every: int = 0,
    shrink: float = math.inf,
) -> Select:  # fmt: skip
    """Of ``candidates`` distinct clients, drawn in proportion to their examples, the ``cohort`` of largest mean loss.

    Ties go to the candidate that was drawn earlier. The first round takes ``cohort`` distinct clients uniformly.

    | kind | score of a candidate |
    | --- | --- |
    | pow | mean loss of the current model on all its training examples |
    | cpow | the same on ``examples`` of them |
    | rpow | mean loss of its latest local training; ``HIGHEST`` before it took part, so new clients come first |
    | adapow | as pow, of the first ``max(cohort, floor(candidates / shrink^(round // every)))`` candidates only |

    Except for rpow, all ``candidates`` clients are asked in every round, and pay for it: also in the first round, and
    also those that adapow leaves out, because the shapes of a round are fixed. A mean over replies that weighs clients
    by their examples would count the amount of data twice; the method's own one is plain.

    Args:
      examples: of cpow, b >= 1; a client with fewer uses all of them.
      level: at which capacity level candidates are asked; default: their own.
      every: of adapow, rounds between two changes of the number of candidates.
      shrink: of adapow, by what the number is divided: 100 candidates with a cohort of 10, ``every=50`` and
        ``shrink=2`` are 100, 50, 25, 12, 10, 10, ...; infinity (the default) goes to the cohort at once.

    Raises:
      ValueError: a value out of range, or one that the kind does not use.

    Source: Cho, Wang, Joshi, "Towards Understanding Biased Client Selection in Federated Learning", AISTATS 2022, with
    the authors' supplement.

    >>> from hetfl_jax.core.types import Population, Tally
    >>> clients = Population(None, None, None, None, jnp.array([4, 4, 4]), None, None)
    >>> ask = lambda ids, level, examples, valid: Tally(jnp.array([4.0, 12.0, 8.0])[ids], 0, jnp.full(3, 4.0))
    >>> power_of_choice(2, 3).choose(jax.random.key(0), 1, (), clients, ask)[0].ids.tolist()
    [1, 2]
    """
    need(cohort >= 1, f"cohort of {cohort} clients, allowed >= 1", "cohort")
    need(candidates >= cohort, f"{candidates} candidates, allowed >= {cohort}, the cohort", "candidates")
    need(kind in KINDS, f"kind {kind!r}, allowed {', '.join(KINDS)}", "kind")
    allowed = ">= 1 with kind cpow" if kind == "cpow" else f"0 with kind {kind}"
    need(examples >= 1 if kind == "cpow" else examples == 0, f"{examples} examples, allowed {allowed}", "examples")
    allowed = ">= 1 with kind adapow" if kind == "adapow" else f"0 with kind {kind}"
    need(every >= 1 if kind == "adapow" else every == 0, f"every {every} rounds, allowed {allowed}", "every")
    need(shrink > 1, f"shrink {shrink}, allowed > 1", "shrink")
    # What divides to below 1 divides no further: powers stay finite.
    factor = np.float32(min(shrink, candidates + 1))
    most = math.ceil(math.log(candidates + 1) / math.log(factor))

    def init(clients: int) -> PyTree:
        return jnp.full(clients, HIGHEST, jnp.float32) if kind == "rpow" else ()

    def score(ids: Array, there: Array, round: Array, table: PyTree, ask: Ask) -> Array:
        if kind == "rpow":
            return jnp.where(there, table[ids], LOWEST)
        asked = there & (round > 0)  # the first cohort is drawn without a score
        if kind == "adapow":
            number = jnp.maximum(cohort, jnp.floor(candidates / jnp.power(factor, jnp.minimum(round // every, most))))
            asked &= jnp.arange(candidates) < number
        return jnp.where(asked, mean_loss(ask(ids, level, examples, asked)), LOWEST)

    def choose(key: Array, round: Array, state: PyTree, population: Population, ask: Ask) -> tuple[Cohort, PyTree]:
        size, clients = population.size, population.size.shape[0]
        need_cohort(cohort, clients)
        need(candidates <= clients, f"{candidates} candidates, allowed {cohort}..{clients}", "candidates")
        ids = draw_without_replacement(jax.random.fold_in(key, CANDIDATES), size, candidates)
        best = largest(ids, score(ids, size[ids] > 0, round, state, ask), cohort)

        def first() -> tuple[Array, Array]:  # only then, since a draw reads the sizes of all clients
            drawn = draw_without_replacement(jax.random.fold_in(key, FIRST), size > 0, cohort)
            return drawn, size[drawn] > 0

        return Cohort(*jax.lax.cond(round == 0, first, lambda: (best.ids, best.valid))), state

    if kind == "rpow":
        return Select(init, choose, remembered, hears=LOSS, needs=per_client(3))
    return Select(init, choose, needs=per_client(2))


def intermittent(select: Select, absent: float = 0.2) -> Select:
    """A selection among the clients that are there: one half of the ids a round, without a random share of it.

    In rounds 0, 2, 4, ... the clients 0 .. N//2 - 1 are there, in rounds 1, 3, 5, ... the others, each time without
    ``floor(absent * half)`` of them. The selection sees clients that are not there as clients without examples. What a
    selection takes all the same, such as ``uniform``, which asks for no sizes, is not valid: the cohort is smaller.

    Raises:
      ValueError: a share outside [0, 1), or (when the round is built) a single client.

    Source: availability in the experiments of Power-of-Choice's supplement.

    >>> from hetfl_jax.parts.select import uniform
    >>> people = Population(None, None, None, None, jnp.array([1, 1, 1, 1]), None, None)
    >>> choose = intermittent(uniform(4), absent=0.0).choose
    >>> found = [choose(jax.random.key(0), round, (), people, None)[0] for round in (0, 1)]
    >>> [sorted(cohort.ids[cohort.valid].tolist()) for cohort in found]
    [[0, 1], [2, 3]]
    """
    need(0 <= absent < 1, f"absent {absent}, allowed 0 <= a < 1", "absent")

    def part(key: Array, clients: int) -> Array:
        """[clients] bool, who of a half is there."""
        return permute(key, jnp.arange(clients), clients) >= int(round_off(absent * clients))

    def choose(key: Array, round: Array, state: PyTree, population: Population, ask: Ask) -> tuple[Cohort, PyTree]:
        clients = population.size.shape[0]
        need(clients >= 2, f"intermittent selection of {clients} clients, allowed >= 2", "absent")
        who, even = jax.random.fold_in(key, ABSENT), jnp.asarray(round) % 2 == 0
        halves = part(who, clients // 2) & even, part(who, clients - clients // 2) & ~even
        here = jnp.concatenate(halves)
        there = population._replace(size=jnp.where(here, population.size, 0))
        cohort, state = select.choose(key, round, state, there, ask)
        return cohort._replace(valid=cohort.valid & here[cohort.ids]), state

    return select._replace(choose=choose)


def in_time(select: Select, limit: float) -> Select:
    """A selection among the clients whose round is expected to take at most ``limit`` seconds on their devices.

    As in ``intermittent``, the selection sees the others as clients without examples.

    Raises:
      ValueError: a limit <= 0, or (when the round is built) clients without devices.

    Source: the first step of FedCS (Nishio and Yonetani, "Client Selection for Federated Learning with Heterogeneous
    Resources in Mobile Edge", ICC 2019), without its packing of uploads.

    >>> from hetfl_jax.parts.select import uniform
    >>> devices = Devices(*[jnp.ones(3)] * 3, seconds=jnp.array([5.0, 90.0, 20.0]))
    >>> people = Population(None, None, None, None, jnp.array([1, 1, 1]), None, None, devices=devices)
    >>> cohort = in_time(uniform(3), 30.0).choose(jax.random.key(0), 0, (), people, None)[0]
    >>> sorted(cohort.ids[cohort.valid].tolist())
    [0, 2]
    """
    need(limit > 0, f"limit {limit} seconds, allowed > 0, by default devices.deadline", "limit")

    def choose(key: Array, round: Array, state: PyTree, population: Population, ask: Ask) -> tuple[Cohort, PyTree]:
        devices = population.devices
        if not isinstance(devices, Devices):
            raise ValueError("in_time of clients without devices: need devices.name (select.name)")
        fast = jnp.asarray(devices.seconds) <= limit
        fast = fast if isinstance(devices.here, tuple) else fast & devices.here
        size = jnp.where(fast, population.size, 0)
        there = population._replace(size=size, devices=devices._replace(here=fast))
        cohort, state = select.choose(key, round, state, there, ask)
        return cohort._replace(valid=cohort.valid & fast[cohort.ids]), state

    return select._replace(choose=choose)


def round_off(number: float) -> float:
    """A product of decimal fractions without its last digits, so that 0.7 * 10 is 7 and not a little less.

    >>> int(0.29 * 100), int(round_off(0.29 * 100))
    (28, 29)
    """
    return round(number, 9)
