"""Configs: a locked ConfigDict of five blocks, with every value standing in its file."""

from typing import Any

import ml_collections

BLOCKS = ("data", "family", "method", "train", "run")


def blocks(**given: Any) -> ml_collections.ConfigDict:
    """A locked config of exactly the five blocks.

    Raises:
      ValueError: a block that is missing or unknown.

    >>> blocks(data={}, family={}, method={}, train=dict(rounds=3), run={}).train.rounds
    3
    """
    if set(given) != set(BLOCKS):
        raise ValueError(f"config blocks {', '.join(given)}: need exactly {', '.join(BLOCKS)}")
    return ml_collections.ConfigDict(given).lock()


def parse_arg(arg: str, **defaults: Any) -> ml_collections.ConfigDict:
    """The argument string of a config, ``key=value,key`` typed by the defaults; a bare key of a bool means true.

    Raises:
      ValueError: a key that has no default, or a value of another type.

    >>> parse_arg("mix=a1-e1,quick", mix="a1", quick=False).to_dict()
    {'mix': 'a1-e1', 'quick': True}
    """
    values = dict(defaults)
    for part in filter(None, arg.split(",")):
        key, has_value, text = part.partition("=")
        if key not in defaults:
            raise ValueError(f"config argument {key!r} is not one of {', '.join(defaults)} (in {arg!r})")
        kind = type(defaults[key])
        if kind is bool:
            if text.lower() not in ("", "true", "false"):
                raise ValueError(f"config argument {key}={text}: allowed true or false")
            values[key] = text.lower() != "false"
            continue
        try:
            values[key] = kind(text) if has_value else _fail()
        except ValueError:
            raise ValueError(f"config argument {part!r}: {key} takes a value of type {kind.__name__}") from None
    return ml_collections.ConfigDict(values)


def _fail() -> Any:
    raise ValueError


def shrink(config: ml_collections.ConfigDict, **train: Any) -> ml_collections.ConfigDict:
    """The ``quick`` version of a config: the same code paths on few clients and rounds, for a smoke run on a CPU."""
    config.data.clients = min(config.data.clients, 10)
    config.data.examples = 400
    config.family.hidden = tuple(min(16, width) for width in config.family.hidden)
    config.method.args.cohort = min(config.method.args.cohort, 4)
    config.train.update(dict(rounds=2, epochs=1, **train))
    config.run.update(dict(name=f"{config.run.name}_quick", eval_every=1, checkpoint_every=1))
    return config
