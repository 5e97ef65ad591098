"""From a config to a federation: data, capacity levels and method, all checked before anything compiles."""

import inspect
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hetfl_jax import methods
from hetfl_jax.core.types import Algorithm, Arguments, Config, Line, Population, PyTree, Tier, Views
from hetfl_jax.data import door, partition, preprocess, sources
from hetfl_jax.data.partition import Partition
from hetfl_jax.data.population import batches, held_classes, joined, population
from hetfl_jax.data.views import renamings, rotations
from hetfl_jax.models import build as build_net
from hetfl_jax.models import families
from hetfl_jax.models.costs import Costs, costs
from hetfl_jax.models.layers import active_channels
from hetfl_jax.models.windows import Family, Prepare
from hetfl_jax.parts.compose import Slots
from hetfl_jax.parts.local import Local, local
from hetfl_jax.run.mix import Mix, level_fields, parse_mix
from hetfl_jax.run.slots import slots_of
from hetfl_jax.run.splits import split


class Own(NamedTuple):
    """What the user brings in place of what a config names; ``None`` leaves it to the config."""

    net: Any = None  #: a linen module
    data: Config = None  #: (x_train, y_train, x_test, y_test), a ``Source``, or (Population, (x_test, y_test))
    split: Any = None  #: (labels, clients, seed) -> Partition, a ``Partition``, or a client id a training example
    method: Any = None  #: a ``make``, an ``Algorithm``, or a name


class Federation(NamedTuple):
    """Everything a run needs, on the host or the device."""

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
    groups: np.ndarray | None = None  #: [N] which clients see their examples alike, where there are views
    test_groups: np.ndarray | None = None  #: [test and validation batches] the same


def build(config: Config, own: Own | None = None) -> Federation:
    """The federation that a config describes.

    Raises:
      ValueError: any value that is out of range, named with what is allowed and where it stands.
    """
    own = own or Own()
    make = _method(config, own)
    mix = parse_mix(config.family.mix)
    source, found = _source(config, own)
    seed = config.run.seed if config.data.seed < 0 else config.data.seed
    part = _partition(config.data, source, seed, own)
    clients = part.size.size
    cohort = config.method.args.get("cohort", 1)
    if not 1 <= cohort <= clients:
        raise ValueError(f"cohort of {cohort} clients, allowed 1..{clients} (method.args.cohort)")
    classes = _classes(source, config.family.outputs)
    fam = _family(config, mix, source, classes, own.net)
    settings = local_training(config.train, fam)
    if settings.full_batch and part.size.max() > settings.batch_size:
        raise ValueError(
            f"full_batch with batch_size {settings.batch_size}, but a client holds {part.size.max()} examples "
            "(train.full_batch, batch_size)"
        )
    # What is beyond the largest client would be padding in every step.
    settings = settings._replace(batch_size=min(settings.batch_size, int(part.size.max())))
    _check_padding(fam, part.size, settings.batch_size)
    level = (partition.levels_by_id if mix.depths else partition.levels_fixed)(mix.proportions, clients)
    if _of_population(own.data) and np.asarray(own.data[0].level).any():
        level = np.asarray(own.data[0].level)
    algorithm = _algorithm(config, make, fam, settings, mix, level, float(part.size.mean()))
    if not algorithm.drawn:
        partition.check_levels(level, fam.levels, mix.names)
    views, groups = views_of(config.data.groups, source, clients, classes)
    held = _held(source, part, classes, views, groups)
    train = population(
        *_pool(source), part.rows, part.size, level=level, levels=fam.levels, classes=held, **_seen(views, groups)
    )
    test, batched = _test(train, source, part, held, config.run.eval_batch_size)
    price = costs(fam)
    return Federation(
        algorithm=algorithm,
        family=fam,
        local=settings,
        mix=mix,
        costs=price,
        tiers=algorithm.tiers or tuple(
            Tier(name, *(int(row[i]) for row in (price.parameters, price.bytes, price.macs)))
            for i, name in enumerate(mix.names)
        ),
        train=train,
        train_batches=batches(train, config.run.statistics_batch_size),
        test=test,
        test_batches=batched[0],
        validation_batches=batched[1],
        labels=source.y_train,
        partition=part,
        fingerprint=door.fingerprint(source, part),
        labels_table=found.labels_table,
        notes=tuple(found.notes),
        groups=None if views is None else groups,
        test_groups=None if views is None else np.asarray(test.view)[: sum(batched)],
    )  # fmt: skip


