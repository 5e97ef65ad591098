"""What a run would be on a TPU: its programs are compiled for a topology that is not here, and the schedule is read."""

import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from hetfl_jax.core import platform
from hetfl_jax.core.types import Config, PyTree, State
from hetfl_jax.engine import executors, schedule
from hetfl_jax.engine.buckets import chunks
from hetfl_jax.engine.topology import Target, target
from hetfl_jax.run.buckets import chosen, work_of
from hetfl_jax.run.client_memory import store_for
from hetfl_jax.run.config import complete, load_config
from hetfl_jax.run.federation import Federation, Own, build
from hetfl_jax.run.programs import new_programs, numbers


class Program(NamedTuple):
    """One compiled program. Programs run one after the other, so that each must fit alone."""

    name: str
    megabytes: float  #: of a chip's memory: arguments, results and what is temporary
    compile_seconds: float  #: here
    schedule: schedule.Schedule


class Plan(NamedTuple):
    """A run as it would be on a topology; all times are the compiler's estimates, nothing ran."""

    target: str
    chips: int
    round: Program
    evaluation: Program  #: of the first model
    fits: bool
    room: float  #: MB of a chip
    milliseconds: float  #: of a round, estimated, loops by their expected trip counts
    utilisation: float  #: needed multiply-adds x 2 over what all chips could do in that time (bfloat16)
    buckets: str  #: names of levels that share one


def plan(config: Any, where: str, own: Own | None = None) -> Plan:
    """Compile the round and the evaluation of ``config`` for a topology such as ``v5e:2x4``; nothing runs there.

    Args:
      config: as of ``train``.
      where: a generation and a shape: ``v5e:2x2``, ``v4:2x2x1``, ``v5e:8x8``.
      own: what the user brings in place of what the config names.

    Raises:
      ValueError: as ``train``; an unknown topology; no ``libtpu`` (extra ``tpu-plan``); client memory off the device.

    >>> plan("heterofl_digits", "v9:2x2")
    Traceback (most recent call last):
    ValueError: target 'v9:2x2': need one of v4, v5e, v5p, v6e and a shape, e.g. v5e:2x2 or v4:2x2x1 (--target)
    """
    there, own = target(where), own or Own()
    config = complete(load_config(str(config)) if isinstance(config, str) else config, method=own.method)
    if config.train.store != "device":
        raise ValueError(f"store {config.train.store!r} with --target: need 'device' (train.store)")
    with config.unlocked():
        config.run.eval_masked = False
    with platform.during(there.platform()):
        fed = build(config, own)
        groups, wanted = chosen(config, fed, there.mesh.size, there.platform(), own.method)
        run = executors.executor(
            config.train.executor, config.train.clients_per_chunk, 1, groups, wanted, there.mesh, there.platform()
        )
        programs = new_programs(config, fed, run, store_for(config, fed, run), None, numbers(config, fed))
    groups = groups or tuple((level,) for level in range(fed.family.levels))
    told, key = numbers(config, fed), jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda k, t: programs.first(k, fed.partition.size.size, t), key, told)
    state, key = _there(there, state), _there(there, key)
    train, batches, test = (_there(there, v) for v in (fed.train, fed.train_batches, fed.test))
    trips = _trips(config, fed, there, groups)
    of_round = _compiled("round", programs.round.usual, trips, state, train, key, told)
    memory = state.memory if fed.algorithm.questions[0].memory else ()
    evaluation = _compiled(
        "evaluation", programs.evaluate, trips, 0, 0, state.server, memory, train, batches, test, told
    )
    room, seconds = there.generation.memory * 1e3, of_round.schedule.cycles / (there.generation.clock * 1e9)
    asked = work_of(config, fed, 1)
    needed = float(np.dot(asked.share, asked.macs)) * asked.items * asked.steps
    peak = there.generation.flops * 1e12 * there.mesh.size
    return Plan(
        where, there.mesh.size, of_round, evaluation, max(of_round.megabytes, evaluation.megabytes) <= room, room,
        1e3 * seconds, 2 * needed / (peak * seconds) if seconds else 0.0,
        "-".join("".join(fed.mix.names[level] for level in group) for group in groups),
    )  # fmt: skip


