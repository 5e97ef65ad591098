"""From a config to a federation: data, capacity levels and method, all checked before anything compiles."""

import inspect
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import ml_collections
import numpy as np

from hetfl_jax import methods
from hetfl_jax.core.types import Algorithm, Config, Line, Population, Tier, Views
from hetfl_jax.data import door, sources
from hetfl_jax.data.levels import check_levels
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import batches, joined, population
from hetfl_jax.models.costs import Costs
from hetfl_jax.models.windows import Family
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import Local, local
from hetfl_jax.run.devices import BUDGET, Equipped, equipment_of, equipped, timed
from hetfl_jax.run.domains import check_pixels
from hetfl_jax.run.given import (
    Own,
    brought,
    classes_of,
    held_of,
    named_of,
    notes_of,
    partition_of,
    views_of,
)
from hetfl_jax.run.known import Known, known_family, known_pool, known_source
from hetfl_jax.run.levels import levels_of, tiers_of, unused_order
from hetfl_jax.run.mix import Mix, parse_mix
from hetfl_jax.run.slots import check_unused, check_whole, slots_of
from hetfl_jax.run.splits import tested_rows


class Federation(NamedTuple):
    """Everything a run needs, on the host or the device. Made by ``build``, which checks all of it."""

    algorithm: Algorithm
    family: Family
    local: Local
    mix: Mix
    costs: Costs
    tiers: tuple[Tier, ...]  #: the models that are offered and evaluated
    train: Population
    train_batches: Population  #: the same examples in batches, for the statistics pass
    test: Population  #: the test set in batches, the validation set in batches, each client's own test share
    test_batches: int  #: how many of them are batches of the global test set
    validation_batches: int  #: how many after those are batches of the validation set
    labels: np.ndarray  #: of the training pool
    partition: Partition
    fingerprint: Line  #: of data and partition
    labels_table: dict[str, int] | None  #: old label -> new one, where labels were renumbered
    notes: tuple[str, ...]  #: what was understood of the data that one may not expect
    named: dict[str, str]  #: what method, source, net and split are called
    remake: Callable[[Line], Algorithm] | None = None  #: the algorithm of other numbers, from the blocks of a config
    reads_population: bool = False  #: whether the method looks at the data when it is built
    groups: np.ndarray | None = None  #: [N] which clients see their examples alike, where there are views
    test_groups: np.ndarray | None = None  #: [test and validation batches] the same
    outfit: Equipped | None = None  #: where clients have devices


def build(config: Config, own: Own | None = None, known: Known | None = None) -> Federation:
    """The federation that a config describes: data, split, levels, net, method, and the test batches.

    Args:
      config: complete.
      own: what the user brings in place of what the config names.
      known: of other configs; what this one has besides is added.

    Raises:
      ValueError: any value that is out of range, named with what is allowed and where it stands.
    """
    own, known = own or Own(), known or Known()
    make = _method(config, own)
    mix = parse_mix(config.family.mix)
    source, found = known_source(config, own, known)
    seed = config.run.seed if config.data.seed < 0 else config.data.seed
    part = partition_of(config.data, source, seed, own)
    clients = part.size.size
    cohort = config.method.args.get("cohort", 1)
    if not 1 <= cohort <= clients:
        raise ValueError(f"cohort of {cohort} clients, allowed 1..{clients} (method.args.cohort)")
    classes = classes_of(source, config.family.outputs)
    fam, price = known_family(config, mix, source, classes, own.net, known)
    settings = _settings(config, fam, part.size)
    level = levels_of(config, own, mix, part.size)
    check_pixels(config, source)
    views, groups = views_of(config.data.groups, source, clients, classes)
    held = held_of(source, part, classes, views, groups)
    (x, y), seen = known_pool(source, known), _seen(views, groups)
    train = population(x, y, part.rows, part.size, level=level, levels=fam.levels, classes=held, **seen)
    outfit = None
    algorithm = _algorithm(config, make, fam, settings, mix, price, level, train)
    if equipment := equipment_of(config, part.size, seed):
        outfit = equipped(config, equipment, algorithm, fam, price, settings, mix.names, train)
        train, level = outfit.train, outfit.level
        algorithm = _algorithm(config, make, fam, settings, mix, price, level, train)

    def remake(blocks: Line) -> Algorithm:
        other = ml_collections.ConfigDict(blocks)
        local = local_training(other.train, fam)._replace(batch_size=settings.batch_size)
        return _algorithm(other, make, fam, local, mix, price, level, train)

    if not algorithm.drawn and config.capacity.name != BUDGET:
        check_levels(level, fam.levels, mix.names)
    test, batched = _test(train, source, part, held, config.run.eval_batch_size, tested_rows(config.data, part))
    return Federation(
        algorithm=algorithm,
        family=fam,
        local=settings,
        mix=mix,
        costs=price,
        tiers=algorithm.tiers or tiers_of(mix, price),
        train=train,
        train_batches=batches(train, config.run.statistics_batch_size),
        test=test,
        test_batches=batched[0],
        validation_batches=batched[1],
        labels=source.y_train,
        partition=part,
        fingerprint={**door.fingerprint(source, part), "run": brought(own)},
        labels_table=found.labels_table,
        notes=(*found.notes, *notes_of(config.data, source, part, own), *_unused(config, algorithm)),
        named=named_of(config, own),
        remake=None if isinstance(make, Algorithm) else remake,
        reads_population=not isinstance(make, Algorithm) and "population" in methods.arguments(make),
        groups=None if views is None else groups,
        test_groups=None if views is None else np.asarray(test.view)[: sum(batched)],
        outfit=outfit,
    )  # fmt: skip


