"""``compose``: a method from parts. A slot exists only where two methods fill it differently."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core import bits, tree
from hetfl_jax.core.types import (
    ACCURACY,
    Account,
    Algorithm,
    Array,
    Batch,
    ClientContext,
    Info,
    Level,
    Plan,
    Price,
    PyTree,
    Question,
    Reply,
    Score,
    Seen,
    Shard,
    Tally,
    Within,
)
from hetfl_jax.models import families, windows
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import drift as drifts
from hetfl_jax.parts import merge as merges
from hetfl_jax.parts import objective as objectives
from hetfl_jax.parts import select as selects
from hetfl_jax.parts import server as servers
from hetfl_jax.parts.adversary import Adversary, adversarial, judged
from hetfl_jax.parts.gradient import full_gradient
from hetfl_jax.parts.local import Local, Trained, examples_trained, memory_of, tally, train
from hetfl_jax.parts.message import Codec
from hetfl_jax.parts.private import Private, checked
from hetfl_jax.parts.survey import ANSWER, first_receipt, planner
from hetfl_jax.parts.traffic import down_bits, encoded, price_of
from hetfl_jax.parts.traffic import memory_of as codec_memory


class Slots(NamedTuple):
    """What is chosen apart from the method: every ``make`` takes it as ``slots``. ``None`` leaves it to the method.

    >>> slots = Slots(select=selects.uniform(5), clients=100)
    >>> [name for name, value in slots._asdict().items() if value]
    ['select', 'clients']
    """

    select: selects.Select | None = None  #: who takes part
    capacity: selects.Capacity | None = None  #: at which level
    uplink: Codec | None = None  #: what is sent in place of a change
    downlink: Codec | None = None  #: what is sent in place of the model's change since it was last sent
    objective: objectives.Objective | None = None  #: the local loss
    adversary: Adversary | None = None  #: who perturbs images, in training and evaluation
    clients: int = 0  #: in the population; wanted by a selection that remembers


class ServerState(NamedTuple):
    """The server of a composed method."""

    variables: PyTree  #: the full model: params and, where tracked, batch_stats
    slot: PyTree  #: of the server rule, e.g. Adam's moments
    select: PyTree = ()  #: what the selection remembers
    downlink: PyTree = ()  #: a ``Downlink`` where messages to clients are coded


class Downlink(NamedTuple):
    """What clients were last sent, and what the codec remembers."""

    key: Array
    params: PyTree
    memory: PyTree


class Sent(NamedTuple):
    """What every client receives."""

    variables: PyTree
    context: PyTree = ()  #: of the server rule, e.g. SCAFFOLD's variate
    coded: Array | tuple[()] = ()  #: [L, 3] bits of the coded parameters at each level, where they are coded
    kept: PyTree = ()  #: memory of the downlink's codec; it stays at the server


def refuse(method: str, slots: Slots, **fixed: bool) -> None:
    """An error for a slot that is given though the method fixes it itself.

    Args:
      method: its name, for the message.
      fixed: whether the method fixes each of these slots.

    Raises:
      ValueError: with the slot.

    >>> refuse("fedavg", Slots(), select=True)
    >>> refuse("afl", Slots(select=selects.uniform(2)), select=True)
    Traceback (most recent call last):
    ValueError: afl fixes its select itself: select.name must be none (select.name)
    """
    for name, own in fixed.items():
        if own and getattr(slots, name) is not None:
            default = "cross_entropy" if name == "objective" else "none"
            raise ValueError(f"{method} fixes its {name} itself: {name}.name must be {default} ({name}.name)")


def compose(
    family: Family,
    *,
    local: Local,
    select: selects.Select,
    capacity_of: selects.Capacity | None = None,
    objective: objectives.Objective | None = None,
    drift: drifts.Drift | None = None,
    merge: merges.Merge | None = None,
    server: servers.Server | None = None,
    private: Private | None = None,
    slots: Slots | None = None,
) -> Algorithm:
    """A federated method over ``family``; the defaults are FedAvg.

    Args:
      local: local training.
      select: who takes part.
      capacity_of: the level of an item in this round (default: the client's own).
      objective: the local loss, which ``slots`` may not replace then (default: cross-entropy).
      drift: a client-side correction and its memory (default: none).
      merge: how replies become a mean (default: example-weighted over the clients that hold an entry).
      server: what is done with the mean (default: add it).
      private: leaves that stay on the client (default: none); no codec then.
      slots: what is chosen apart from the method; it replaces ``select`` and ``capacity_of``, and says what travels.

    Returns:
      An ``Algorithm`` whose ``Info`` has the loss and accuracy of the local training, how many items failed, and what
      every item did.

    Raises:
      ValueError: slots that do not fit together.

    >>> from hetfl_jax.models import MLP
    >>> from hetfl_jax.parts.local import local
    >>> fam = families.family(MLP(hidden=(4,)), [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 3)))
    >>> compose(fam, local=local(learning_rate=0.1, batch_size=4), select=selects.uniform(2)).price().up.tolist()
    [2112, 1216]
    """
    slots = slots or Slots()
    select = slots.select or select
    capacity_of = slots.capacity or capacity_of or selects.own_level()
    refuse("this method", slots, objective=objective is not None)
    objective = objective or slots.objective or objectives.cross_entropy()
    drift = drift or drifts.none()
    merge = merge or merges.overlap_mean(family)
    server = server or servers.optimizer()
    private = checked(private, coded=bool(slots.uplink or slots.downlink))
    _tell_of_memory(slots, capacity_of, family)
    asks_received = objective.asks_received or drift.asks_received or merge.asks_received
    trains = trained_leaves(family, objective, drift)
    model, judge, predict, statistics, outputs = _reading(family, local, objective)
    gradient = full_gradient(family, local, objective)
    objective = adversarial(objective, slots.adversary, family) if slots.adversary else objective
    told = select.hears + ANSWER * merge.asks_received  #: bits that an item sends besides its change

    def init(key: Array) -> tuple[ServerState, PyTree]:
        variables = families.init(family, key)
        params = variables["params"]
        memory = {**drift.init(params), **memory_of(local, params), **private.memory(variables)}
        if slots.uplink:
            memory |= codec_memory(slots.uplink, variables)
        _check_selection(select, slots.clients, memory)
        down = Downlink(jax.random.fold_in(key, 1), params, slots.downlink.init(params)) if slots.downlink else ()
        return ServerState(variables, server.init(variables), select.init(slots.clients), down), memory

    def send(state: ServerState, round: Array) -> Sent:
        sent = Sent(state.variables, server.context(state.slot))
        return _coded(family, slots.downlink, state, round, sent.context) if slots.downlink else sent

    def travels(sent: Sent) -> Sent:
        return sent._replace(variables=private.without(sent.variables))

    def client(context: ClientContext) -> Reply:
        level, sent, memory = context.level, context.sent, dict(context.memory or {})
        view = families.view(family, sent.variables, level)
        own = context._replace(
            sent=sent._replace(variables=view.variables, context=view.cut(sent.context)),
            memory={name: view.cut(part) for name, part in memory.items()},
        )
        if asks_received:
            own = own._replace(received=judge(sent, level, context.shard))
        run = lambda v: train(local, v, family.prepare, objective, drift, own, lambda p: trains(p, level))  # noqa: E731
        done = private.trained(run, view, own.memory)
        delta = jax.tree.map(jnp.subtract, done.variables, view.variables)
        leaving = travels(sent).variables
        delta, extra, kept, up = encoded(family, slots.uplink, delta, done.extra, leaving, own, done.memory)
        total = merge.lift(delta, own)._replace(extra=extra)
        put = {name: view.put(part, kept[name]) for name, part in memory.items()} if memory else context.memory
        number, up = windows.index_of(level), up + jnp.asarray(bits.digits(told))
        work = _work(local, done, own, family.levels, number)
        heard = own.received if merge.asks_received else ()
        return Reply(total, 0, put, Seen(done.tally, work, down_bits(family, travels(sent))[number], up, heard))

    def widen(total: merges.Total, level: int) -> merges.Total:
        return total._replace(
            delta=windows.widen(family, total.delta, level), extra=windows.widen(family, total.extra, level)
        )

    def serve(state: ServerState, plan: Plan, sent: Sent, total: PyTree, seen: Seen, ok: Array) -> PyTree:
        whole = tree.take(total, 0)
        mean, coverage = merge.settle(whole)
        slot, variables = server.update(state.slot, state.variables, mean, coverage, ok.any(), whole.extra)
        slot, chosen = server.learn(slot, plan, seen, ok), select.update(plan.notes, plan, seen, ok)
        down = state.downlink._replace(params=sent.variables["params"], memory=sent.kept) if slots.downlink else ()
        numbers = {**server.info(slot, variables), **select.info(chosen)}
        info = round_info(plan, seen, ok, numbers, objective.score)
        return ServerState(variables, slot, chosen, down), info

    def price() -> Price:
        price = price_of(family, (slots.uplink, slots.downlink), drift, init, send, travels)
        down, up = price.plain or (price.down, price.up)
        return price._replace(up=price.up + told, plain=(down, up + told), needs=select.needs(slots.clients))

    plan = planner(
        select, capacity_of, send, judge, lambda sent: down_bits(family, travels(sent)), family.levels, gradient,
        lambda state, ids: server.known(state.slot, ids),
    )  # fmt: skip
    questions = judged(slots.adversary, family, outputs, questions_of(model, predict, server.models, drift.models))
    return Algorithm(
        family.levels, 1, init, plan, send, client, widen, serve, model, predict, questions,
        statistics=statistics, judge=judge, drawn=capacity_of.drawn, price=price,
        same_selection=lambda server, other: server._replace(select=other.select),
        score=objective.score, gradient=gradient, clients=slots.clients or server.clients,
    )  # fmt: skip


def _reading(family: Family, local: Local, objective: objectives.Objective) -> tuple[PyTree, ...]:
    """``model``, ``judge``, ``predict``, ``statistics`` (``None`` where nothing is collected), and ``outputs``.

    ``outputs(variables, level, x prepared, shard=None, valid=None, noise=None)`` is [E, B, C], as ``predict``.
    """

    def model(state: ServerState, level: Level, member: int = 0) -> PyTree:
        return families.view(family, state.variables, level).variables

    def judge(sent: Sent, level: Level, shard: Shard, key: Array | None = None, examples: int = 0) -> Tally:
        view = families.view(family, sent.variables, level)

        def logits(batch: Batch) -> Array:
            exits, _ = view.apply(view.variables, batch.x, valid=batch.valid)
            return objectives.last_exit(objective.local(exits, shard), view.active)

        return tally(logits, objective.score.each, local.batch_size, shard, key=key, examples=examples)

    def outputs(
        variables: PyTree, level: Level, x: Array, shard: Shard | None = None, valid: Array | None = None,
        noise: Array | float | None = None,
    ) -> Array:  # fmt: skip
        exits, _, _ = families.forward_at(family, level)(variables, x, valid=valid, noise=noise)
        return exits if shard is None else objective.local(exits, shard)

    def predict(
        variables: PyTree, level: Level, x: Array, shard: Shard | None = None, valid: Array | None = None
    ) -> Array:
        return outputs(variables, level, family.prepare(x, None), shard, valid)

    def statistics(variables: PyTree, level: Level, x: Array, valid: Array) -> PyTree:
        return families.apply_at(family, level)(variables, x, valid=valid, collect=True)[1]

    return model, judge, predict, statistics if families.collects_statistics(family) else None, outputs


def _check_selection(select: selects.Select, clients: int, memory: Mapping[str, PyTree]) -> None:
    """Refuse a selection that remembers without a number of clients, or that repeats clients which have memory."""
    remembers = jax.tree.leaves(jax.eval_shape(lambda: select.init(max(clients, 1))))
    if remembers and clients < 1:
        raise ValueError("a selection that remembers needs the number of clients (Slots.clients)")
    if select.repeats and memory:
        raise ValueError(
            f"a selection in which a client may come twice, with client memory {', '.join(memory)}, of which it has "
            "one row: need a selection without repetition (select.name)"
        )


def _tell_of_memory(slots: Slots, capacity_of: selects.Capacity, family: Family) -> None:
    """Say what becomes of what a codec's client remembers, where its level is drawn anew."""
    if slots.uplink and capacity_of.drawn and family.levels > 1:
        kept = jax.eval_shape(slots.uplink.init, family.shapes[0]["params"])
        if kept:
            warnings.warn(
                f"a codec's memory ({', '.join(kept)}) under levels drawn anew: what a client keeps outside the level "
                "of a round stays until it has it again (uplink.error_feedback, capacity.name=fixed)",
                stacklevel=4,
            )


