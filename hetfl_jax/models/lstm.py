"""A recurrent language model whose hidden units can be cut, every gate alike."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from hetfl_jax.core.types import Array
from hetfl_jax.models.layers import dense_layer
from hetfl_jax.models.nets import BaseNet, Capacity


class LSTM(BaseNet):
    """Next-token model: embedding, LSTM layers, linear; 213,712 parameters at 80 tokens.

    ``i, f, g, o = x W + h V + a + b`` with W [I, 4, H], V [H, 4, H] and a, b [4, H];
    ``c <- sigmoid(f) c + sigmoid(i) tanh(g)``, ``h <- sigmoid(o) tanh(c)``. A narrower net has the leading units of
    every gate; the embedding is not cut. All start values are uniform within 1 / sqrt(H), as in PyTorch.

    Tokens are int32 [B, S], -1 where a window is shorter. The logits at a place say what stands there from the tokens
    before it, so labels are the tokens themselves.

    Fields: ``hidden`` units of each layer at width 1, ``embedding`` size of a token's vector, ``classes`` tokens.

    Source: the Shakespeare net of McMahan et al. 2017, as FjORD's code has it.

    >>> from hetfl_jax.models.costs import costs
    >>> from hetfl_jax.models.families import family
    >>> costs(family(LSTM(classes=80), [dict(width=1.0)], jnp.zeros((1, 20), jnp.int32))).parameters.tolist()
    [213712]
    """

    hidden: Sequence[int] = (128, 128)
    embedding: int = 8
    reads_tokens: ClassVar[bool] = True  #: windows of token ids in place of images or features
    hides_tokens: ClassVar[bool] = False  #: whether there is a token that stands for a hidden one

    def __post_init__(self) -> None:
        if self.norm != "none":
            raise ValueError(f"norm {self.norm!r} of the LSTM, allowed none (family.norm)")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, capacity: Capacity | None = None) -> tuple[Array]:
        """[B, S] int32 -> once [B, S, C]."""
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"examples of shape {x.shape[1:]}, {x.dtype}: the LSTM takes windows of tokens, int32 "
                             "(data.source)")  # fmt: skip
        rows = nn.Embed(self.classes, self.embedding, embedding_init=nn.initializers.normal(1.0), name="tokens")
        y = jnp.pad(rows(jnp.maximum(x[:, :-1], 0)), ((0, 0), (1, 0), (0, 0)))  # nothing stands before the first
        for i, full in enumerate(self.hidden):
            kept = self._kept(full, capacity)
            y = self._layer(y, self._channels(full), i, kept)
        return (dense_layer(y, self.classes, name="head"),)

    def _layer(self, x: Array, units: int, number: int, kept: Array | None) -> Array:
        """[B, S, I] -> [B, S, H], without the units that are dropped."""
        start = nn.initializers.uniform(2 * units**-0.5)

        def weight(name: str, *shape: int) -> Array:
            centred = lambda key, shape: start(key, shape) - units**-0.5  # noqa: E731
            return self.param(f"lstm_{number}_{name}", centred, (*shape, 4, units))

        inputs = jnp.einsum("bsi,igh->sbgh", x, weight("input", x.shape[-1]))
        recurrent, bias = weight("recurrent", units), weight("input_bias") + weight("recurrent_bias")

        def step(carry: tuple[Array, Array], given: Array) -> tuple[tuple[Array, Array], Array]:
            h, c = carry
            i, f, g, o = jnp.moveaxis(given + jnp.einsum("bi,igh->bgh", h, recurrent) + bias, 1, 0)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            h = h if kept is None else jnp.where(kept, h, 0.0)
            return (h, c), h

        zero = jnp.zeros((x.shape[0], units), inputs.dtype)
        return jnp.moveaxis(jax.lax.scan(step, (zero, zero), inputs)[1], 0, 1)
