"""HeteroFL's Transformer: an encoder for masked language modelling whose heads become narrower, never fewer."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hetfl_jax.core import tree
from hetfl_jax.core.random import draw
from hetfl_jax.core.types import Array
from hetfl_jax.models.layers import EPSILON, active_channels, scale, traced_channels, uniform_fan_in
from hetfl_jax.models.nets import BaseNet, Capacity


class Run(NamedTuple):
    """How the net runs this time; all its parts are told.

    >>> run = Run(width=0.5, scaler=True, dropout=0.0, train=True, capacity=None)
    >>> run.size(8), float(run.scale(jnp.float32(1)))
    (4, 2.0)
    """

    width: float
    scaler: bool
    dropout: float
    train: bool
    capacity: Capacity | None

    def size(self, full: int) -> int:
        """Features of a layer that has ``full`` at width 1, here."""
        return active_channels(full, self.width)

    def active(self, full: int) -> Array | None:
        """The same in masked execution: an int32 scalar that is traced; ``None`` where the net has its true shape."""
        return traced_channels(full, (self.capacity or {}).get("width"))

    def scale(self, x: Array) -> Array:
        """The Scaler: division by the width while training."""
        return scale(x, (self.capacity or {}).get("width", self.width), train=self.train) if self.scaler else x

    def norm(self, x: Array, full: int, name: str) -> Array:
        """Layer norm over the active features of [B, S, D]."""
        active = self.active(full)
        mask = None if active is None else jnp.arange(x.shape[-1]) < active
        return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name=name)(x, mask=mask)

    def drop(self, x: Array, full: int, make_rng: Callable[[str], Array]) -> Array:
        """Dropout, drawn for the full width: a feature's fate is the same in every sub-model and executor.

        Args:
          x: [B, S, D].
          full: D at width 1.
          make_rng: of the module that drops.
        """
        if not self.train or not self.dropout:
            return x
        keep = draw(jax.random.uniform, make_rng("dropout"), (*x.shape[:-1], full)) < 1 - self.dropout
        return jnp.where(keep[..., : x.shape[-1]], x / (1 - self.dropout), 0)


class Layer(nn.Module):
    """One encoder layer, norms after the residuals.

    ``x <- norm(x + attention(x))``, ``x <- norm(x + W_2 gelu(W_1 x))``; attention is softmax(q k^T / sqrt(d)) v with d
    the width of a head in use. ``embedding``, ``heads``, ``hidden`` are sizes at width 1.
    """

    embedding: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Array, there: Array, start: Array, run: Run) -> Array:
        """[B, S, D], which positions exist [B, S], the key of the start -> [B, S, D]."""
        full_head = self.embedding // self.heads
        head, features = run.size(full_head), run.size(self.embedding)

        def linear(x: Array, to: int | tuple[int, ...], number: int, name: str, axis: tuple[int, ...] = (-1,)) -> Array:
            kind = nn.initializers.normal(0.02) if name.startswith("linear") else uniform_fan_in
            equal = lambda _, shape, dtype: kind(jax.random.fold_in(start, number), shape, dtype)  # noqa: E731
            return run.scale(nn.DenseGeneral(to, axis=axis, kernel_init=equal, name=name)(x))

        q, k, v = (linear(x, (self.heads, head), i, name) for i, name in enumerate(("query", "key", "value")))
        active = run.active(full_head)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(
            jnp.asarray(head if active is None else active, q.dtype)
        )
        scores = scores.astype(tree.wide(scores.dtype))
        weights = nn.softmax(jnp.where(there[:, None, None], scores, jnp.finfo(scores.dtype).min)).astype(v.dtype)
        y = linear(jnp.einsum("bhqk,bkhd->bqhd", weights, v), features, 3, "output", axis=(-2, -1))
        x = run.norm(x + run.drop(y, self.embedding, self.make_rng), self.embedding, "norm1")
        y = nn.gelu(linear(x, run.size(self.hidden), 4, "linear1"), approximate=False)
        y = linear(run.drop(y, self.hidden, self.make_rng), features, 5, "linear2")
        return run.norm(x + run.drop(y, self.embedding, self.make_rng), self.embedding, "norm2")


class Decoder(nn.Module):
    """From a layer's output to a logit for each token.

    ``z = W_2 norm(gelu(W_1 x))``; ``embedding`` are the features at width 1, ``classes`` the tokens.
    """

    embedding: int
    classes: int

    @nn.compact
    def __call__(self, x: Array, run: Run) -> Array:
        """[B, S, D] -> [B, S, C]."""
        x = nn.Dense(run.size(self.embedding), kernel_init=uniform_fan_in, name="linear1")(x)
        x = run.norm(nn.gelu(run.scale(x), approximate=False), self.embedding, "norm")
        return nn.Dense(self.classes, kernel_init=uniform_fan_in, name="linear2")(x)


class Transformer(BaseNet):
    """Encoder of HeteroFL's language model: post-norm, equal layers that start equal, a decoder without tied weights.

    Tokens are int32 [B, S], -1 where a window is shorter; the token ``classes`` stands for a hidden one. ``hidden`` is
    the feed-forward width of each layer. A sub-model keeps all heads and the leading part of each, and its attention
    is divided by the root of its own head width. With ``depth`` d > 0 only the first d layers are there and each has a
    decoder as its exit; without ``exits`` the last one has the only decoder. The official net scales whatever its
    switch says; here ``scaler`` is obeyed.

    Fields: ``hidden`` as above, ``embedding`` features of a token, ``heads``, ``length`` positions, ``dropout``,
    ``classes`` tokens, ``width`` and ``depth`` the level's.

    >>> from hetfl_jax.models.families import family
    >>> net = Transformer(hidden=(16, 16), embedding=8, heads=2, length=4, classes=10)
    >>> fam = family(net, [dict(width=1.0), dict(width=0.5)], jnp.zeros((1, 4), jnp.int32))
    >>> fam.windows["params", "layer_0", "linear1", "kernel"].extents.tolist()
    [[8, 16], [4, 8]]
    """

    hidden: Sequence[int] = (512, 512, 512, 512)
    embedding: int = 256
    heads: int = 8
    length: int = 64  #: positions
    dropout: float = 0.2
    norm: str = "ln"
    scaler: bool = True
    depth: int = 0
    exits: bool = True
    reads_tokens: ClassVar[bool] = True  #: windows of token ids in place of images or features
    drops_units: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.norm != "ln":
            raise ValueError(f"norm {self.norm!r} of the Transformer, allowed ln (family.norm)")
        if self.heads < 1 or self.embedding % self.heads:
            raise ValueError(f"embedding {self.embedding} with {self.heads} heads: need a multiple (family.embedding)")
        head = active_channels(self.embedding // self.heads, self.width)
        if self._channels(self.embedding) != self.heads * head:
            raise ValueError(
                f"embedding {self.embedding} at width {self.width:g} is not {self.heads} equal heads (family.mix)"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}, allowed 0 <= p < 1 (family.dropout)")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, capacity: Capacity | None = None) -> tuple[Array, ...]:
        """[B, S] int32 -> once [B, S, C], or ``depth`` times."""
        if x.ndim != 2 or x.shape[1] > self.length or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"examples of shape {x.shape[1:]}, {x.dtype}: the Transformer takes windows of at most {self.length} "
                "tokens, int32 (data.source, family.length)"
            )
        run = Run(self.width, self.scaler, self.dropout, train, capacity)
        start = self.make_rng("params") if self.is_initializing() else jax.random.key(0)
        there = x >= 0

        def embedded(rows: Array, count: int, name: str) -> Array:
            normal = nn.initializers.normal(1.0)
            return run.scale(nn.Embed(count, run.size(self.embedding), embedding_init=normal, name=name)(rows))

        x = embedded(jnp.maximum(x, 0), self.classes + 1, "tokens") + embedded(
            jnp.arange(x.shape[1]), self.length, "positions"
        )
        x = run.drop(run.norm(x, self.embedding, "norm"), self.embedding, self.make_rng)
        exits = []
        for i, hidden in enumerate(self.hidden[: self.depth or None]):
            x = Layer(self.embedding, self.heads, hidden, name=f"layer_{i}")(x, there, start, run)
            if self.depth and self.exits:
                exits.append(Decoder(self.embedding, self.classes, name=f"head_{i}")(x, run))
        return tuple(exits or [Decoder(self.embedding, self.classes, name="head")(x, run)])