def _pool(source: sources.Source) -> tuple[jax.Array, jax.Array]:
    """All examples and labels: one pool on the device serves training, the statistics pass and all evaluation."""
    empty = source.x_test[:0], source.y_test[:0]
    x_validation, y_validation = empty if source.y_validation is None else (source.x_validation, source.y_validation)
    x = np.concatenate([source.x_train, source.x_test, x_validation])
    y = np.concatenate([source.y_train, source.y_test, y_validation])
    return jnp.asarray(x), jnp.asarray(y)


def _check_padding(fam: Family, size: np.ndarray, batch: int) -> None:
    """Rows that fill a batch up must not enter batch statistics of a net that cannot tell them apart."""
    if "batch_stats" in fam.shapes[0] and not fam.nets[0].knows_padding() and (size % batch).any():
        client = int(np.flatnonzero(size % batch)[0])
        raise ValueError(
            f"net {type(fam.nets[0].module).__name__} has batch statistics and no argument 'valid' (which rows are "
            f"real, for nn.BatchNorm's mask), but client {client} has {size[client]} examples in batches of {batch}: "
            "add it, or choose a batch size that divides all (family.net, train.batch_size)"
        )


def _method(config: Config, own: Own) -> methods.Make | Algorithm:
    if own.method is None:
        return methods.find(config.method.name)
    return methods.find(own.method) if isinstance(own.method, str) else own.method


def _algorithm(
    config: Config, make: methods.Make | Algorithm, fam: Family, settings: Local, mix: Mix, level: np.ndarray,
    mean_examples: float,
) -> Algorithm:  # fmt: skip
    """The method with its arguments, what the federation tells it, and what is chosen apart from it."""
    if isinstance(make, Algorithm):
        if make.levels != fam.levels:
            raise ValueError(f"the algorithm has {make.levels} levels, the mix {fam.levels} (family.mix)")
        return make
    args, known = config.method.args.to_dict(), methods.arguments(make)
    told = {
        "proportions": mix.proportions,
        "clients": level.size,
        "clients_per_level": np.bincount(level, minlength=fam.levels).tolist(),
    }
    if args.get("mean_examples"):  # a switch in configs, a number for the method
        args["mean_examples"] = mean_examples
    if "cohort" in known and "cohort" not in args:
        args["cohort"] = min(10, level.size)
    args = {name: value for name, value in args.items() if name in known}
    args |= {name: value for name, value in told.items() if name in known}
    slots: Slots | None = slots_of(config, fam, mix, level.size)
    return methods.build(config.method.name, make, fam, settings, args, slots)


def _seen(views: Views | None, groups: np.ndarray) -> Line:
    return {} if views is None else {"view": groups, "views": views}


def _held(source: sources.Source, part: Partition, classes: int, views: Views | None, groups: np.ndarray) -> np.ndarray:
    """[N, C] which classes each client holds, as it sees them."""
    if views is not None:
        seen_as = np.asarray(views.labels)[np.repeat(groups, part.size), source.y_train[part.rows]]
        return held_classes(seen_as, part.size, classes)
    if part.classes is None:
        return held_classes(source.y_train[part.rows], part.size, classes)
    return np.pad(part.classes, ((0, 0), (0, classes - part.classes.shape[1])))


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


def _classes(source: sources.Source, outputs: int) -> int:
    """Of all labels; a net may have more outputs than the data has classes (the published nets of EMNIST have 62)."""
    labels = [y for y in (source.y_train, source.y_test, source.y_validation) if y is not None and y.size]
    return max(max(int(y.max()) for y in labels) + 1, outputs)


def local_training(train: Config, fam: Family) -> Local:
    """How clients train, from a config's block ``train``.

    Raises:
      ValueError: a layer that the net does not have, and as ``local``.
    """
    names = inspect.signature(local).parameters
    given = {name: value for name, value in train.items() if name in names}
    layers, known = tuple(train.decay_layers), fam.shapes[0]["params"]
    if wrong := [name for name in layers if name not in known]:
        raise ValueError(f"layer {wrong[0]!r} is not one of {', '.join(known)} (train.decay_layers)")
    return local(**{**given, "decay_layers": layers, "optimizer_args": train.optimizer_args.to_dict()})


def _source(config: Config, own: Own) -> tuple[sources.Source, door.Admitted]:
    """The data set, through the door, sampled, with a validation set held out."""
    data = config.data
    if _of_population(own.data):
        pop, (x_test, y_test) = own.data
        raw = sources.Source(np.asarray(pop.x), np.asarray(pop.y), np.asarray(x_test), np.asarray(y_test))
    elif own.data is None:
        seed = config.run.seed if data.seed < 0 else data.seed
        raw = sources.load(data.source, clients=data.clients, seed=seed, writers=data.writers, **data.options.to_dict())
    else:
        raw = sources.given(own.data)
    known = sources.SYNTHETIC_CLASSES if own.data is None and data.source == "synthetic" else 0
    admitted = door.admit(raw, classes=config.family.outputs or known, mean=data.mean, std=data.std)
    source = door.sample(admitted.source, data.examples) if data.examples else admitted.source
    return sources.hold_out(source, data.validation), admitted


