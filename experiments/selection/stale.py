"""Why rpow with d = N loses the model on Synthetic(1, 1): what its table says of all devices, and what is true.

    taskset -c 0 python -m experiments.selection.stale

Devices that were chosen in the second half of the rounds, the mean loss by the server's table, and the mean loss of the
global model, both weighed by examples. Writes results/stale.json.
"""

import argparse
import time

import jax
import numpy as np

from experiments.federated import cell, loss_over_all, markdown
from experiments.selection.curves import RESULTS
from hetfl_jax.core import machine
from hetfl_jax.results.folder import write_json
from hetfl_jax.run.config import load_config
from hetfl_jax.run.lab import prepare


def look(candidates: int, seed: int, rounds: int) -> dict[str, float]:
    """One run: who was chosen, and both losses."""
    target = f"choice_synthetic:data_seed={seed},select=power_of_choice,d={candidates}"
    changes = ("select.args.kind=rpow", f"train.rounds={rounds}", f"run.seed={seed}", "train.devices=1")
    lab = prepare(load_config(target, *changes))
    state, chosen = lab.start(), set[int]()
    for round in range(rounds):
        state, info = lab.step(state, lab.population, lab.key)
        if round >= rounds // 2:
            chosen |= set(np.asarray(info.items.ids).tolist())
    table, size = jax.device_get((state.server.select, lab.population.size))
    there = table < 1e30  # devices that took part
    believed = float((table * size)[there].sum() / size[there].sum())
    return {"devices": len(chosen), "believed": believed, "true": loss_over_all(lab)(state)}


def main() -> None:
    """A row a number of candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    machine.use_cache()
    began, rows, body = time.perf_counter(), {}, []
    for candidates in (6, 15, 30):
        seeds = [look(candidates, seed, given.rounds) for seed in range(given.seeds)]
        rows[f"d = {candidates}"] = seeds
        columns = (("devices", 1), ("believed", 3), ("true", 3))
        body.append((f"d = {candidates}", *(cell([s[name] for s in seeds], digits) for name, digits in columns)))
    titles = ("chosen in the second half", "loss by the table", "loss of the model")
    seconds, text = round(time.perf_counter() - began), markdown(("rpow", *titles), body)
    write_json(RESULTS / "stale.json", {"rounds": given.rounds, "seconds": seconds, "table": text, "runs": rows})
    print(f"{text}\n\n{seconds} s")


if __name__ == "__main__":
    main()
