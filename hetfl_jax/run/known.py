"""Data and nets of a config, and which of them other configs have made already."""

import jax

from hetfl_jax.core.types import Arguments, Array, Config, PyTree
from hetfl_jax.data import door, preprocess, sources
from hetfl_jax.models import families
from hetfl_jax.models.costs import Costs, costs
from hetfl_jax.models.windows import Family, Prepare
from hetfl_jax.run.given import Own, pool_of, source_of
from hetfl_jax.run.mix import Mix, level_fields
from hetfl_jax.run.nets import check_call, net_of


class Known:
    """What federations of several configs have in common, by what it depends on: text of the keys that count.

    >>> len(Known().families), len(Known().sources)
    (0, 0)
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.families: dict[str, tuple[Family, Costs]] = {}
        self.sources: dict[str, tuple[sources.Source, door.Admitted]] = {}  #: the latest one only, as they are large
        self.pool: tuple[sources.Source, tuple[Array, Array]] | None = None  #: the latest one


#: keys that data does not depend on before it is split
OF_THE_SPLIT = ("augment", "split", "classes_per_client", "concentration", "least", "test_fraction", "own_test",
                "own_validation", "tested_on", "groups", "first_clients", "seed")  # fmt: skip


def known_source(config: Config, own: Own, known: Known) -> tuple[sources.Source, door.Admitted]:
    """Data that is known, or new one, which takes the place of what was known.

    Before the split, data depends on the block ``data`` but for ``OF_THE_SPLIT``, on the objective (labels may be
    numbers), on ``family.outputs``, and where it is generated on the seed.

    Raises:
      ValueError: as ``source_of``.
    """
    data = {name: value for name, value in config.data.to_dict().items() if name not in OF_THE_SPLIT}
    seed = config.run.seed if config.data.seed < 0 else config.data.seed
    drawn = data["source"] in sources.GENERATED or data["domains"]
    kind = str((data, seed if drawn else 0, config.objective, config.family.outputs))
    if kind not in known.sources:
        known.sources = {kind: source_of(config, own)}
    return known.sources[kind]


def known_pool(source: sources.Source, known: Known) -> tuple[Array, Array]:
    """All examples and labels of a source: points of a sweep with the same source have the same arrays."""
    if known.pool is None or known.pool[0] is not source:
        known.pool = source, pool_of(source)
    return known.pool[1]


def known_family(
    config: Config, mix: Mix, source: sources.Source, classes: int, given: PyTree, known: Known
) -> tuple[Family, Costs]:
    """A family that is known, or a new one, which is then; and its costs.

    A family depends on the block ``family``, the normalisation, and shapes and dtypes of the data; points of a sweep
    that share these share it, and with it their programs.
    """
    kept, x, y = config.data, source.x_train, source.y_train
    shapes = (x.shape[1:], x.dtype, y.shape[1:], y.dtype, classes)
    kind = str((config.family, config.train.precision, kept.mean, kept.std, kept.augment, *shapes))
    if kind not in known.families:
        fam = _family(config, mix, source, classes, given)
        known.families[kind] = fam, costs(fam)
    return known.families[kind]


def _family(config: Config, mix: Mix, source: sources.Source, classes: int, given: PyTree) -> Family:
    """The net at every level, checked against the data.

    Args:
      classes: outputs of the net, 1 where labels are numbers.
      given: the user's net, or ``None``.

    Raises:
      ValueError: a net that cannot read the examples, lacks a field that the mix sets, or has too few outputs.
    """
    prepare: Prepare = preprocess.features
    if source.x_train.ndim == 4:
        prepare = preprocess.images(config.data.mean, config.data.std, config.data.augment)
    elif source.y_train.ndim > 1:
        prepare = preprocess.tokens(config.data.augment, classes)
    example = jax.ShapeDtypeStruct((1, *source.x_train.shape[1:]), source.x_train.dtype)
    module = net_of(config, mix, classes, given)
    if given is None and (source.y_train.ndim > 1) != getattr(type(module), "reads_tokens", False):
        kind = "a label a token" if source.y_train.ndim > 1 else "a label an example"
        raise ValueError(f"net {config.family.net!r} on a source with {kind}: see `hetfl list` (family.net)")
    if config.data.augment.startswith("corrupt") and not getattr(type(module), "hides_tokens", True):
        kind = type(module).__name__
        raise ValueError(f"augmentation {config.data.augment!r}: net {kind} has no hidden token (data.augment)")
    norm = getattr(module, "norm", "none")
    levels: list[Arguments] = [level_fields(mix, i, norm) for i in range(len(mix.names))]
    for field in dict.fromkeys(name for level in levels for name in level):
        if field not in type(module).__dataclass_fields__:
            if len(levels) > 1 or mix.depths:
                kind = type(module).__name__
                raise ValueError(f"mix {config.family.mix!r} sets {field}, which net {kind} has not (family.mix)")
            levels = [{}]
    own = given is not None or ":" in config.family.net
    for fields in levels if own else ():
        check_call(module.clone(**fields), jax.eval_shape(lambda v: prepare(v, None), example))
    try:
        fam = families.family(module, levels, example, prepare)
    except TypeError as error:
        kind, shape, why = type(module).__name__, source.x_train.shape[1:], " ".join(str(error).split())
        raise ValueError(
            f"net {kind} cannot read examples of shape {shape}: {why} (family.net, data.source)"
        ) from error
    if len(levels) > 1 and own:
        fam = families.checked(fam)
    _check_outputs(fam, source, classes)
    return families.computing_in(config.train.precision, fam)


def _check_outputs(fam: Family, source: sources.Source, classes: int) -> None:
    """The net must have an output for every label, or one where labels are numbers.

    Raises:
      ValueError: with the shape that the net returns and the one that the labels need.
    """
    kind, ready = type(fam.nets[0].module).__name__, jax.eval_shape(lambda v: fam.prepare(v, None), fam.example)
    shape = jax.eval_shape(fam.nets[0].each_exit, fam.shapes[0], ready)[-1].shape
    wanted = (1, *source.y_train.shape[1:])
    if shape[:-1] != wanted:
        raise ValueError(
            f"net {kind} returns {shape} for labels of shape {wanted}: need {(*wanted, classes)}; several exits are a "
            "tuple of these (family.net)"
        )
    if source.y_train.dtype.kind == "f" and shape[-1] != 1:
        raise ValueError(f"labels are numbers to predict, but net {kind} has {shape[-1]} outputs: need 1 (family.net)")
    if shape[-1] < classes:
        raise ValueError(f"labels 0..{classes - 1}, but the net has {shape[-1]} outputs (family.net, family.outputs)")
