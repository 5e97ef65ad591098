"""Data in domains, as ``data.domains`` asks for it; and what an attack on pixels needs of data."""

from hetfl_jax.core.types import Config
from hetfl_jax.data import domains, door, sources
from hetfl_jax.data.sources import Source


def source_name(data: Config) -> str:
    """What is loaded first: the source, or the first domain where every domain is a data set of its own.

    >>> from ml_collections import ConfigDict
    >>> source_name(ConfigDict(dict(source="digits", domains=("plain", "rotated"))))
    'digits'
    >>> source_name(ConfigDict(dict(source="digits", domains=("npz:a.npz", "npz:b.npz"))))
    'npz:a.npz'
    """
    return data.source if domains.changes(data.domains) else data.domains[0]


def sampled(data: Config, source: Source, domain: bool = False) -> Source:
    """A part of a source, with a validation set held out.

    Args:
      data: the config's block.
      domain: whether the source is one of several domains: it then gives its equal share of ``data.examples``.
    """
    examples = -(-data.examples // len(data.domains)) if domain else data.examples
    return sources.hold_out(door.sample(source, examples) if examples else source, data.validation)


def in_domains(config: Config, source: Source) -> Source:
    """The rows of all domains, of which some may be data sets of their own; the source where there are none.

    Args:
      source: what was loaded first, already sampled.

    Raises:
      ValueError: a domain that there is not, or whose labels are not those of the others.
    """
    data = config.data
    if not data.domains:
        return source

    def load(text: str) -> Source:
        admitted = door.admit(sources.load(text), classes=config.family.outputs, mean=data.mean, std=data.std)
        if admitted.labels_table is not None:
            raise ValueError(f"domain {text!r} has other labels than 0, 1, ...: need the same in all (data.domains)")
        return sampled(data, admitted.source, domain=True)

    return domains.combined(source, tuple(data.domains), load, config.run.seed if data.seed < 0 else data.seed)


def check_pixels(config: Config, source: Source) -> None:
    """Refuse examples stored as floats that are no pixels in [0, 1], where an adversary attacks pixels.

    Pixels stored as whole numbers are divided by 255 first, so that they are always in range.

    Raises:
      ValueError: with their range.
    """
    for x in (source.x_train, source.x_test) if config.adversary.name != "none" else ():
        if x.dtype.kind == "f" and x.size and not 0 <= x.min() <= x.max() <= 1:
            raise ValueError(
                f"an attack on inputs of {x.min():g}..{x.max():g}: need pixels in 0..1, or 0..255 stored as whole "
                "numbers (adversary.name)"
            )
