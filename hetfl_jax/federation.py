"""From a config to a federation: data, capacity levels and method, all checked before anything compiles."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax import capacity, methods
from hetfl_jax.capacity import Costs, Family
from hetfl_jax.data import partition, preprocess, sources
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import batches, held_classes, joined, population
from hetfl_jax.models import build as build_net
from hetfl_jax.models.layers import active_channels
from hetfl_jax.parts.local import Local, local
from hetfl_jax.types import Algorithm, Population

SPLITS = ("iid", "shards", "dirichlet_per_class", "dirichlet_per_client", "natural")
RATES = {letter: 0.5**i for i, letter in enumerate("abcde")}  #: width of each level letter


class Mix(NamedTuple):
    """Capacity levels and how often each occurs."""

    letters: tuple[str, ...]
    widths: tuple[float, ...]  #: relative to the first, global level
    proportions: tuple[int, ...]
    global_rate: float


class Federation(NamedTuple):
    """Everything a run needs, on the host or the device."""

    algorithm: Algorithm
    family: Family
    local: Local
    mix: Mix
    costs: Costs
    train: Population
    train_batches: Population  #: the same examples in batches, for the statistics pass
    test: Population  #: the test set in batches, the validation set in batches, each client's own test share
    test_batches: int  #: how many of them are batches of the global test set
    validation_batches: int  #: how many after those are batches of the validation set
    labels: np.ndarray  #: of the training pool
    partition: Partition


def parse_mix(text: str) -> Mix:
    """A mix such as ``a1-b1-e2``: level letters with integer proportions, the global (largest) level first.

    Raises:
      ValueError: an unknown letter, a missing or zero proportion, a level above the global one, a repeated letter.

    >>> parse_mix("b1-e3").widths
    (1.0, 0.125)
    """
    parts = text.split("-") if text else []
    for part in parts:
        if part[:1] not in RATES:
            raise ValueError(f"level {part[:1]!r} in mix {text!r} is not one of {', '.join(RATES)} (family.mix)")
        if not part[1:].isdigit() or int(part[1:]) < 1:
            raise ValueError(
                f"part {part!r} in mix {text!r}: need a letter and a proportion >= 1, as in a1-b1 (family.mix)"
            )
    letters = tuple(part[0] for part in parts)
    if not letters or len(set(letters)) != len(letters):
        raise ValueError(f"mix {text!r}: need at least one level, each letter once (family.mix)")
    if above := [letter for letter in letters if letter < letters[0]]:
        raise ValueError(
            f"level {above[0]!r} in mix {text!r} is above the global level {letters[0]!r}, the first (family.mix)"
        )
    first = RATES[letters[0]]
    widths = tuple(RATES[letter] / first for letter in letters)
    return Mix(letters, widths, tuple(int(part[1:]) for part in parts), first)


def method_names() -> tuple[str, ...]:
    """Names of the method files."""
    return tuple(module.name for module in pkgutil.iter_modules(methods.__path__))


def build(config: Any) -> Federation:
    """The federation that a config describes.

    Raises:
      ValueError: any value that is out of range, named with what is allowed and where it stands.
    """
    if config.method.name not in method_names():
        raise ValueError(f"method {config.method.name!r} is not one of {', '.join(method_names())} (method.name)")
    mix = parse_mix(config.family.mix)
    args = config.method.args.to_dict()
    source = _source(config)
    part = split(config.data, source, config.run.seed)
    clients = part.size.size
    if not 1 <= args.get("cohort", 1) <= clients:
        raise ValueError(f"cohort of {args['cohort']} clients, allowed 1..{clients} (method.args.cohort)")
    settings = local(**{k: config.train[k] for k in _LOCAL})
    classes = int(max(source.y_train.max(), source.y_test.max())) + 1
    fam = _family(config, mix, source, classes)
    level = partition.levels_fixed(mix.proportions, clients)
    held = part.classes if part.classes is not None else held_classes(source.y_train[part.index], part.size, classes)
    if part.classes is not None and held.shape[1] < classes:
        held = np.pad(held, ((0, 0), (0, classes - held.shape[1])))
    # One pool on the device serves training, the statistics pass and all evaluation.
    empty = source.x_test[:0], source.y_test[:0]
    x_validation, y_validation = empty if source.y_validation is None else (source.x_validation, source.y_validation)
    x = jnp.asarray(np.concatenate([source.x_train, source.x_test, x_validation]))
    y = jnp.asarray(np.concatenate([source.y_train, source.y_test, y_validation]))
    train = population(x, y, part.index, part.size, level=level, levels=fam.levels, classes=held)
    test = _test(train, source, part, held, config.run.eval_batch_size)
    if "proportions" in method_arguments(config.method.name):
        args["proportions"] = mix.proportions
    return Federation(
        algorithm=make_method(config.method.name, fam, settings, args),
        family=fam,
        local=settings,
        mix=mix,
        costs=capacity.costs(fam),
        train=train,
        train_batches=batches(train, config.run.statistics_batch_size),
        test=test,
        test_batches=-(-len(source.y_test) // config.run.eval_batch_size),
        validation_batches=-(-len(y_validation) // config.run.eval_batch_size),
        labels=source.y_train,
        partition=part,
    )


_LOCAL = ("optimizer", "learning_rate", "batch_size", "epochs", "steps", "momentum", "weight_decay", "clip_norm",
          "milestones", "decay_factor", "round_decay")  # fmt: skip


def make_method(name: str, fam: Family, settings: Local, args: Mapping[str, Any]) -> Algorithm:
    """``make(family, local, **args)`` of a method file; arguments that do not fit are a ValueError."""
    make = importlib.import_module(f"hetfl_jax.methods.{name}").make
    allowed = method_arguments(name)
    required = {k for k, v in allowed.items() if v}
    if wrong := set(args) - set(allowed):
        raise ValueError(f"argument {min(wrong)!r} is not one of {', '.join(allowed)} of {name} (method.args)")
    if missing := required - set(args):
        raise ValueError(f"argument {min(missing)!r} of {name} is missing (method.args)")
    return make(fam, settings, **args)


def method_arguments(name: str) -> dict[str, bool]:
    """Keyword arguments of a method, and whether each is required."""
    signature = inspect.signature(importlib.import_module(f"hetfl_jax.methods.{name}").make)
    keywords = (p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY)
    return {p.name: p.default is p.empty for p in keywords}


def _source(config: Any) -> sources.Source:
    data = config.data
    options = data.options.to_dict()
    source = sources.load(data.source, clients=data.clients, seed=config.run.seed, writers=data.writers, **options)
    if data.examples:
        keep = np.random.default_rng(0).permutation(len(source.y_train))[: data.examples]
        writer = None if source.writer is None else source.writer[keep]
        source = source._replace(
            x_train=source.x_train[keep],
            y_train=source.y_train[keep],
            x_test=source.x_test[: data.examples],
            y_test=source.y_test[: data.examples],
            writer=writer,
        )
    return sources.hold_out(source, data.validation)


def split(data: Any, source: sources.Source, seed: int) -> Partition:
    """The partition that ``config.data`` asks for."""
    labels, clients = source.y_train, data.clients
    if data.split not in SPLITS:
        raise ValueError(f"split {data.split!r} is not one of {', '.join(SPLITS)} (data.split)")
    if data.split == "iid":
        return partition.iid(labels.size, clients, seed, source.y_test.size)
    if data.split == "shards":
        return partition.shards(labels, clients, data.classes_per_client, seed, source.y_test)
    if data.split == "natural":
        if source.writer is None:
            raise ValueError(
                f"source {data.source!r} has no client ids: split 'natural' needs data.writers=<npz>:<array>"
            )
        return partition.natural(source.writer, seed, data.test_fraction)
    return getattr(partition, data.split)(labels, clients, data.concentration, seed)


def net_fields(config: Any, mix: Mix, classes: int) -> dict[str, Any]:
    """Fields of the global model's net, by name; its hidden sizes are cut to the global level."""
    fields = config.family.to_dict()
    del fields["mix"]
    hidden = tuple(active_channels(width, mix.global_rate) for width in fields["hidden"])
    return {**fields, "hidden": hidden, "classes": classes}


