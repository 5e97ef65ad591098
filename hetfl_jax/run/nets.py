"""The net of the global model, from a config's block ``family``."""

from typing import Any

import flax.linen as nn

from hetfl_jax import methods
from hetfl_jax.core.types import Config, Line
from hetfl_jax.models import build
from hetfl_jax.models.layers import active_channels
from hetfl_jax.run.mix import Mix

RESCALES = ("none", "init", "layer", "both")


def net_fields(config: Config, mix: Mix, classes: int) -> Line:
    """Fields of the global model's net, by name; its sizes, a net's own ones too, are cut to the global level.

    Raises:
      ValueError: an unknown rescaling.
    """
    family = config.family
    fields: Line = {name: family[name] for name in ("net", "norm", "scaler", "lowering")}
    if hidden := family.hidden or (_own(family.net, "hidden") if mix.global_rate < 1 else ()):
        fields["hidden"] = tuple(active_channels(width, mix.global_rate) for width in hidden)
    if embedding := family.embedding or (_own(family.net, "embedding") if mix.global_rate < 1 else 0):
        fields["embedding"] = active_channels(embedding, mix.global_rate)
    fields |= {name: family[name] for name in ("heads", "length") if family[name]}
    fields |= {"dropout": family.dropout} if family.dropout >= 0 else {}
    fields |= {} if family.exits else {"exits": False}
    if family.rescale not in RESCALES:
        raise ValueError(f"rescale {family.rescale!r} is not one of {', '.join(RESCALES)} (family.rescale)")
    for part in ("init", "layer"):
        fields |= {f"{part}_rate": mix.global_rate} if family.rescale in (part, "both") else {}
    return {**fields, "classes": classes}


def _own(name: str, field: str) -> Any:
    """What a net has where the config says nothing; nothing where it has no such field."""
    return getattr(build(name), field, ()) if ":" not in name else ()


def net_of(config: Config, mix: Mix, classes: int, given: Any) -> nn.Module:
    """The global model's net: the user's, or by name.

    Raises:
      ValueError: a net that there is not, or a rescaling of one that has none.
    """
    if given is not None:
        if config.family.rescale != "none":
            raise ValueError(f"rescale {config.family.rescale!r} of a net that is given: need none (family.rescale)")
        return given
    fields = net_fields(config, mix, classes)
    name = fields.pop("net")
    if ":" not in name:
        return build(name, **fields)
    module, _, cls = name.partition(":")
    found = methods.load(module, cls)
    if found is None:
        raise ValueError(f"net {name!r}: no {cls} in a module {module} (family.net)")
    known = found.__dataclass_fields__
    if lost := [field for field in fields if field.endswith("_rate") and field not in known]:
        raise ValueError(f"rescale {config.family.rescale!r} of net {name!r}, without {lost[0]} (family.rescale)")
    return found(**{field: value for field, value in fields.items() if field in known})
