"""What is chosen apart from the method: selection, codecs and capacity, by name from their blocks of a config."""

import inspect
from collections.abc import Callable, Mapping

from hetfl_jax.core.types import Config
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import choose, codec, explore, select
from hetfl_jax.parts.codec import Codec
from hetfl_jax.parts.compose import Slots
from hetfl_jax.run.mix import Mix

CAPACITIES = ("none", "fixed", "drawn")
SELECTIONS: Mapping[str, Callable[..., select.Select]] = {
    "uniform": select.uniform,
    "weighted": choose.weighted,
    "random_with_replacement": choose.random_with_replacement,
    "power_of_choice": choose.power_of_choice,
    "active": explore.active,
    "oort": explore.oort,
}


def slots_of(config: Config, family: Family, mix: Mix, clients: int) -> Slots:
    """The slots that a config's blocks ``select``, ``uplink``, ``downlink`` and ``capacity`` fill.

    Raises:
      ValueError: an unknown name, or arguments that do not fit.
    """
    return Slots(
        select=_selection(config, clients),
        capacity=_capacity(config.capacity.name, mix),
        uplink=_codec(config.uplink, "uplink", family),
        downlink=_codec(config.downlink, "downlink", family),
        clients=clients,
    )


def _selection(config: Config, clients: int) -> select.Select | None:
    name, args = config.select.name, config.select.args.to_dict()
    if name == "none":
        return None
    if name not in SELECTIONS:
        raise ValueError(f"selection {name!r} is not one of none, {', '.join(SELECTIONS)} (select.name)")
    make = SELECTIONS[name]
    known = inspect.signature(make).parameters
    told = {"cohort": config.method.args.get("cohort", 10), "clients": clients, "rounds": config.train.rounds}
    given = {**{k: v for k, v in told.items() if k in known}, **args}
    if wrong := set(given) - set(known):
        raise ValueError(f"argument {min(wrong)!r} is not one of {', '.join(known)} of {name} (select.args)")
    if missing := {k for k, p in known.items() if p.default is p.empty} - set(given):
        raise ValueError(f"argument {min(missing)!r} of {name} is missing (select.args)")
    return make(**given)


def _capacity(name: str, mix: Mix) -> select.Capacity | None:
    if name not in CAPACITIES:
        raise ValueError(f"capacity {name!r} is not one of {', '.join(CAPACITIES)} (capacity.name)")
    return {"none": None, "fixed": select.own_level(), "drawn": select.drawn_level(mix.proportions)}[name]


def _codec(block: Config, where: str, family: Family) -> Codec | None:
    if block.name == "none":
        return None
    return codec.make(block.name, family, error_feedback=block.error_feedback, **block.args.to_dict())
