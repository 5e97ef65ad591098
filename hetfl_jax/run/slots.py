"""What is chosen apart from the method: selection, codecs and capacity, by name from their blocks of a config."""

import inspect
from collections.abc import Callable, Mapping

from hetfl_jax.core.types import Algorithm, Config
from hetfl_jax.models.windows import Family
from hetfl_jax.parts import adversary, codec, select
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.message import Codec
from hetfl_jax.parts.objective import OBJECTIVES, Objective
from hetfl_jax.run.keys import KEYS
from hetfl_jax.run.mix import Mix
from hetfl_jax.run.selections import selection_of

ADVERSARIES: Mapping[str, Callable[..., adversary.Adversary]] = {"pgd": adversary.pgd}
CAPACITIES = ("none", "fixed", "drawn", "budget")


def slots_of(config: Config, family: Family, mix: Mix, clients: int) -> Slots:
    """What a config says apart from the method: selection, codecs, capacity, objective and adversary.

    A block whose name is ``none`` fills no slot.


    Args:
      clients: N.

    Raises:
      ValueError: an unknown name, or arguments that do not fit.
    """
    check_unused(config)
    return Slots(
        select=selection_of(config, family, clients),
        capacity=_capacity(config.capacity.name, mix),
        uplink=_codec(config.uplink, "uplink", family),
        downlink=_codec(config.downlink, "downlink", family),
        objective=objective_of(config),
        adversary=_adversary(config.adversary),
        clients=clients,
    )


def check_unused(config: Config) -> None:
    """Refuse what is said of a selection, codec or adversary that is none: it would do nothing.

    Raises:
      ValueError: with the key.

    >>> from hetfl_jax.run.config import changed
    >>> check_unused(changed(uplink=dict(error_feedback=True)))
    Traceback (most recent call last):
    ValueError: error_feedback of a uplink that is none: need uplink.name (uplink.error_feedback)
    """
    for block in ("select", "uplink", "downlink", "adversary"):
        if config[block].name != "none":
            continue
        if args := list(config[block].args):
            raise ValueError(f"argument {args[0]!r} of a {block} that is none: need {block}.name ({block}.args)")
        if config[block].get("error_feedback"):
            raise ValueError(f"error_feedback of a {block} that is none: need {block}.name ({block}.error_feedback)")


def check_whole(config: Config, algorithm: Algorithm, levels: int, clients: int) -> None:
    """Refuse what an algorithm of the user's, which is whole, does not take: slots, other levels or clients.

    Args:
      levels: of the config's mix.
      clients: of the split.

    Raises:
      ValueError: with the key.
    """
    if algorithm.levels != levels:
        raise ValueError(f"the algorithm has {algorithm.levels} levels, the mix {levels} (family.mix)")
    if algorithm.clients not in (0, clients):
        raise ValueError(f"the algorithm is for {algorithm.clients} clients, the split has {clients} (data.clients)")
    for block in ("select", "uplink", "downlink", "capacity", "adversary"):
        if (name := config[block].name) != "none":
            raise ValueError(f"an algorithm is whole, {block} {name!r} is not in it: need none ({block}.name)")
    own, wanted = algorithm.score.name, OBJECTIVES[config.objective.name]().score.name
    if own != wanted:
        raise ValueError(f"the algorithm is scored by {own}, the objective by {wanted} (objective.name)")


def objective_of(config: Config) -> Objective | None:
    """The objective that a config names; ``None`` for the default, which a method has in a form of its own.

    Raises:
      ValueError: an unknown name.

    >>> from hetfl_jax.run.config import changed
    >>> objective_of(changed()) is None, objective_of(changed(objective=dict(name="squared_error"))).score.name
    (True, 'rmse')
    """
    name = config.objective.name
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)} (objective.name)")
    return None if name == KEYS["objective"]["name"].default else OBJECTIVES[name]()


def _capacity(name: str, mix: Mix) -> select.Capacity | None:
    """Which level a client has in a round: its own (``fixed``), or drawn by the mix's proportions (``drawn``)."""
    if name not in CAPACITIES:
        raise ValueError(f"capacity {name!r} is not one of {', '.join(CAPACITIES)} (capacity.name)")
    own = select.own_level()
    return {"none": None, "fixed": own, "budget": own, "drawn": select.drawn_level(mix.proportions)}[name]


def _adversary(block: Config) -> adversary.Adversary | None:
    """The adversary that a block names, with its arguments.

    Raises:
      ValueError: an unknown name or argument.
    """
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
    """The codec of one direction, with its error feedback; messages name the keys of that direction's block."""
    if block.name == "none":
        return None
    more = {name: block[name] for name in ("statistics", "extra") if name in block}
    feedback = "ef21" if block.ef21 else block.error_feedback
    try:
        return codec.make(block.name, family, error_feedback=feedback, **more, **block.args.to_dict())
    except ValueError as error:
        raise ValueError(str(error).replace("uplink.", f"{where}.")) from None
