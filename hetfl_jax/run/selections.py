"""Selections by name, as ``config.select`` asks for them; whether one fits is known before anything compiles."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hetfl_jax.core import machine
from hetfl_jax.core.types import Algorithm, Array, Config, Devices, Line, Needs, Population, PyTree, Tally
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import choose, diverse, explore, select, value

SELECTIONS: Mapping[str, Callable[..., select.Select]] = {
    "uniform": select.uniform,
    "weighted": choose.weighted,
    "random_with_replacement": choose.random_with_replacement,
    "power_of_choice": choose.power_of_choice,
    "loss_and_data": value.loss_and_data,
    "active": explore.active,
    "oort": explore.oort,
    "divfl": diverse.divfl,
    "intermittent": choose.intermittent,
    "in_time": choose.in_time,
}
#: selections around another one, which their argument ``of`` names; what they do not know is the inner one's
WRAPPERS = ("intermittent", "in_time")
MENTIONED = 1e6  #: bytes from which on a run says what its selection needs


def selection_of(config: Config, family: Family, clients: int) -> select.Select | None:
    """The selection that ``config.select`` names, ``None`` for the method's own.

    Cohort, number of clients, rounds and parameters come from the config where the selection has arguments of that
    name.

    Raises:
      ValueError: an unknown name, or arguments that do not fit the selection or the population.
    """
    name, args = config.select.name, config.select.args.to_dict()
    if name == "none":
        return None
    parameters = sum(leaf.size for leaf in jax.tree.leaves(family.shapes[0]["params"]))
    told = {
        "cohort": config.method.args.get("cohort", 10),
        "clients": clients,
        "rounds": config.train.rounds,
        "parameters": parameters,
        "by_speed": config.devices.name != "none",
        "limit": config.devices.deadline,
    }
    rule = _made(name, args, told)
    _try(rule, clients, parameters, devices=config.devices.name != "none")
    return rule


def _made(name: str, args: Line, told: Line) -> select.Select:
    """The selection of a name, with what it is told and its arguments; one around another makes the inner one first.

    >>> _made("power_of_choice", {"candidates": 4, "speed": 2}, {"cohort": 2})
    Traceback (most recent call last):
    ValueError: argument 'speed' is not one of cohort, candidates... of power_of_choice (select.args)
    """
    if name not in SELECTIONS:
        raise ValueError(f"selection {name!r} is not one of none, {', '.join(SELECTIONS)} (select.name)")
    make = SELECTIONS[name]
    known = inspect.signature(make).parameters
    if name in WRAPPERS:
        inner = args.pop("of", None)
        allowed = ", ".join(other for other in SELECTIONS if other not in WRAPPERS)
        if inner is None or inner in WRAPPERS:
            raise ValueError(f"{name} of {inner!r}, allowed {allowed} (select.args.of)")
        own = {key: value for key, value in told.items() if key in known}
        own |= {key: args.pop(key) for key in list(args) if key in known}
        return make(_made(inner, args, told), **own)
    given = {**{key: value for key, value in told.items() if key in known}, **args}
    if wrong := set(given) - set(known):
        raise ValueError(f"argument {min(wrong)!r} is not one of {', '.join(known)} of {name} (select.args)")
    if missing := {key for key, p in known.items() if p.default is p.empty} - set(given):
        raise ValueError(f"argument {min(missing)!r} of {name} is missing (select.args)")
    return make(**given)


class _Nobody:
    """An ``Ask`` for shapes."""

    def __init__(self, parameters: int) -> None:
        """Of a model with so many parameters."""
        self.parameters = parameters

    def __call__(self, ids: Array, *_: Any, **__: Any) -> Tally:
        """[K] zeros."""
        return Tally(*[jnp.zeros(ids.shape)] * 3)

    def gradients(
        self, ids: Array, valid: Array | None = None, of: Callable[[Array], PyTree] | None = None, numbers: int = 0
    ) -> PyTree:
        """[K, P] zeros, or what ``of`` makes of them."""
        rows = jnp.zeros((*ids.shape, self.parameters))
        return rows if of is None else jax.vmap(of)(rows)


def _try(rule: select.Select, clients: int, parameters: int, devices: bool) -> None:
    """Choose once without computing: what a selection refuses of this population, it refuses here.

    Args:
      clients: N.
      parameters: entries of the full model, the length of a gradient.
      devices: whether clients have some.
    """

    def once(key: Array) -> PyTree:
        size = jnp.ones(clients, jnp.int32)
        everybody = Population(None, None, None, None, size, jnp.zeros(clients, jnp.int32), None)  # type: ignore[arg-type]
        if devices:
            one = jnp.ones(clients)
            everybody = everybody._replace(devices=Devices(one, one, one, seconds=one))
        return rule.choose(key, jnp.int32(0), rule.init(clients), everybody, _Nobody(parameters))

    jax.eval_shape(once, jax.random.key(0))


def check_memory(algorithm: Algorithm) -> Needs:
    """What the selection of a method needs at the server, in bytes and words.

    Raises:
      ValueError: more than the device has, with what would do.
    """
    needs = algorithm.price().needs if algorithm.price else Needs()
    has = machine.device_memory()
    if needs.bytes > has:
        raise ValueError(
            f"the selection needs {needs.bytes / 1e6:,.1f} MB for {needs.what}, the device has {has / 1e6:,.1f} MB: "
            f"use {needs.instead} (select.name)"
        )
    return needs


def sentences(needs: Needs, least: float = MENTIONED) -> list[str]:
    """What people should know of a selection before it runs: its note, and its memory from ``least`` bytes on.

    >>> sentences(Needs(2_000_000, "two numbers a client", "uniform"))
    ['needs 2.0 MB at the server for two numbers a client; with less: uniform']
    """
    found = [needs.note] if needs.note else []
    if needs.bytes and needs.bytes >= least:
        size = f"needs {needs.bytes / 1e6:,.1f} MB at the server for {needs.what}"
        found.append(f"{size}; with less: {needs.instead}")
    return found
