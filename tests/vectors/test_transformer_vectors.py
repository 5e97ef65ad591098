"""HeteroFL's Transformer against numbers of the official code: cut, forward, gradients, combine."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Within
from hetfl_jax.models import Transformer, families, windows
from hetfl_jax.parts import objective
from tests.helpers import loss_of
from tests.vectors.discover import below, of_kind, read
from tests.vectors.test_heterofl_vectors import assert_trees, combine, shard_of

pytestmark = pytest.mark.vectors

NAMES = {"linear_q": "query", "linear_k": "key", "linear_v": "value", "linear_o": "output", "decoder": "head"}
FILES = of_kind("width/o3?_heterofl_transformer*")


def place(name):
    """Where an official parameter lives."""
    parts = name.split(".")
    *where, leaf = [NAMES.get(part, part) for part in parts]
    if "positional_embedding" in where:
        return "positions", "embedding"
    if where[-1] == "embedding":
        return "tokens", "embedding"
    leaf = "scale" if leaf == "weight" and "norm" in where[-1] else {"weight": "kernel"}.get(leaf, leaf)
    if where[0] == "transformer_embedding":
        return "norm", leaf
    if where[0] == "head":
        return "head", where[1].replace("norm1", "norm"), leaf
    return f"layer_{where[2]}", where[-1], leaf


def to_tree(arrays, heads):
    """Official arrays as a nested dict: linear weights [in, out], those of attention by head."""
    out = {}
    for name, value in arrays.items():
        *where, leaf = place(name)
        if leaf == "kernel":
            value = value.T
        if where[-1] in ("query", "key", "value"):
            value = value.reshape(*value.shape[:-1], heads, -1)
        elif where[-1] == "output" and leaf == "kernel":
            value = value.reshape(heads, -1, value.shape[-1])
        inner = out
        for part in where:
            inner = inner.setdefault(part, {})
        inner[leaf] = jnp.asarray(value)
    return out


def family(z):
    start = below(z, "global_in")
    hidden = [v.shape[0] for k, v in start.items() if re.search(r"layers\.\d+\.linear1\.weight", k)]
    full = start["transformer_embedding.embedding.weight"]
    module = Transformer(
        hidden=tuple(hidden), embedding=full.shape[1], heads=int(z["num_heads"]), length=int(z["bptt"]),
        classes=len(full) - 1, dropout=float(z["dropout"]) if "dropout" in z else 0.0,
    )  # fmt: skip
    # Shrinking is by the rate relative to the global model's.
    globally = full.shape[1] / int(z["embedding_size"])
    levels = [{"width": 1.0}] + [{"width": float(rate) / globally} for rate in z["rates"]]
    return families.family(module, levels, jnp.zeros((1, z["tokens"].shape[1]), jnp.int32))


@pytest.mark.parametrize("name", FILES)
def test_cut_and_combine(name):
    z = read(name)
    heads, fam = int(z["num_heads"]), family(z)
    start = below(z, "global_in")
    variables = {"params": to_tree(start, heads)}
    replies = []
    for user in range(len(z["rates"])):
        # Every entry of the global model is told apart by its number, so a cut shows its index sets.
        numbers = {k: np.arange(v.size, dtype=np.float64).reshape(v.shape) for k, v in start.items()}
        index = {k: z[f"user{user}/idx/{k}"] for k in start if f"user{user}/idx/{k}" in z} | {
            k: np.ix_(z[f"user{user}/idx_out/{k}"], z[f"user{user}/idx_in/{k}"])
            for k in start
            if f"user{user}/idx_out/{k}" in z
        }
        assert set(index) == set(start)
        cut = windows.narrow(fam, {"params": to_tree(numbers, heads)}, user + 1)
        assert_trees(cut["params"], to_tree({k: numbers[k][index[k]] for k in start}, heads), 0)
        given = windows.narrow(fam, variables, user + 1)
        assert_trees(given["params"], to_tree(below(z, f"user{user}/given"), heads), 0)
        returned = {"params": to_tree(below(z, f"user{user}/returned"), heads)}
        held = shard_of(z[f"user{user}/label_split"], classes=int(z["num_tokens"]))
        replies.append((user + 1, held, given, returned))
    combined, _ = combine(fam, variables, replies)
    assert_trees(combined["params"], to_tree(below(z, "global_out"), heads), 1e-6)
    hidden_token = combined["params"]["tokens"]["embedding"][-1]
    np.testing.assert_array_equal(hidden_token, variables["params"]["tokens"]["embedding"][-1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_forward_loss_and_gradients(name, masked):
    z = read(name)
    heads, fam = int(z["num_heads"]), family(z)
    tokens = jnp.asarray(z["tokens"], jnp.int32)
    seen = jnp.where(z["corruption_mask"] == 1, int(z["num_tokens"]), tokens)
    held = shard_of(z["loss_label_split"], classes=int(z["num_tokens"]))
    variables = {"params": to_tree(below(z, "global_in"), heads)}
    goal, valid = objective.masked_cross_entropy(), jnp.ones(len(tokens), bool)

    def loss(params, level, train):
        view = families.view(fam, variables, level)
        exits, _ = view.apply({"params": params}, seen, train=train)
        rows = objective.by_label(exits, tokens, valid)
        return loss_of(goal, rows[0], view.active, *rows[1:], held), goal.local(exits, held)[-1]

    def both(level):
        """Training with its gradients, and evaluation."""
        params = families.view(fam, variables, level).variables["params"]
        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params, level, True)
        return {"train": (value, logits), "eval": loss(params, level, False)}, gradient

    run = jax.jit(lambda level: both(Within(0, level))) if masked else jax.jit(both, static_argnums=0)
    for user in range(len(z["rates"])):
        found, gradient = run(user + 1)
        for mode, (value, logits) in found.items():
            wanted = z[f"user{user}/{mode}/logits_N_V_S"].transpose(0, 2, 1)
            np.testing.assert_allclose(logits, wanted, atol=1e-5)
            np.testing.assert_allclose(value, z[f"user{user}/{mode}/loss"], atol=1e-5)
        own = windows.narrow(fam, {"params": gradient}, user + 1)["params"] if masked else gradient
        assert_trees(own, to_tree(below(z, f"user{user}/train/grad"), heads), 1e-5)