def _unused(config: Config, algorithm: Algorithm) -> list[str]:
    """What a config says of levels that this method does not ask for."""
    capacity = config.capacity
    return unused_order(capacity.order, capacity.name, bool(algorithm.drawn), algorithm.levels)


def _settings(config: Config, fam: Family, size: np.ndarray) -> Local:
    """How clients of these sizes train, with batches no larger than the largest client.

    Args:
      size: [N] examples of every client.

    Raises:
      ValueError: a client that is larger than the one batch it should be; rows of padding that a net cannot leave out.
    """
    settings = local_training(config.train, fam)
    if settings.full_batch and size.max() > settings.batch_size:
        raise ValueError(
            f"full_batch with batch_size {settings.batch_size}, but a client holds {size.max()} examples "
            "(train.full_batch, batch_size)"
        )
    # What is beyond the largest client would be padding in every step.
    settings = settings._replace(batch_size=min(settings.batch_size, int(size.max())))
    _check_padding(fam, size, settings.batch_size)
    return settings


def _check_padding(fam: Family, size: np.ndarray, batch: int) -> None:
    """Rows that fill a batch up must not enter batch statistics of a net that cannot tell them apart.

    Args:
      size: [N] examples of every client.
      batch: of local training.

    Raises:
      ValueError: with the first client whose last batch would be filled up.
    """
    if "batch_stats" in fam.shapes[0] and not fam.nets[0].knows_padding() and (size % batch).any():
        client = int(np.flatnonzero(size % batch)[0])
        raise ValueError(
            f"net {type(fam.nets[0].module).__name__} has batch statistics and no argument 'valid' (which rows are "
            f"real, for nn.BatchNorm's mask), but client {client} has {size[client]} examples in batches of {batch}: "
            "add it, or choose a batch size that divides all (family.net, train.batch_size)"
        )


def _method(config: Config, own: Own) -> methods.Make | Algorithm:
    """The user's method, else the config's: a ``make``, or an ``Algorithm`` that is whole."""
    if own.method is None:
        return methods.find(config.method.name)
    return methods.find(own.method) if isinstance(own.method, str) else own.method


