"""Runs of a config without files, for the experiments: rounds, scores, costs, and who took part."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hetfl_jax.core.types import Info, State
from hetfl_jax.engine.execute import compiled
from hetfl_jax.results.folder import plain
from hetfl_jax.run import ledger
from hetfl_jax.run.config import load_config
from hetfl_jax.run.evaluate import tallies
from hetfl_jax.run.lab import Lab, evaluate_tiers, prepare

Line = dict[str, Any]
BLOCK = 50  #: rounds whose reports wait on the device


def play(target: str, *changes: str, every: int, training_loss: bool = False) -> list[Line]:
    """Train what ``load_config(target, *changes)`` describes; a line for every ``every``-th round and the last.

    A line has the round, the scores of ``evaluate_tiers``, costs so far, how often each level took part so far, and
    with ``training_loss`` the loss of the global model over all training examples.
    """
    lab = prepare(load_config(target, *changes, "train.devices=1"))
    state, totals, waiting = lab.start(), ledger.Totals(), list[Info]()
    rounds, names = lab.config.train.rounds, lab.federation.mix.names
    taken, lines = np.zeros(len(names), int), list[Line]()
    loss_of = loss_over_all(lab)
    for round in range(1, rounds + 1):
        state, info = lab.step(state, lab.population, lab.key)
        waiting.append(info)
        evaluates = round % every == 0 or round == rounds
        if evaluates or len(waiting) == BLOCK:
            for one in jax.device_get(waiting):
                totals = ledger.add(totals, ledger.spent(one, lab.federation.costs))
                taken += list(ledger.of_levels(one.items, names).values())
            waiting = []
        if evaluates:
            more = {"training_loss": loss_of(state)} if training_loss else {}
            scores = evaluate_tiers(lab, state)
            lines.append({"round": round, **scores, **more, **totals.line(), "taken": dict(zip(names, taken.tolist()))})
    return lines


def loss_over_all(lab: Lab) -> Any:
    """A function of the state: mean loss of the global model over all training examples."""
    batch, executor = lab.config.run.eval_batch_size, lab.executor

    def total(server: Any, data: Any) -> Any:
        return jax.tree.map(lambda v: v.sum(), tallies(lab.federation.algorithm, executor, server, 0, data, batch))

    ask = compiled(total, executor)

    def of(state: State) -> float:
        seen = jax.device_get(ask(state.server, lab.population))
        return float(seen.loss / seen.examples)

    return of


def cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample deviation.

    >>> cell([1.0, 3.0])
    '2.0 +- 1.4'
    """
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def compact(values: dict[str, Any]) -> str:
    """JSON with a line for each list.

    >>> print(compact({"rand": {"round": [10, 20]}}), end="")
    {
     "rand": {
      "round": [10, 20]
     }
    }
    """

    def on_one_line(found: re.Match[str]) -> str:
        return f"[{' '.join(found[1].split())}]"

    return re.sub(r"\[([^\[\]{}\"]*)\]", on_one_line, json.dumps(plain(values), indent=1)) + "\n"
