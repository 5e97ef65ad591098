"""The net of the global model, from a config's block ``family``."""

import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hetfl_jax import methods
from hetfl_jax.core.types import Config, Line, PyTree
from hetfl_jax.models import build
from hetfl_jax.models.adapter import adapt, not_understood
from hetfl_jax.models.layers import active_channels
from hetfl_jax.run.mix import Mix

RESCALES = ("none", "init", "layer", "both")


def check_call(module: nn.Module, x: jax.ShapeDtypeStruct) -> None:
    """Trace a net of the user's, initialised, evaluated and trained, before anything is built on it.

    What its call takes and nobody passes is told in a warning.

    Args:
      x: input of the net, one example.

    Raises:
      ValueError: in one line, what the net itself raises, or a result that is no array of outputs.
    """
    kind, net, key = type(module).__name__, adapt(module), jax.random.key(0)
    valid = jax.ShapeDtypeStruct(x.shape[:1], jnp.bool_)

    def traced(call: Callable[..., PyTree], *args: PyTree) -> PyTree:
        try:
            return jax.eval_shape(call, *args)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"net {kind} cannot read examples of shape {x.shape[1:]}: {type(error).__name__}: {why} (family.net)"
            ) from error

    variables = traced(net.init, key, x)
    for exit in traced(net.each_exit, variables, x):
        if not hasattr(exit, "ndim") or exit.ndim < 2 or not jnp.issubdtype(exit.dtype, jnp.floating):
            what = f"{exit.dtype}{list(exit.shape)}" if hasattr(exit, "ndim") else type(exit).__name__
            raise ValueError(f"net {kind} returns {what}: need floats [B, C], or a tuple of exits (family.net)")
    traced(lambda *a: net.apply(a[0], a[1], train=True, valid=a[2], key=a[3]), variables, x, valid, key)
    if "params" not in variables:
        raise ValueError(f"net {kind} has no parameters to train (family.net)")
    if other := sorted(set(variables) - {"params", "batch_stats"}):
        raise ValueError(f"net {kind} keeps {other[0]} besides params and batch_stats: leave it away (family.net)")
    if unknown := not_understood(module):
        warnings.warn(
            f"net {kind}: argument {unknown[0]!r} of its call keeps its default; passed are train, valid and capacity "
            "(family.net)",
            stacklevel=2,
        )


def net_fields(config: Config, mix: Mix, classes: int) -> Line:
    """Fields of the global model's net, by name; its sizes, a net's own ones too, are cut to the global level.

    Args:
      classes: outputs.

    Raises:
      ValueError: an unknown rescaling, or a layer without units.

    >>> from hetfl_jax.run.config import changed
    >>> from hetfl_jax.run.mix import parse_mix
    >>> net_fields(changed(family=dict(net="mlp", hidden=(64,))), parse_mix("b1-c1"), 10)["hidden"]  # b: half of 64
    (32,)
    """
    family = config.family
    if any(width < 1 for width in family.hidden):
        raise ValueError(f"hidden {tuple(family.hidden)}, allowed widths >= 1 (family.hidden)")
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
    """What a net has where the config says nothing; nothing where it has no such field.

    >>> _own("mlp", "hidden"), _own("mlp", "embedding")
    ((200,), ())
    """
    return getattr(build(name), field, ()) if ":" not in name else ()


def net_of(config: Config, mix: Mix, classes: int, given: Any) -> nn.Module:
    """The global model's net: the user's, or by name.

    Args:
      given: the user's linen module, or ``None``.

    Raises:
      ValueError: a net that there is not, or a rescaling of one that has none.
    """
    if given is not None:
        if not isinstance(given, nn.Module):
            what = "the class, not an instance: Net()" if isinstance(given, type) else f"a {type(given).__name__}"
            raise ValueError(f"net is {what}: need a linen module, of nnx through flax.nnx.bridge.to_linen (net)")
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
