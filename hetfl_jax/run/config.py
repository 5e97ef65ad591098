"""Configs: defaults once, files that state differences, and every key settable on every config."""

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import hetfl_jax
from hetfl_jax import methods
from hetfl_jax.core.types import Algorithm, Arguments, Config, Line
from hetfl_jax.run.keys import KEYS, defaults
from hetfl_jax.run.values import fitted

#: what a method is told by the federation, and no config says
TOLD = ("proportions", "clients", "clients_per_level", "base_width", "population")
FREE = ("options", "args", "optimizer_args")  #: keys whose value is a dict
#: dicts of anything
ANYTHING = ("data.options", "select.args", "uplink.args", "downlink.args", "adversary.args", "devices.args",
            "train.optimizer_args")  # fmt: skip


def changed(**blocks: Arguments) -> Config:
    """The default config with some values of its blocks changed: what a config file returns.

    Args:
      blocks: values by key, for each block, e.g. ``train=dict(rounds=3)``.

    Raises:
      ValueError: a block or a key that there is not, or a value of another kind.

    >>> changed(train=dict(rounds=3)).train.rounds
    3
    >>> changed(train=dict(round=3))
    Traceback (most recent call last):
    ValueError: config key 'train.round' is not one of rounds, epochs, steps, ...
    """
    return _with(blocks).lock()


def _with(blocks: Mapping[str, Arguments]) -> Config:
    """The default config with the values of some keys."""
    config = defaults()
    if not isinstance(blocks, Mapping):
        raise ValueError(
            f"config is a {type(blocks).__name__}: allowed a name, a file, a ConfigDict or a dict of blocks"
        )
    for block, values in blocks.items():
        if block not in KEYS:
            raise ValueError(f"config block {block!r} is not one of {', '.join(KEYS)}")
        for key, value in fitted(values, {}, block).items():
            if key not in KEYS[block]:
                raise ValueError(f"config key '{block}.{key}' is not one of {', '.join(KEYS[block])} of {block}")
            value = fitted(value, KEYS[block][key].default, f"{block}.{key}", KEYS[block][key].of)
            config[block][key] = ml_collections.ConfigDict(value) if key in FREE else value
    return config


def parse_arg(arg: str, **defaults: Any) -> Config:
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
            values[key] = kind(text if has_value else None)
        except (ValueError, TypeError):
            raise ValueError(f"config argument {part!r}: {key} takes a value of type {kind.__name__}") from None
    return ml_collections.ConfigDict(values)


def shrink(config: ml_collections.ConfigDict, **train: Config) -> Config:
    """The ``quick`` version of a config: the same code on few clients, images and rounds; it learns in seconds.

    Args:
      train: values of the block ``train`` that differ from 10 rounds of 2 epochs.

    >>> quick = shrink(changed(data=dict(clients=100)).unlock())
    >>> quick.data.clients, quick.train.rounds, quick.run.name
    (10, 10, 'run_quick')
    """
    config.data.clients = min(config.data.clients, 10)
    config.data.examples = 1_000
    config.family.hidden = tuple(min(16, width) for width in config.family.hidden)
    if "cohort" in config.method.args:  # of some methods all clients take part
        config.method.args.cohort = min(config.method.args.cohort, 5)
    config.train.update(dict(rounds=10, epochs=2, milestones=()) | train)
    parts = config.family.mix.split("-")
    by_width = len(parts) > 1 and not any(part[:1].isdigit() for part in parts)
    # One evaluation program for all widths: compiling is most of what a short run takes.
    config.run.update(dict(name=f"{config.run.name}_quick", eval_every=2, checkpoint_every=5, eval_masked=by_width))
    return config