def _of_population(data: Config) -> bool:
    """Whether the user's data is a population with a test set."""
    if isinstance(data, Population):
        raise ValueError("a Population alone has no test set: give (population, (x_test, y_test)) (data)")
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Population)


def _partition(data: Config, source: sources.Source, seed: int, own: Own) -> Partition:
    if _of_population(own.data):
        return Partition(np.asarray(own.data[0].rows), np.asarray(own.data[0].size))
    if own.split is None:
        return split(data, source, seed)
    if isinstance(own.split, Partition):
        return own.split
    if isinstance(own.split, Callable):  # type: ignore[arg-type]
        return own.split(source.y_train, data.clients, seed)
    ids = np.asarray(own.split)
    if ids.shape != (len(source.y_train),):
        raise ValueError(f"split has ids of shape {ids.shape} for {len(source.y_train)} training examples (split)")
    return partition.natural(ids, seed, data.test_fraction)


def net_fields(config: Config, mix: Mix, classes: int) -> Line:
    """Fields of the global model's net, by name; its hidden sizes are cut to the global level."""
    family = config.family
    fields: Line = {name: family[name] for name in ("net", "norm", "scaler", "lowering")}
    if family.hidden:
        fields["hidden"] = tuple(active_channels(width, mix.global_rate) for width in family.hidden)
    if family.embedding:
        fields["embedding"] = active_channels(family.embedding, mix.global_rate)
    fields |= {name: family[name] for name in ("heads", "length") if family[name]}
    fields |= {"dropout": family.dropout} if family.dropout >= 0 else {}
    fields |= {} if family.exits else {"exits": False}
    return {**fields, "classes": classes}


def _net(config: Config, mix: Mix, classes: int, given: PyTree) -> nn.Module:
    """The global model's net: the user's, or by name."""
    if given is not None:
        return given
    fields = net_fields(config, mix, classes)
    name = fields.pop("net")
    if ":" not in name:
        return build_net(name, **fields)
    module, _, cls = name.partition(":")
    found = methods.load(module, cls)
    if found is None:
        raise ValueError(f"net {name!r}: no {cls} in a module {module} (family.net)")
    return found(**{field: value for field, value in fields.items() if field in found.__dataclass_fields__})


def _family(config: Config, mix: Mix, source: sources.Source, classes: int, given: PyTree) -> Family:
    prepare: Prepare = preprocess.features
    if source.x_train.ndim == 4:
        prepare = preprocess.images(config.data.mean, config.data.std, config.data.augment)
    elif source.y_train.ndim > 1:
        prepare = preprocess.tokens(config.data.augment, classes)
    example = jax.ShapeDtypeStruct((1, *source.x_train.shape[1:]), source.x_train.dtype)
    module = _net(config, mix, classes, given)
    if given is None and (source.y_train.ndim > 1) != getattr(type(module), "reads_tokens", False):
        kind = "a label a token" if source.y_train.ndim > 1 else "a label an example"
        raise ValueError(f"net {config.family.net!r} on a source with {kind}: see `hetfl list` (family.net)")
    levels: list[Arguments] = [level_fields(mix, i) for i in range(len(mix.names))]
    for field in dict.fromkeys(name for level in levels for name in level):
        if field not in type(module).__dataclass_fields__:
            if len(levels) > 1 or mix.depths:
                kind = type(module).__name__
                raise ValueError(f"mix {config.family.mix!r} sets {field}, which net {kind} has not (family.mix)")
            levels = [{}]
    try:
        fam = families.family(module, levels, example, prepare)
    except TypeError as error:
        kind, shape, why = type(module).__name__, source.x_train.shape[1:], " ".join(str(error).split())
        raise ValueError(
            f"net {kind} cannot read examples of shape {shape}: {why} (family.net, data.source)"
        ) from error
    if len(levels) > 1 and (given is not None or ":" in config.family.net):
        fam = families.checked(fam)
    outputs = fam.nets[0].outputs(fam.shapes[0], jax.eval_shape(lambda v: prepare(v, None), example))
    if outputs < classes:
        raise ValueError(f"labels 0..{classes - 1}, but the net has {outputs} outputs (family.net, family.outputs)")
    return fam


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
