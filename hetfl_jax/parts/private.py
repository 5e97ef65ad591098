"""Leaves that stay on the client: its own, kept in its memory, never merged (norms: FedBN, Li et al., ICLR 2021)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from hetfl_jax.core.types import PyTree
from hetfl_jax.models.families import View
from hetfl_jax.models.windows import Family, Path
from hetfl_jax.parts.local import Trained

OWN = "own"  #: their name in the client's memory


class Private(NamedTuple):
    """Which leaves of the variables are a client's own. A client starts with the server's first values of them."""

    paths: frozenset[Path]

    def memory(self, variables: PyTree) -> PyTree:
        """What a client that was never there remembers; nothing where no leaf is private."""
        return {OWN: self.of(variables)} if self.paths else {}

    def of(self, variables: PyTree) -> PyTree:
        """These leaves alone."""
        return _kept(variables, lambda path: path in self.paths)

    def without(self, variables: PyTree) -> PyTree:
        """All other leaves: what travels."""
        return _kept(variables, lambda path: path not in self.paths)

    def trained(self, run: Callable[[View], Trained], view: View, memory: PyTree) -> Trained:
        """Local training from the received leaves and the client's own, whose change is kept and sent as 0."""
        if not self.paths:
            return run(view)
        done = run(view._replace(variables=replaced(view.variables, memory[OWN])))
        after = self.of(done.variables)
        received = replaced(done.variables, self.of(view.variables))
        return done._replace(variables=received, memory={**done.memory, OWN: after})


def checked(private: Private | None, coded: bool) -> Private:
    """``private``, or nothing that is.

    Args:
      private: what stays on the client, ``None`` for nothing.
      coded: whether a codec is chosen.

    Raises:
      ValueError: codecs, which would code the leaves that stay.

    >>> checked(None, coded=True).paths
    frozenset()
    """
    if private and coded:
        raise ValueError("a codec where some leaves stay on the client: need none (uplink.name, downlink.name)")
    return private or Private(frozenset())


def norms(family: Family) -> Private:
    """All leaves of norms: scale, bias and running statistics.

    Args:
      family: of the model.

    Raises:
      ValueError: a net without norms.

    Source: FedBN, Li et al., ICLR 2021.

    >>> import jax.numpy as jnp
    >>> from hetfl_jax.models import MLP, families
    >>> fam = families.family(MLP(hidden=(4,), norm="bn_tracked"), [{}], jnp.zeros((1, 3)))
    >>> sorted(path[-1] for path in norms(fam).paths)
    ['bias', 'mean', 'scale', 'var']
    """
    layers = {path[:-1] for path in family.windows if path[0] == "params" and path[-1] == "scale"}
    found = [path for path in family.windows if path[0] == "batch_stats" or path[:-1] in layers]
    if not found:
        raise ValueError("local norms of a net without norms: need one, e.g. bn_tracked (family.norm)")
    return Private(frozenset(found))


def replaced(variables: PyTree, own: PyTree) -> PyTree:
    """``variables`` with the leaves that ``own`` has.

    >>> replaced({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    if not isinstance(variables, Mapping):
        return own
    return {name: replaced(value, own[name]) if name in own else value for name, value in variables.items()}


def _kept(variables: PyTree, wanted: Callable[[Path], bool], above: Path = ()) -> PyTree:
    """The leaves whose path is wanted, without what has none below it."""
    found = {}
    for name, value in variables.items():
        path = (*above, name)
        if isinstance(value, Mapping):
            if below := _kept(value, wanted, path):
                found[name] = below
        elif wanted(path):
            found[name] = value
    return found