def trained_leaves(family: Family, objective: objectives.Objective, drift: drifts.Drift) -> PyTree:
    """``(path, level) -> bool``, whether a level's client trains a leaf; traced where the level is.

    A leaf that the drift freezes is not trained, nor one that takes no part in the loss at that level.
    """
    frozen = set(drift.frozen)

    def trains(path: windows.Path, level: Level) -> bool | Array:
        if not frozen.isdisjoint(path):
            return False
        table = families.trained(family, path, objective.all_exits) | (family.windows[path].extents == 0).any(1)
        if table.all():
            return True
        return bool(table[level]) if isinstance(level, int) else jnp.asarray(table)[windows.index_of(level)]

    return trains


def _coded(family: Family, downlink: Codec, state: ServerState, round: Array, context: PyTree) -> Sent:
    """The model as clients rebuild it: what they were last sent, plus the coded change since."""
    key = jax.random.fold_in(state.downlink.key, round)
    params, sent = state.variables["params"], state.downlink.params
    change = jax.tree.map(jnp.subtract, params, sent)

    def at(level: Level) -> tuple[PyTree, PyTree, Array]:
        empty = ClientContext(key, round, level, (), (), (), state.downlink.memory)
        return downlink.encode(key, windows.narrow(family, {"params": change}, 0)["params"], empty, empty.memory)

    received, kept, first = at(0)
    rows = [first, *(at(Within(0, jnp.int32(level)))[2] for level in range(1, family.levels))]
    variables = {**state.variables, "params": jax.tree.map(jnp.add, sent, received)}
    return Sent(variables, context, jnp.stack(rows), kept)


