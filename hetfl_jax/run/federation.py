"""From a config to a federation: data, capacity levels and method, all checked before anything compiles."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax import methods
from hetfl_jax.core.types import Algorithm, Population, Views
from hetfl_jax.data import partition, preprocess, sources
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import batches, held_classes, joined, population
from hetfl_jax.data.views import renamings, rotations
from hetfl_jax.models import build as build_net
from hetfl_jax.models import families, windows
from hetfl_jax.models.costs import Costs, costs
from hetfl_jax.models.layers import active_channels
from hetfl_jax.models.windows import Family
from hetfl_jax.parts.local import Local, local

SPLITS = ("iid", "shards", "dirichlet_per_class", "dirichlet_per_client", "natural", "per_group")
RATES = {letter: 0.5**i for i, letter in enumerate("abcde")}  #: width of each level letter


class Mix(NamedTuple):
    """Capacity levels and how often each occurs, the global (largest) one first."""

    letters: tuple[str, ...]  #: name of each level, e.g. ``b``, ``3`` or ``b3``
    widths: tuple[float, ...]  #: relative to the global level
    proportions: tuple[int, ...]
    global_rate: float
    depths: tuple[int, ...] = ()  #: of each level, where levels have one


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
    groups: np.ndarray | None = None  #: [N] which clients see their examples alike, where there are views
    test_groups: np.ndarray | None = None  #: [test and validation batches] the same


_PART = re.compile(r"([a-z])?(?:(\d+)x)?(\d+)")


def parse_mix(text: str) -> Mix:
    """A mix such as ``a1-b1-e2``: levels with integer proportions, the global (largest) level first.

    A level is a width letter, a depth (``4x1-3x1``: depth 4 and 3, once each), or both (``a4x1-b2x3``).

    Raises:
      ValueError: an unknown letter, a missing or zero proportion, a level above the global one, a repeated level.

    >>> parse_mix("b1-e3").widths, parse_mix("a4x1-b2x1").depths
    ((1.0, 0.125), (4, 2))
    """
    parts = text.split("-") if text else []
    found = []
    for part in parts:
        if part[:1].isalpha() and part[0] not in RATES:
            raise ValueError(f"level {part[:1]!r} in mix {text!r} is not one of {', '.join(RATES)} (family.mix)")
        match = _PART.fullmatch(part)
        if not match or int(match[3]) < 1 or match[2] == "0" or not (match[1] or match[2]):
            raise ValueError(
                f"part {part!r} in mix {text!r}: need a level and a proportion >= 1, as in a1-b1 or 4x1 (family.mix)"
            )
        found.append((match[1] or "", int(match[2] or 0), int(match[3])))
    letters = tuple(f"{letter}{depth or ''}" for letter, depth, _ in found)
    if not letters or len(set(letters)) != len(letters):
        raise ValueError(f"mix {text!r}: need at least one level, each level once (family.mix)")
    kinds = {(bool(letter), bool(depth)) for letter, depth, _ in found}
    if len(kinds) > 1:
        raise ValueError(f"mix {text!r}: levels differ in width, in depth or in both, all alike (family.mix)")
    above = [name for name, (letter, depth, _) in zip(letters, found) if letter < found[0][0] or depth > found[0][1]]
    if above:
        raise ValueError(
            f"level {above[0]!r} in mix {text!r} is above the global level {letters[0]!r}, the first (family.mix)"
        )
    first = RATES.get(found[0][0], 1.0)
    widths = tuple(RATES.get(letter, 1.0) / first for letter, _, _ in found)
    depths = tuple(depth for _, depth, _ in found) if found[0][1] else ()
    return Mix(letters, widths, tuple(count for *_, count in found), first, depths)


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
    classes = _classes(source, config.family.get("outputs", 0))
    fam = _family(config, mix, source, classes)
    settings = local_training(config.train, fam)
    level = (partition.levels_by_id if mix.depths else partition.levels_fixed)(mix.proportions, clients)
    held = part.classes if part.classes is not None else held_classes(source.y_train[part.index], part.size, classes)
    if part.classes is not None and held.shape[1] < classes:
        held = np.pad(held, ((0, 0), (0, classes - held.shape[1])))
    # One pool on the device serves training, the statistics pass and all evaluation.
    empty = source.x_test[:0], source.y_test[:0]
    x_validation, y_validation = empty if source.y_validation is None else (source.x_validation, source.y_validation)
    views, groups = views_of(config.data.groups, source, clients, classes)
    if views is not None:
        seen_as = np.asarray(views.labels)[np.repeat(groups, part.size), source.y_train[part.index]]
        held = held_classes(seen_as, part.size, classes)
    if settings.full_batch and part.size.max() > settings.batch_size:
        raise ValueError(
            f"full_batch with batch_size {settings.batch_size}, but a client holds {part.size.max()} examples "
            "(train.full_batch, batch_size)"
        )
    x = jnp.asarray(np.concatenate([source.x_train, source.x_test, x_validation]))
    y = jnp.asarray(np.concatenate([source.y_train, source.y_test, y_validation]))
    train = population(
        x, y, part.index, part.size, level=level, levels=fam.levels, classes=held, **_seen(views, groups)
    )
    test, batched = _test(train, source, part, held, config.run.eval_batch_size)
    told = {
        "proportions": mix.proportions,
        "clients": clients,
        "clients_per_level": np.bincount(level, minlength=fam.levels).tolist(),
    }
    if args.get("mean_examples"):  # a switch in configs, a number for the method
        args["mean_examples"] = float(part.size.mean())
    args |= {name: value for name, value in told.items() if name in method_arguments(config.method.name)}
    return Federation(
        algorithm=make_method(config.method.name, fam, settings, args),
        family=fam,
        local=settings,
        mix=mix,
        costs=costs(fam),
        train=train,
        train_batches=batches(train, config.run.statistics_batch_size),
        test=test,
        test_batches=batched[0],
        validation_batches=batched[1],
        labels=source.y_train,
        partition=part,
        groups=None if views is None else groups,
        test_groups=None if views is None else np.asarray(test.view)[: sum(batched)],
    )


def _seen(views: Views | None, groups: np.ndarray) -> dict[str, Any]:
    return {} if views is None else {"view": groups, "views": views}


def views_of(text: str, source: sources.Source, clients: int, classes: int) -> tuple[Views | None, np.ndarray]:
    """How groups of consecutive clients see their examples, and the group of each client.

    Args:
      text: ``none``, ``rotation:<k>`` or ``labels:<k>``.

    Raises:
      ValueError: another text, or examples that cannot be seen so.
    """
    kind, _, number = text.partition(":")
    count = int(number) if number.isdigit() else 0
    allowed = {"none": (0,), "rotation": (1, 2, 4), "labels": range(1, clients + 1)}
    if count not in allowed.get(kind, ()) or (text != "none" and not 1 <= count <= clients):
        raise ValueError(
            f"groups {text!r}: allowed none, rotation:1, 2 or 4, or labels:K with K <= {clients} clients (data.groups)"
        )
    groups = np.arange(clients) * max(count, 1) // clients
    shape = source.x_train.shape[1:]
    if kind == "rotation":
        if len(shape) != 3 or shape[0] != shape[1]:
            raise ValueError(f"groups {text!r} of examples of shape {shape}: need square images (data.groups)")
        return rotations(shape[0], [turn * 4 // count for turn in range(count)], classes), groups
    if kind == "labels":
        if source.y_train.ndim > 1:
            raise ValueError(f"groups {text!r} of sequences: need one label an example (data.groups)")
        rng, used = np.random.default_rng(0), int(source.y_train.max()) + 1
        names = np.tile(np.arange(classes), (count, 1))
        names[1:, :used] = [rng.permutation(used) for _ in range(count - 1)]
        return renamings(int(np.prod(shape[:2])), names), groups
    return None, groups


_LOCAL = ("optimizer", "learning_rate", "batch_size", "epochs", "steps", "momentum", "weight_decay", "clip_norm",
          "milestones", "decay_factor", "round_decay", "full_batch", "keep_momentum")  # fmt: skip


def _classes(source: sources.Source, outputs: int) -> int:
    """Of all labels; a net may have more outputs than the data has classes (the published nets of EMNIST have 62)."""
    labels = [y for y in (source.y_train, source.y_test, source.y_validation) if y is not None and y.size]
    return max(max(int(y.max()) for y in labels) + 1, outputs)


def local_training(train: Any, fam: Family) -> Local:
    """How clients train, from a config's block ``train``.

    Raises:
      ValueError: a layer that the net does not have, and as ``local``.
    """
    layers, known = tuple(train.get("decay_layers", ())), fam.shapes[0]["params"]
    if wrong := [name for name in layers if name not in known]:
        raise ValueError(f"layer {wrong[0]!r} is not one of {', '.join(known)} (train.decay_layers)")
    return local(**{k: train[k] for k in _LOCAL}, decay_layers=layers)


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


def draws_levels(config: Any) -> bool:
    """Whether a client's level is drawn anew each round, as given or by the method's default."""
    signature = inspect.signature(importlib.import_module(f"hetfl_jax.methods.{config.method.name}").make)
    default = signature.parameters["assignment"].default if "assignment" in signature.parameters else "fixed"
    return config.method.args.get("assignment", default) == "dynamic"


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
    """The partition that ``config.data`` asks for, with test rows split off every client's own if it asks for them."""
    if data.split == "natural" and data.own_test and data.test_fraction:
        raise ValueError(f"own_test {data.own_test}, test_fraction {data.test_fraction}: one must be 0 (data.own_test)")
    part = partition.first_clients(_split(data, source, seed), data.get("first_clients", 0))
    return partition.hold_out_own(part, data.own_test, seed) if data.own_test else part


