"""``compose``: a method from parts. A slot exists only where two methods fill it differently."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hetfl_jax.core import tree
from hetfl_jax.core.types import Algorithm, Array, Level, Plan, Population, PyTree, Reply, Shard
from hetfl_jax.models import families, windows
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import drift as drifts
from hetfl_jax.parts import merge as merges
from hetfl_jax.parts import objective as objectives
from hetfl_jax.parts import select as selects
from hetfl_jax.parts import server as servers
from hetfl_jax.parts.local import Local, Tally, tally, train


class ServerState(NamedTuple):
    """The server of a composed method."""

    variables: PyTree  #: the full model: params and, where tracked, batch_stats
    slot: PyTree  #: of the server rule, e.g. Adam's moments


class Sent(NamedTuple):
    """What every client receives."""

    variables: PyTree
    round: Array
    context: PyTree = ()  #: of the server rule, e.g. SCAFFOLD's variate


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
) -> Algorithm:
    """A federated method over ``family``; the defaults are FedAvg.

    Args:
      local: local training.
      select: who takes part.
      capacity_of: the level of an item in this round (default: the client's own).
      objective: the local loss (default: cross-entropy).
      drift: a client-side correction and its memory (default: none).
      merge: how replies become a mean (default: example-weighted over the clients that hold an entry).
      server: what is done with the mean (default: add it).

    Returns:
      An ``Algorithm``; its info has the loss and accuracy of the local training, how many items failed and which, and
      level and examples seen of every item and per level, from which costs are counted.
    """
    capacity_of = capacity_of or selects.own_level()
    objective = objective or objectives.cross_entropy()
    drift = drift or drifts.none()
    merge = merge or merges.overlap_mean(family)
    server = server or servers.optimizer()

    def init(key: Array) -> tuple[ServerState, PyTree]:
        variables = families.init(family, key)
        memory = drift.init(variables["params"])
        if local.keep_momentum:
            memory = {**memory, "momentum": {"params": jax.tree.map(jnp.zeros_like, variables["params"])}}
        return ServerState(variables, server.init(variables)), memory

    def plan(key: Array, round: Array, state: ServerState, population: Population, survey: Any) -> Plan:
        who, how = jax.random.split(key)
        cohort = select(who, round, state, population, survey)
        return Plan(
            *cohort,
            capacity_of(how, cohort.ids, population),
            Sent(state.variables, round, server.context(state.slot)),
            (),
        )

    def client(key: Array, sent: Sent, level: Level, ticket: PyTree, shard: Shard, memory: PyTree) -> Reply:
        view = families.view(family, sent.variables, level)
        after, seen, kept, extra = train(
            local, view, objective, drift, key=key, shard=shard, round=sent.round,
            memory={name: view.cut(part) for name, part in dict(memory).items()}, context=view.cut(dict(sent.context)),
        )  # fmt: skip
        delta = jax.tree.map(jnp.subtract, after, view.variables)
        total = merge.lift(delta, level, shard)._replace(extra=extra)
        put = {name: view.put(part, kept[name]) for name, part in memory.items()} if memory else memory
        return Reply(total, 0, put, seen)

    def widen(total: merges.Total, level: int) -> merges.Total:
        return total._replace(
            delta=windows.widen(family, total.delta, level), extra=windows.widen(family, total.extra, level)
        )

    def serve(state: ServerState, plan: Plan, total: PyTree, report: Tally, ok: Array) -> tuple[ServerState, PyTree]:
        whole = tree.take(total, 0)
        mean, coverage = merge.settle(whole)
        slot, variables = server.update(state.slot, state.variables, mean, coverage, ok.any(), whole.extra)
        info = round_info(plan, report, ok, family.levels) | server.info(slot, variables)
        return ServerState(variables, slot), info

    def model(state: ServerState, level: Level, member: int = 0) -> PyTree:
        return families.view(family, state.variables, level).variables

    def judge(sent: Sent, level: Level, shard: Shard) -> Tally:
        view = families.view(family, sent.variables, level)

        def logits(x: Array) -> Array:
            exits, _ = view.apply(view.variables, x)
            return objectives.last_exit(objective.local(exits, shard), view.active)

        return tally(logits, objective.each, local.batch_size, shard)

    def predict(variables: PyTree, level: Level, x: Array, shard: Shard | None = None) -> Array:
        exits, _ = families.apply_at(family, level)(variables, x)
        return exits if shard is None else objective.local(exits, shard)

    def statistics(variables: PyTree, level: Level, x: Array, valid: Array) -> PyTree:
        return families.apply_at(family, level)(variables, x, valid=valid, collect=True)[1]

    def others(state: ServerState, memory: PyTree) -> dict[str, ServerState]:
        found = server.others(state.slot, state.variables)
        if "last" in memory:
            found["all"] = {**state.variables, **jax.tree.map(lambda rows: rows.mean(0), memory["last"])}
        return {name: state._replace(variables=variables) for name, variables in found.items()}

    collects = statistics if families.collects_statistics(family) else None
    return Algorithm(
        family.levels, 1, init, plan, client, widen, serve, model, predict, collects, judge, others=others
    )  # fmt: skip


def round_info(plan: Plan, report: Tally, ok: Array, levels: int) -> dict[str, Array]:
    """What a human wants of a round: training loss and accuracy, failures, and work per level, all on the device."""
    seen = jax.tree.map(lambda v: jnp.where(ok, v, 0).sum(), report)
    examples = jnp.maximum(seen.examples, 1)
    at_level = jax.nn.one_hot(plan.level, levels) * plan.valid[:, None]
    failed = plan.valid & ~ok
    return {
        "train_loss": seen.loss / examples,
        "train_accuracy": seen.correct / examples,
        "clients": ok.sum(),
        "failed": failed.sum(),
        "failed_ids": jnp.where(failed, plan.ids, -1),
        "level": plan.level,
        "seen": jnp.where(plan.valid, report.examples, 0),
        "items": at_level.sum(0),
        "examples": (at_level * jnp.where(plan.valid, report.examples, 0)[:, None]).sum(0),
    }