def _work(local: Local, done: Trained, context: ClientContext, levels: int, number: int | Array) -> Array:
    """[2, L] examples forward and backward, those of the received model's judgement too."""
    here = jax.nn.one_hot(number, levels, dtype=jnp.int32)
    examples = examples_trained(local, context.shard.size)
    work = jnp.stack([here * examples] * 2) if done.work is None else done.work
    return work.at[0].add(here * context.shard.size) if isinstance(context.received, Tally) else work


def questions_of(
    model: Callable[..., PyTree],
    predict: Callable[..., PyTree],
    of_server: Mapping[str, Callable[[PyTree, PyTree], PyTree]],
    of_memory: Mapping[str, Callable[[PyTree], PyTree]],
) -> tuple[Question, ...]:
    """The score of the model, and of what server and clients remember of others.

    Args:
      model, predict: of the algorithm.
      of_server: by name, (server slot, variables) -> collections that replace the model's, e.g. FedDyn's ``sel``.
      of_memory: by name, (memory of all clients) -> the same.

    >>> [question.name for question in questions_of(None, None, {"sel": None}, {})]
    ['', 'sel']
    """

    def read(variables: PyTree, tier: Level, batch: Batch, shard: Shard | None) -> dict[str, Array]:
        return objectives.readings(predict(variables, tier, batch.x, shard, batch.valid))

    def at(server: ServerState, tier: Level, changed: PyTree) -> PyTree:
        return model(server._replace(variables={**server.variables, **changed}), tier)

    def own(server: ServerState, memory: PyTree, tier: Level) -> PyTree:
        return model(server, tier)

    def from_server(of: Callable[..., PyTree], server: ServerState, memory: PyTree, tier: Level) -> PyTree:
        return at(server, tier, of(server.slot, server.variables))

    def from_memory(of: Callable[..., PyTree], server: ServerState, memory: PyTree, tier: Level) -> PyTree:
        return at(server, tier, of(memory))

    more = [Question(name, partial(from_server, of), read) for name, of in of_server.items()]
    more += [Question(name, partial(from_memory, of), read, memory=True) for name, of in of_memory.items()]
    return (Question("", own, read), *more)


def round_info(
    plan: Plan, seen: Seen, ok: Array, numbers: Mapping[str, Array] | None = None, score: Score = ACCURACY
) -> Info:
    """What a human wants of a round: loss and score of the training, failures, and what every item did.

    Args:
      seen: leaves [K, ...], of every item.
      ok: [K] bool, whose replies count.
      numbers: further scalars by name.
    """
    there = lambda v: plan.valid.reshape(-1, *[1] * (v.ndim - 1))  # noqa: E731
    seen = jax.tree.map(lambda v: jnp.where(there(v), v, 0), first_receipt(plan, seen))
    total = jax.tree.map(lambda v: jnp.where(ok, v, 0).sum(), seen.tally)
    found = {
        "train_loss": total.loss / jnp.maximum(total.examples, 1),
        f"train_{score.name}": score.of(total),
        "clients": ok.sum(),
        "failed": (plan.valid & ~ok).sum(),
    }
    items = Account(plan.ids, plan.level, plan.valid, ok, seen)
    return Info(items, plan.asked, {**found, **(numbers or {})}, {})