def _split(data: Any, source: sources.Source, seed: int) -> Partition:
    labels, clients = source.y_train, data.clients
    if data.split not in SPLITS:
        raise ValueError(f"split {data.split!r} is not one of {', '.join(SPLITS)} (data.split)")
    if data.split == "iid":
        return partition.iid(len(labels), clients, seed, len(source.y_test))
    if data.split == "per_group":
        groups = data.groups.partition(":")[2]
        return partition.per_group(len(labels), clients, int(groups) if groups.isdigit() else 1, seed)
    if labels.ndim > 1 and data.split != "natural":
        raise ValueError(f"split {data.split!r} of sequences, allowed iid, per_group, natural (data.split)")
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
    fields.pop("outputs", None)
    hidden = tuple(active_channels(width, mix.global_rate) for width in fields["hidden"])
    cut = {"embedding": active_channels(fields["embedding"], mix.global_rate)} if fields.get("embedding") else {}
    return {**fields, "hidden": hidden, **cut, "classes": classes}


def _family(config: Any, mix: Mix, source: sources.Source, classes: int) -> Family:
    prepare: windows.Prepare = preprocess.features
    if source.x_train.ndim == 4:
        prepare = preprocess.images(config.data.mean, config.data.std, config.data.augment)
    elif source.y_train.ndim > 1:
        prepare = preprocess.tokens(config.data.augment, classes)
    example = jax.ShapeDtypeStruct((1, *source.x_train.shape[1:]), source.x_train.dtype)
    if (source.y_train.ndim > 1) != (config.family.net == "transformer"):
        kind = "a label a token" if source.y_train.ndim > 1 else "a label an example"
        raise ValueError(f"net {config.family.net!r} on a source with {kind}: text wants transformer (family.net)")
    fields = net_fields(config, mix, classes)
    module = build_net(fields.pop("net"), **fields)
    if mix.depths and not hasattr(module, "depth"):
        raise ValueError(f"mix {config.family.mix!r} has depths, which net {config.family.net!r} has not (family.mix)")
    return families.family(module, [level_fields(mix, i) for i in range(len(mix.letters))], example, prepare)


