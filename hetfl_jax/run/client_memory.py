"""Where the memory of a run's clients lives, and whether it fits there."""

from pathlib import Path

import jax
import numpy as np

from hetfl_jax.core import machine, tree
from hetfl_jax.core.types import Config
from hetfl_jax.engine.executors import Executor
from hetfl_jax.engine.stores import (
    STORES,
    Packing,
    Store,
    device_store,
    file_store,
    host_store,
    packed_device_store,
    unpacked,
)
from hetfl_jax.models.windows import memory_extents
from hetfl_jax.run.federation import Federation


def store_for(config: Config, fed: Federation, executor: Executor) -> Store:
    """The store that ``train.store`` names.

    Rows are as large as their client's own level (packed) where levels are fixed and nothing but the engine reads them.
    What it needs: on the device the rows of all clients; on the host likewise; in files twice the rows that the run can
    touch at most.

    Args:
      executor: over its devices, rows of the device store are spread.

    Raises:
      ValueError: an unknown store, one that does not fit (with those that do), or one that the run cannot use: ``host``
        and ``file`` with several processes, or with an evaluation that reads all clients' memory.
    """
    name = config.train.store
    if name not in STORES:
        raise ValueError(f"store {name!r} is not one of {', '.join(STORES)} (train.store)")
    one = jax.eval_shape(fed.algorithm.init, jax.random.key(0))[1]
    fixed = not fed.algorithm.drawn and fed.algorithm.memory_rows == 1
    level = np.repeat(np.asarray(fed.train.level), fed.algorithm.memory_rows)
    packing = Packing(level, memory_extents(fed.family, one)) if fixed else unpacked(one, level.size)
    asked = any(question.memory for question in fed.algorithm.questions)
    whole = asked or fed.algorithm.between is not None  # these read rows themselves
    packed = fixed and not whole and fed.family.levels > 1
    needs = {"host": 4 * int(packing.sizes()[packing.level].sum())}
    needs["device"] = (needs["host"] if packed else tree.nbytes(one) * level.size) // executor.devices
    rounds = config.train.rounds * config.method.args.get("cohort", level.size)
    needs["file"] = 2 * min(needs["host"], 4 * rounds * int(packing.sizes().max()))
    has = {
        "device": machine.device_memory(),
        "host": machine.host_memory(),
        "file": machine.free_disk(config.run.folder),
    }
    if needs[name] > has[name]:
        fits = [other for other in STORES if needs[other] <= has[other]]
        raise ValueError(
            f"client memory of {level.size} clients needs {needs[name] / 1e9:.1f} GB in store {name!r}, which has "
            f"{has[name] / 1e9:.1f}: use {' or '.join(map(repr, fits)) or 'a smaller net'} (train.store)"
        )
    if name == "device":
        return packed_device_store(packing, one) if packed else device_store()
    if jax.process_count() > 1:
        raise ValueError(f"store {name!r} with several processes: need 'device' (train.store)")
    if asked:
        names = ", ".join(question.name for question in fed.algorithm.questions if question.memory)
        raise ValueError(
            f"evaluation of {names}, of all clients' memory, with store {name!r}: need 'device' (train.store)"
        )
    make = {"host": host_store, "file": file_store}[name]
    return make(Path(config.run.folder) / config.run.name / "memory", packing)