def say(text: str) -> None:
    """Tell the user, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def complete(config: Config, tell: Callable[[str], None] = say, method: Any = None) -> Config:
    """A config with every key there is, and with the arguments of its method: what it lacks takes its default.

    Arguments of another method are dropped and told in one line. A config of an older version, or a plain dict, is
    completed likewise.

    Args:
      config: a ``ConfigDict`` or a dict of blocks; it is not changed.
      tell: gets that line.
      method: in place of the config's: a name or a ``make``; an ``Algorithm`` has no arguments.

    Raises:
      ValueError: a block or key that there is not, or a value of another kind.

    >>> complete({"method": {"name": "fedprox"}}).method.args.proximal_weight > 0
    True
    """
    if not (method is None or isinstance(method, str | Algorithm) or callable(method)):
        raise ValueError(f"method is a {type(method).__name__}: need a name, a make, or an Algorithm (method)")
    whole = _with(config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config)
    make = methods.find(method or whole.method.name) if isinstance(method, str | None) else method
    if callable(make):
        known = method_defaults(make)
        args = whole.method.args.to_dict()
        if dropped := [name for name in args if name not in known]:
            tell(f"hetfl: {method_name(whole, method)} has no argument {', '.join(dropped)}: dropped (method.args)")
        args = {name: fitted(args.get(name, v), v, f"method.args.{name}") for name, v in known.items()}
        whole.method.args = ml_collections.ConfigDict(args)
    return whole.lock()


def method_name(config: Config, method: Any = None) -> str:
    """What the method is called: a ``make`` of the user's by its module, unless that is the program itself.

    >>> method_name(changed(method=dict(name="ifca"))), method_name(None, lambda family, local: None)
    ('ifca', 'hetfl_jax.run.config')
    """
    if method is None or isinstance(method, str):
        return str(method or config.method.name)
    module = getattr(method, "__module__", "") if callable(method) else ""
    return module if module not in ("", "__main__") else "your method"


def method_defaults(make: methods.Make) -> Line:
    """Arguments of a method with their defaults, without those that the federation tells it.

    Args:
      make: ``make(family, local, *, ...)``; a required argument takes the default of ``KEYS``, else ``None``.

    >>> from hetfl_jax.methods import fedavg
    >>> list(method_defaults(fedavg.make)), method_defaults(fedavg.make)["cohort"]
    (['cohort', 'server_optimizer'], 10)
    """
    found: Line = {}
    for name, parameter in methods.arguments(make).items():
        if name not in TOLD:
            required = parameter.default is inspect.Parameter.empty
            value = KEYS["method"]["args"].default.get(name) if required else parameter.default
            found[name] = dict(value) if isinstance(value, Mapping) else value
    return found


def find_config(name: str) -> Path:
    """The file of a config: a path, or the name of one that comes with the package.

    Args:
      name: the suffix ``.py`` may be left out.

    Raises:
      FileNotFoundError: there is none, with the names that are near.

    >>> find_config("fedavg_mnist").name
    'fedavg_mnist.py'
    >>> find_config("fedavg_mnst")
    Traceback (most recent call last):
    FileNotFoundError: no config file fedavg_mnst, nor one of that name with the package: fedavg_mnist, ...
    """
    package = Path(hetfl_jax.__file__).parent
    folders = (package / "configs", package.parent / "configs")
    places = [Path(name), *(folder / f"{name.removesuffix('.py')}.py" for folder in folders)]
    for place in places:
        if place.is_file():
            return place
    near = difflib.get_close_matches(name.removesuffix(".py"), config_names(), 3, 0.4) or config_names()
    raise FileNotFoundError(
        f"no config file {name}, nor one of that name with the package: {', '.join(near)} (--config)"
    )


def config_names() -> list[str]:
    """Names of the configs that come with the package, sorted.

    >>> "heterofl_digits" in config_names()
    True
    """
    package = Path(hetfl_jax.__file__).parent
    found = {path.stem for folder in (package, package.parent) for path in (folder / "configs").glob("*.py")}
    return sorted(name for name in found if not name.startswith("_"))


def load_config(target: str = "heterofl_digits", *changes: str, tell: Callable[[str], None] = say) -> Config:
    """The config that a file and changes of single values describe, complete and locked.

    Args:
      target: a file or a name, with arguments of the config after a colon: ``heterofl_digits:mix=a1-e1``.
      changes: ``block.key=value``, e.g. ``train.rounds=3``; the command line's ``--config.train.rounds=3`` is the same.
      tell: gets a line on arguments of another method, which are dropped.

    Raises:
      ValueError: an unknown key, or a value of another type.
      FileNotFoundError: no such config.

    >>> load_config("heterofl_digits:mix=a1-e1", "train.rounds=3").train.rounds
    3
    """
    name, _, arg = target.partition(":")
    given = [change.removeprefix("--config.") for change in changes]
    config = _from_file(find_config(name), arg)
    for change in given:
        if change.startswith("method.name="):
            with config.unlocked():
                config.method.name = change.partition("=")[2]
    config = complete(config, tell)
    for change in given:
        check_key(config, change.partition("=")[0])
    return _overridden(config, given)


def _from_file(path: Path, arg: str) -> Config:
    """What ``get_config`` of a file returns; of a plain dict of blocks, the config that it describes.

    Raises:
      ValueError: a file that cannot be read, has no ``get_config``, or takes no arguments and gets some.
    """
    spec = importlib.util.spec_from_file_location("hetfl_jax_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"config {path} cannot be read: {type(error).__name__}: {why} (--config)") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config (--config)")
    takes = inspect.signature(module.get_config).parameters
    if arg and not takes:
        raise ValueError(f"config {path} takes no arguments, {arg!r} given (--config)")
    config = module.get_config(arg) if takes else module.get_config()
    return config if isinstance(config, ml_collections.ConfigDict) else _with(config)


def _overridden(config: Config, changes: Sequence[str]) -> Config:
    """Values set by text, typed as they are in the config.

    Args:
      changes: ``block.key=value``; a tuple is written ``(1,2)``.

    Raises:
      ValueError: a change without a value, an unknown key, or a text that is not of the key's kind.

    >>> _overridden(changed(), ["train.rounds=3", "train.milestones=(1,2)"]).train.milestones
    (1, 2)
    """
    for change in changes:
        if "=" not in change:
            raise ValueError(f"--config.{change} has no value: --config.{change}=VALUE")
    values = flags.FlagValues()
    arguments = ["hetfl", *(f"--config.{change}" for change in changes)]
    try:
        holder = config_flags.DEFINE_config_dict(
            "config", config.unlock(), flag_values=values, sys_argv=arguments, lock_config=False,
            accept_new_attributes=True,
        )  # fmt: skip
        values(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return holder.value.lock()


def check_key(config: Config, name: str) -> None:
    """Refuse a ``block.key`` that names no value of the config; below a dict of anything there may be new ones.

    Raises:
      ValueError: with the part that is unknown, and those that are known.

    >>> check_key(defaults(), "data.options.length")
    >>> check_key(defaults(), "train.optimiser")
    Traceback (most recent call last):
    ValueError: unknown config key 'train.optimiser': 'optimiser' is not one of batch_size, ...
    """
    place, above = config, ""
    for key in name.split("."):
        if not hasattr(place, "keys") or key not in place:
            if above in ANYTHING or above.startswith("method.args."):
                return
            allowed = ", ".join(place.keys()) if hasattr(place, "keys") else "nothing below it"
            where = f" (below {above})" if above else ""
            raise ValueError(f"unknown config key {name!r}: {key!r} is not one of {allowed}{where}")
        place, above = place[key], f"{above}.{key}".lstrip(".")


def as_text(config: Config) -> str:
    """A resolved config with the meaning of every key, as ``hetfl config`` prints it.

    >>> next(line.split() for line in as_text(defaults()).splitlines() if "learning_rate" in line)
    ['learning_rate', '0.1', '#', 'of', 'clients,', '>', '0']
    """
    lines = []
    for block, keys in KEYS.items():
        lines.append(f"{block}:")
        for key, about in keys.items():
            value = config[block][key]
            shown = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
            lines.append(f"  {key:22s}{shown!r:32s}  # {about.meaning}")
    return "\n".join(lines)
