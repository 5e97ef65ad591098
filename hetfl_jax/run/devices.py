"""Devices of a run: who has which, what they can afford, and the clock that a config asks for."""

import inspect
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hetfl_jax.core.types import Algorithm, Array, Config, Devices, Line, Population, Price
from hetfl_jax.data import devices as profiles
from hetfl_jax.data.devices import GENERATORS, MEGA, Profile, Times
from hetfl_jax.data.sources import DATA_FOLDER
from hetfl_jax.models.costs import Costs
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import afford
from hetfl_jax.parts.buffered import buffered
from hetfl_jax.parts.local import Local
from hetfl_jax.parts.pace import Rule, check_waits
from hetfl_jax.parts.simulate import simulated
from hetfl_jax.run.keys import KEYS

BUDGET = "budget"  #: the value of capacity.name


class Equipment(NamedTuple):
    """The devices of all clients, and when they are online."""

    profile: Profile
    times: Times | None


class Equipped(NamedTuple):
    """What devices make of a federation."""

    train: Population  #: with devices, and with the levels that clients can afford
    level: np.ndarray  #: [N]
    about: Line  #: for a run's folder
    notes: tuple[str, ...]  #: for people


def equipment_of(config: Config, size: np.ndarray, seed: int) -> Equipment | None:
    """The devices that a config asks for, ``None`` for none.

    Raises:
      ValueError: an unknown name, a file that does not fit the population, a value out of range.
    """
    _check_unused(config)
    block, clients = config.devices, size.size
    name, _, path = block.name.partition(":")
    if block.name == "none":
        return None
    check_waits(block.shift, block.spread)
    args = block.args.to_dict()
    if name == "csv" and path:
        if args:
            raise ValueError(f"argument {min(args)!r} of devices from a file: need none (devices.args)")
        return Equipment(profiles.read_table(_found(path), clients), _times(block.online, clients, seed))
    if block.name not in GENERATORS:
        raise ValueError(
            f"devices {block.name!r} is not one of none, {', '.join(GENERATORS)}, csv:<path> (devices.name)"
        )
    make = GENERATORS[block.name]
    known = [n for n, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if wrong := set(args) - set(known):
        raise ValueError(f"argument {min(wrong)!r} is not one of {', '.join(known)} of {block.name} (devices.args)")
    for key, value in args.items():
        kind = str if key == "mix" else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{key} {value!r}, allowed {'text' if kind is str else 'a number'} (devices.args.{key})")
    return Equipment(make(size, seed, **args), _times(block.online, clients, seed))


def _check_unused(config: Config) -> None:
    """Refuse what is said of devices that are none, and budgets that nobody asks for: they would do nothing."""
    block, capacity = config.devices, config.capacity
    if block.name == "none":
        for key, about in KEYS["devices"].items():
            given = block[key].to_dict() if key == "args" else block[key]
            if given != about.default:
                raise ValueError(f"{key} {given!r} of devices that are none: need devices.name (devices.{key})")
        if capacity.name == BUDGET:
            raise ValueError("capacity 'budget' of devices that are none: need devices.name (capacity.name)")
    for key in ("max_seconds", "max_mb", "max_memory_mb"):
        if capacity[key] and capacity.name != BUDGET:
            raise ValueError(f"{key} {capacity[key]:g} without a budget: need capacity.name=budget (capacity.{key})")


def _found(path: str) -> Path:
    """A file here, or in the folder of data."""
    there = Path(os.environ.get(DATA_FOLDER, "../shared/data")) / path
    return there if not Path(path).is_file() and there.is_file() else Path(path)


def _times(text: str, clients: int, seed: int) -> Times | None:
    name, _, rest = text.partition(":")
    if text == "always":
        return None
    if name == "csv" and rest:
        return profiles.read_times(_found(rest), clients)
    try:
        hours = float(rest) if name == "daily" else math.nan
    except ValueError:
        hours = math.nan
    if math.isnan(hours):
        raise ValueError(f"online {text!r}: allowed always, daily:<hours> or csv:<path> (devices.online)")
    return profiles.daily(clients, seed, hours)


def equipped(
    config: Config, equipment: Equipment, bare: Algorithm, fam: Family, price_of: Costs, settings: Local,
    names: tuple[str, ...], train: Population,
) -> Equipped:  # fmt: skip
    """The population with its devices, and what they can afford.

    Args:
      bare: the method without a clock, for what its items send.
      price_of: the levels' costs.

    Raises:
      ValueError: a budget that nobody meets, a deadline that everybody misses, or more first replies than clients.
    """
    profile, block = equipment.profile, config.devices
    speed, down, up = profile.macs_per_s, MEGA * profile.down_mbps, MEGA * profile.up_mbps
    size, price, level = np.asarray(train.size), price_or_plain(bare, price_of), np.asarray(train.level)
    seconds, able, about, notes = [
        afford.round_seconds(price_of, price, settings, size, speed / factor, down, up)
        for factor in (block.shift + block.spread, block.shift or 1e-30)
    ], np.ones(size.size, bool), dict[str, object](), list[str]()  # fmt: skip
    if config.capacity.name == BUDGET:
        budget = afford.Budget(*(_limit(config.capacity[f"max_{key}"]) for key in ("seconds", "mb", "memory_mb")))
        memory = afford.training_memory(fam, settings)
        found = afford.afforded(budget, price_of, price, memory, seconds[0], profile.memory_mb)
        level, able = found.level, found.able
        about = afford.saved(found, budget, memory, names)
        notes = [f"capacity: {sentence}" for sentence in afford.sentences(found, budget, names)]
    drawn = np.asarray(bare.drawn) if bare.drawn and config.capacity.name != BUDGET else np.zeros(0)
    own = seconds[0] @ (drawn / drawn.sum()) if drawn.size else seconds[0][np.arange(size.size), level]
    least = seconds[1].min(1) if drawn.size else seconds[1][np.arange(size.size), level]
    _check_limits(config, least / max(price.items, 1), able)
    notes.append(f"devices: a round is expected to take a client {_quantiles(own[able])} s")
    arrays = devices_as_arrays(equipment, () if able.all() else jnp.asarray(able), own)
    train = train._replace(level=jnp.asarray(level, jnp.int32), devices=arrays)
    return Equipped(train, level, about, tuple(notes))


def devices_as_arrays(equipment: Equipment, able: Array | tuple[()], seconds: np.ndarray) -> Devices:
    """Equipment as a round reads it; see ``Devices``."""
    profile, known = equipment
    speed, down, up, own = (
        jnp.asarray(v, jnp.float32)
        for v in (profile.macs_per_s, MEGA * profile.down_mbps, MEGA * profile.up_mbps, seconds)
    )
    online = () if known is None else tuple(jnp.asarray(v, jnp.float32) for v in known)
    return Devices(speed, down, up, able, online, own)


def _limit(value: float) -> float:
    return math.inf if value == 0 else value


def _quantiles(seconds: np.ndarray) -> str:
    low, middle, high = np.quantile(seconds, (0, 0.5, 1))
    return f"{low:.4g} to {high:.4g} (median {middle:.4g})"


def _check_limits(config: Config, least: np.ndarray, able: np.ndarray) -> None:
    """Refuse a deadline that everybody misses, and more first replies than a round has."""
    block, cohort = config.devices, config.method.args.get("cohort", able.size)
    if block.deadline < 0:
        raise ValueError(f"deadline {block.deadline:g}, allowed > 0, or 0 for none (devices.deadline)")
    fastest = int(np.where(able, least, np.inf).argmin())
    if block.deadline and least[fastest] > block.deadline:
        raise ValueError(
            f"deadline {block.deadline:g} s drops everybody: the fastest client, {fastest}, needs {least[fastest]:.4g}"
            " s (devices.deadline)"
        )
    if not 0 <= block.first <= cohort:
        raise ValueError(f"first {block.first} of a cohort of {cohort}, allowed 0..{cohort} (devices.first)")


def price_or_plain(algorithm: Algorithm, known: Costs) -> Price:
    """What an item sends and receives; of a method that does not say so, the model both ways."""
    return algorithm.price() if algorithm.price else Price(8 * known.bytes, 8 * known.bytes)


def timed(config: Config, algorithm: Algorithm, known: Costs, settings: Local, train: Population) -> Algorithm:
    """``algorithm`` with the config's clock, where the population has devices.

    Raises:
      ValueError: a value out of range, or a method that time cannot go through.
    """
    if not isinstance(train.devices, Devices):
        return algorithm
    block = config.devices
    rule = Rule(
        known.macs, price_or_plain(algorithm, known), settings, block.shift, block.spread, _limit(block.deadline),
        block.first,
    )  # fmt: skip
    if block.concurrency == 0:
        return simulated(algorithm, rule)
    return buffered(
        algorithm, rule, train, concurrency=block.concurrency, exponent=block.staleness_exponent,
        max_staleness=block.max_staleness, refill=block.refill,
    )  # fmt: skip