def _algorithm(
    config: Config, make: methods.Make | Algorithm, fam: Family, settings: Local, mix: Mix, price: Costs,
    level: np.ndarray, train: Population,
) -> Algorithm:  # fmt: skip
    """The method with its arguments, what the federation tells it, what is chosen apart from it, and its clock.

    The federation tells proportions of the mix, number of clients, base width, clients of each level and the
    population to those methods that have an argument of that name.

    Args:
      make: of the method; an ``Algorithm`` is returned as it is, if it fits.
      price: of the levels.
      level: [N] of each client.
      train: the population; with devices, the method gets the config's clock.
    """
    if isinstance(make, Algorithm):
        check_unused(config)
        check_whole(config, make, fam.levels, level.size)
        return timed(config, make, price, settings, train)
    args, known = config.method.args.to_dict(), methods.arguments(make)
    told = {
        "proportions": mix.proportions,
        "clients": level.size,
        "base_width": mix.global_rate,
        "clients_per_level": np.bincount(level, minlength=fam.levels).tolist(),
        "population": train,
    }
    if args.get("mean_examples"):  # a switch in configs, a number for the method
        args["mean_examples"] = float(np.asarray(train.size).mean())
    if "cohort" in known and "cohort" not in args:
        args["cohort"] = min(10, level.size)
    args = {name: value for name, value in args.items() if name in known}
    args |= {name: value for name, value in told.items() if name in known}
    slots: Slots | None = slots_of(config, fam, mix, level.size)
    made = methods.build(config.method.name, make, fam, settings, args, slots)
    return timed(config, made, price, settings, train)


def _seen(views: Views | None, groups: np.ndarray) -> Line:
    """How clients see the pool, as arguments of ``population``; nothing where there are no views."""
    return {} if views is None else {"view": groups, "views": views}


def local_training(train: Config, fam: Family) -> Local:
    """How clients train, from a config's block ``train``.

    Raises:
      ValueError: neither epochs nor steps, a layer that the net does not have, and as ``parts.local.local``.
    """
    if train.epochs == 0 == train.steps:
        raise ValueError("epochs 0 and steps 0: nobody trains, need one >= 1 (train.epochs)")
    names = inspect.signature(local).parameters
    given = {name: value for name, value in train.items() if name in names}
    layers, known = tuple(train.decay_layers), fam.shapes[0]["params"]
    if wrong := [name for name in layers if name not in known]:
        raise ValueError(f"layer {wrong[0]!r} is not one of {', '.join(known)} (train.decay_layers)")
    return local(**{**given, "decay_layers": layers, "optimizer_args": train.optimizer_args.to_dict()})


def _test(
    train: Population, source: sources.Source, part: Partition, held: np.ndarray | None, batch: int,
    common: np.ndarray | None = None,
) -> tuple[Population, tuple[int, int]]:  # fmt: skip
    """Batches of the test set, batches of the validation set, then the clients' own test shares, what there is.

    Also how many batches there are of either; where there are views, both sets are seen in each of them.

    Args:
      held: [N, C] classes of each client, ``None`` where labels are numbers.
      batch: examples of a batch.
      common: rows of the training data that make the test set in place of the source's.
    """
    first, end = len(source.y_train), len(source.y_train) + len(source.y_test)
    classes = None if held is None else held.shape[1]

    def in_batches(rows: np.ndarray) -> Population:
        def seen(view: int) -> Population:
            size, how = np.array([rows.size]), _seen(views, np.array([view]))
            whole = population(train.x, train.y, rows, size, classes=classes, **how)
            return batches(whole, batch, order=np.arange(rows.size))

        return reduce(joined, map(seen, range(1) if views is None else range(views.pixels.shape[0])))

    views = train.views if isinstance(train.views, Views) else None
    test = in_batches(np.arange(first, end) if common is None else common)
    counts = (test.size.shape[0], 0)
    own = np.zeros(0, int) if part.validation is None else part.validation
    if len(rows := np.concatenate([np.arange(end, len(train.y)), own])):
        validation = in_batches(rows)
        test, counts = joined(test, validation), (counts[0], validation.size.shape[0])
    if part.test_index is None or part.test_size is None or not part.test_size.any():
        return test, counts
    some = part.test_size > 0
    own = part.test_index if part.held_out else part.test_index + first
    how = {} if views is None else _seen(views, np.asarray(train.view)[some])
    theirs = None if held is None else held[some]
    return joined(test, population(train.x, train.y, own, part.test_size[some], classes=theirs, **how)), counts