def _family(config: Any, mix: Mix, source: sources.Source, classes: int) -> Family:
    image = source.x_train.ndim == 4
    prepare = (
        preprocess.images(config.data.mean, config.data.std, config.data.augment) if image else preprocess.features
    )
    example = jax.ShapeDtypeStruct((1, *source.x_train.shape[1:]), source.x_train.dtype)
    fields = net_fields(config, mix, classes)
    module = build_net(fields.pop("net"), **fields)
    return capacity.family(module, [{"width": width} for width in mix.widths], example, prepare)


def _test(train: Population, source: sources.Source, part: Partition, held: np.ndarray, batch: int) -> Population:
    """Batches of the test set, batches of the validation set, then the clients' own test shares, what there is."""
    first, end, classes = len(source.y_train), len(source.y_train) + len(source.y_test), held.shape[1]

    def in_batches(start: int, stop: int) -> Population:
        rows = np.arange(start, stop)
        whole = population(train.x, train.y, rows, np.array([rows.size]), classes=classes)
        return batches(whole, batch, order=np.arange(rows.size))

    test = in_batches(first, end)
    if len(train.y) > end:
        test = joined(test, in_batches(end, len(train.y)))
    if part.test_index is None or part.test_size is None or not part.test_size.any():
        return test
    some = part.test_size > 0
    own = part.test_index if part.held_out else part.test_index + first
    return joined(test, population(train.x, train.y, own, part.test_size[some], classes=held[some]))


def parse_buckets(text: str, mix: Mix) -> tuple[tuple[int, ...], ...]:
    """Which levels share a bucket: ``each``, or groups of letters such as ``a-b-cde``.

    Raises:
      ValueError: groups that do not name every level of the mix once.

    >>> parse_buckets("a-be", parse_mix("a1-b1-e1"))
    ((0,), (1, 2))
    """
    if text == "each":
        return ()
    groups = text.split("-")
    if sorted("".join(groups)) != sorted(mix.letters) or not all(groups):
        raise ValueError(
            f"buckets {text!r}: allowed 'each' or groups of {''.join(mix.letters)}, each once (train.buckets)"
        )
    return tuple(tuple(mix.letters.index(letter) for letter in group) for group in groups)
