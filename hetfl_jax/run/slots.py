"""What is chosen apart from the method: selection, codecs and capacity, by name from their blocks of a config."""

import inspect
from collections.abc import Callable, Mapping

from hetfl_jax.core.types import Config
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import adversary, codec, select
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.message import Codec
from hetfl_jax.parts.objective import OBJECTIVES, Objective
from hetfl_jax.run.keys import KEYS
from hetfl_jax.run.mix import Mix
from hetfl_jax.run.selections import selection_of

ADVERSARIES: Mapping[str, Callable[..., adversary.Adversary]] = {"pgd": adversary.pgd}
CAPACITIES = ("none", "fixed", "drawn")


def slots_of(config: Config, family: Family, mix: Mix, clients: int) -> Slots:
    """The slots that a config's blocks ``select``, ``uplink``, ``downlink`` and ``capacity`` fill.

    Raises:
      ValueError: an unknown name, or arguments that do not fit.
    """
    return Slots(
        select=selection_of(config, family, clients),
        capacity=_capacity(config.capacity.name, mix),
        uplink=_codec(config.uplink, "uplink", family),
        downlink=_codec(config.downlink, "downlink", family),
        objective=objective_of(config),
        adversary=_adversary(config.adversary),
        clients=clients,
    )


def objective_of(config: Config) -> Objective | None:
    """The objective that a config names; ``None`` for the default, which a method has in a form of its own.

    Raises:
      ValueError: an unknown name.
    """
    name = config.objective.name
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)} (objective.name)")
    return None if name == KEYS["objective"]["name"].default else OBJECTIVES[name]()


def _capacity(name: str, mix: Mix) -> select.Capacity | None:
    if name not in CAPACITIES:
        raise ValueError(f"capacity {name!r} is not one of {', '.join(CAPACITIES)} (capacity.name)")
    return {"none": None, "fixed": select.own_level(), "drawn": select.drawn_level(mix.proportions)}[name]


def _adversary(block: Config) -> adversary.Adversary | None:
    if block.name == "none":
        return None
    if block.name not in ADVERSARIES:
        raise ValueError(f"adversary {block.name!r} is not one of none, {', '.join(ADVERSARIES)} (adversary.name)")
    make, given = ADVERSARIES[block.name], block.args.to_dict()
    known = inspect.signature(make).parameters
    if wrong := set(given) - set(known):
        raise ValueError(f"argument {min(wrong)!r} is not one of {', '.join(known)} of {block.name} (adversary.args)")
    return make(**given)


def _codec(block: Config, where: str, family: Family) -> Codec | None:
    if block.name == "none":
        return None
    more = {name: block[name] for name in ("statistics", "extra") if name in block}
    feedback = "ef21" if block.ef21 else block.error_feedback
    try:
        return codec.make(block.name, family, error_feedback=feedback, **more, **block.args.to_dict())
    except ValueError as error:
        raise ValueError(str(error).replace("uplink.", f"{where}.")) from None