def _there(there: Target, values: PyTree) -> PyTree:
    """Shapes of ``values`` on the topology: everywhere, but for client memory, which is split as ``Executor.place``.

    Rows of memory are padded to a multiple of the chips.
    """

    def shape(spec: Any, rows: bool = False) -> Any:
        def of(leaf: Any) -> jax.ShapeDtypeStruct:
            first = (-(-leaf.shape[0] // there.mesh.size) * there.mesh.size,) if rows else leaf.shape[:1]
            return jax.ShapeDtypeStruct((*first, *leaf.shape[1:]), leaf.dtype, sharding=NamedSharding(there.mesh, spec))

        return of

    if isinstance(values, State):
        memory = jax.tree.map(shape(executors.SPLIT, rows=True), values.memory)
        return State(_there(there, values.server), memory, _there(there, values.round))
    return jax.tree.map(shape(executors.EVERYWHERE), values)


def _trips(config: Config, fed: Federation, there: Target, groups: Any) -> schedule.Trips:
    """Trip counts of the loops that the engine and local training make: chunks of a bucket, and local steps.

    They are expected ones, for levels and cohorts are drawn; a loop of evaluation or of a method has none.
    """
    asked = work_of(config, fed, there.mesh.size)

    def of(path: str) -> float | None:
        last = path.rsplit("/while", 1)[0]
        if "evaluation" in path:
            return None
        if last.endswith("local_training"):
            return asked.steps
        match = re.search(r"bucket_(\d+)_of_(\d+)$", last)
        if match is None:
            return None
        share = sum(asked.share[level] for level in groups[int(match[1])]) if int(match[1]) < len(groups) else 1.0
        return chunks(asked.items, share, int(match[2]))

    return of


def _compiled(name: str, program: Any, trips: schedule.Trips, *args: PyTree) -> Program:
    """Compile a program for these shapes, and read its memory and its schedule."""
    began = time.perf_counter()
    compiled = getattr(program, "jitted", program).lower(*args).compile()
    seconds = time.perf_counter() - began
    m = compiled.memory_analysis()
    used = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return Program(name, used / 1e6, seconds, schedule.read(compiled.as_text(), trips))


def describe(found: Plan) -> str:
    """A plan as text: fits or not, collectives, estimated time of a round, and its dearest operations."""
    rows = {"compiled for": f"{found.target}, {found.chips} chips; not run there, times are the compiler's estimates"}
    rows["buckets"] = found.buckets
    for program in (found.round, found.evaluation):
        moved = ", ".join(f"{kind} {size:,} B" for kind, size in program.schedule.collectives) or "none"
        verdict = "fits" if program.megabytes <= found.room else "DOES NOT FIT"
        rows[program.name] = (
            f"{verdict}: {program.megabytes:,.0f} of {found.room:,.0f} MB a chip; compiled in "
            f"{program.compile_seconds:,.1f} s; collectives: {moved}"
        )
    rows["a round"] = f"{found.milliseconds:,.3f} ms estimated, {found.utilisation:.2%} of the chips' bfloat16 rate"
    if once := sorted(set(found.round.schedule.once)):
        rows["counted once"] = f"{len(once)} loops of unknown length: {', '.join(path[-60:] for path in once)}"
    text = "\n".join(f"{name:15s}{value}" for name, value in rows.items())
    dear = "\n".join(f"{op.cycles:>14,.0f}  {op.shape:40s}  {op.path}" for op in found.round.schedule.dearest)
    return f"{text}\ndearest operations of a round (estimated cycles of all their runs)\n{dear}"