def level_fields(mix: Mix, level: int) -> dict[str, Any]:
    """What a level changes in the net of the global one.

    >>> level_fields(parse_mix("4x1-2x1"), 1)
    {'depth': 2}
    """
    width = {"width": mix.widths[level]} if not mix.depths or len(set(mix.widths)) > 1 else {}
    return width | ({"depth": mix.depths[level]} if mix.depths else {})


def _test(
    train: Population, source: sources.Source, part: Partition, held: np.ndarray, batch: int
) -> tuple[Population, tuple[int, int]]:
    """Batches of the test set, batches of the validation set, then the clients' own test shares, what there is.

    Also how many batches there are of either; where there are views, both sets are seen in each of them.
    """
    first, end, classes = len(source.y_train), len(source.y_train) + len(source.y_test), held.shape[1]

    def in_batches(start: int, stop: int) -> Population:
        rows = np.arange(start, stop)

        def seen(view: int) -> Population:
            size, how = np.array([rows.size]), _seen(views, np.array([view]))
            whole = population(train.x, train.y, rows, size, classes=classes, **how)
            return batches(whole, batch, order=np.arange(rows.size))

        return reduce(joined, map(seen, range(1) if views is None else range(views.pixels.shape[0])))

    views = train.views if isinstance(train.views, Views) else None
    test = in_batches(first, end)
    counts = (test.size.shape[0], 0)
    if len(train.y) > end:
        validation = in_batches(end, len(train.y))
        test, counts = joined(test, validation), (counts[0], validation.size.shape[0])
    if part.test_index is None or part.test_size is None or not part.test_size.any():
        return test, counts
    some = part.test_size > 0
    own = part.test_index if part.held_out else part.test_index + first
    how = {} if views is None else _seen(views, np.asarray(train.view)[some])
    return joined(test, population(train.x, train.y, own, part.test_size[some], classes=held[some], **how)), counts


def parse_buckets(text: str, mix: Mix) -> tuple[tuple[int, ...], ...]:
    """Which levels share a bucket: ``each``, or groups of letters such as ``a-b-cde``.

    Raises:
      ValueError: groups that do not name every level of the mix once, or whose first level does not hold the others.

    >>> parse_buckets("a-be", parse_mix("a1-b1-e1"))
    ((0,), (1, 2))
    """
    if text == "each":
        return ()
    name = r"(?:[a-z]\d*|\d)"
    groups = [re.findall(name, group) for group in text.split("-")]
    named = re.fullmatch(f"{name}+(-{name}+)*", text) and sorted(each for group in groups for each in group)
    if named != sorted(mix.letters):
        raise ValueError(
            f"buckets {text!r}: allowed 'each' or groups of {', '.join(mix.letters)}, each once (train.buckets)"
        )
    numbers = tuple(tuple(mix.letters.index(name) for name in group) for group in groups)
    sizes = list(zip(mix.widths, mix.depths or [0] * len(mix.widths)))
    for bucket in numbers:
        largest = sizes[min(bucket)]
        if smaller := [i for i in bucket if sizes[i][0] > largest[0] or sizes[i][1] > largest[1]]:
            raise ValueError(
                f"buckets {text!r}: {mix.letters[smaller[0]]} is not inside {mix.letters[min(bucket)]}, the first of "
                "its bucket in the mix (train.buckets)"
            )
    return numbers
