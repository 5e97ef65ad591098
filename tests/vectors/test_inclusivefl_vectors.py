"""InclusiveFL's sharing and momentum against the official code (with its defects mended where the file says so)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hetfl_jax.models import windows
from hetfl_jax.parts import sharing
from tests.vectors.discover import below, of_kind, read

pytestmark = pytest.mark.vectors


def place(name):
    """(top-level name, rest) of an official entry."""
    if found := re.search(r"encoder\.layer\.(\d+)\.(.*)", name):
        return f"layer_{found[1]}", found[2]
    top = re.match(r"(?:\w+\.)?(pooler|classifier|embeddings)\.(.*)|(\w+)\.(.*)", name)
    kind, rest = (top[1], top[2]) if top[1] else (top[3], top[4])
    return ("head" if kind == "classifier" else kind), rest


def stacked(types):
    """Official states of all types as one stack; what a type lacks is zero."""
    shapes = {place(name): value.shape for arrays in types for name, value in arrays.items()}
    rows = [{place(name): value for name, value in arrays.items()} for arrays in types]
    out = {}
    for (top, rest), shape in shapes.items():
        out.setdefault(top, {})[rest] = jnp.stack([jnp.asarray(r.get((top, rest), np.zeros(shape))) for r in rows])
    return out


def assert_types(found, wanted, skip=(), atol=1e-6):
    leaves = windows.flat(found)
    for t, arrays in enumerate(wanted):
        for name, value in arrays.items():
            if (t, name) not in skip:
                np.testing.assert_allclose(leaves[place(name)][t], value, atol=atol, err_msg=f"type {t}: {name}")


def types_below(z, prefix, count):
    return [below(z, prefix.format(t)) for t in range(count)]


def depths_of(z, states):
    if "num_hidden_layers" in z:
        return z["num_hidden_layers"].tolist()
    numbers = [[int(m[1]) for m in (re.search(r"encoder\.layer\.(\d+)", k) for k in s) if m] for s in states]
    return [max(n) + 1 for n in numbers]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", of_kind("depth/inclusivefl_aggregate*"))
def test_layers_are_shared(name):
    z = read(name)
    cases = sorted({key.split("/")[0] for key in z if key.endswith("/portion")})
    assert cases
    for case in cases:
        count = len(z[f"{case}/portion"])
        given = types_below(z, f"{case}/in/type{{}}", count)
        dropped = np.atleast_1d(z[f"{case}/drop_idx"]).astype(int).tolist() if f"{case}/drop_idx" in z else []
        dropped = [t for t in dropped if t >= 0]
        before = stacked(given)
        found = sharing.share(before, jnp.asarray(z[f"{case}/portion"]), depths_of(z, given), dropped)
        wanted = types_below(z, f"{case}/out/type{{}}", count)
        nan = {(t, k) for t, arrays in enumerate(wanted) for k, v in arrays.items() if np.isnan(v).any()}
        assert_types(found, wanted, nan)
        # The published code divides by zero where the only owners are absent; here the old value stays.
        for t, key in nan:
            np.testing.assert_array_equal(windows.flat(found)[place(key)][t], given[t][key])
        assert bool(nan) == bool(z[f"{case}/nan_names"].size if f"{case}/nan_names" in z else nan)


def optimizer_of(name, z):
    """The file's optimizer apart from its rate: its last word, and the settings that it has."""
    kind = name.split("momentum_corrected_")[1].split("_")[0]
    if kind == "sgd":
        return optax.identity(), 0.0
    betas = np.atleast_1d(z.get("betas", (0.9, 0.999)))
    found = {"b1": betas[0], "b2": betas[1], "eps": float(z.get("eps", z.get("adam_epsilon", 1e-8)))}
    rules = {"adam": optax.scale_by_adam, "adamw": optax.scale_by_adam}
    return rules[kind](**found), float(z.get("weight_decay", 0.0))


@pytest.mark.parametrize("name", of_kind("depth/inclusivefl_momentum_corrected_*"))
def test_momentum_distillation(name):
    z = read(name)
    beta, rates = float(z["beta"]), np.atleast_1d(z["lr"])
    depths = z["num_hidden_layers"].tolist()
    count = len(depths)
    now = stacked(types_below(z, "r0/type{}", count))
    taught, known = None, jnp.zeros(count, bool)
    rule, decay = optimizer_of(name, z)
    slot = rule.init(now)
    for r in range(1, int(z["rounds"]) + 1):
        gradients = stacked(types_below(z, f"r{r}/type{{}}/collected_grad", count))
        mixed = sharing.mix(gradients, taught, beta, depths, known) if taught else gradients
        # The file's schedule: linear to zero over 2,000 updates.
        rate = jnp.asarray(rates * (2001 - r) / 2000)
        step, slot = rule.update(mixed, slot, now)
        of = lambda v: rate.reshape(-1, *[1] * (v.ndim - 1))  # noqa: B023, E731
        now = jax.tree.map(lambda v, d: v - of(v) * (d + decay * v), now, step)  # noqa: B023
        assert_types(now, types_below(z, f"r{r}/type{{}}/after_update", count))
        now = sharing.share(now, jnp.asarray(z[f"r{r}/portion"]), depths)
        assert_types(now, types_below(z, f"r{r}/type{{}}/after_aggregate", count))
        taught = sharing.momentum(gradients, depths)
        known = jnp.asarray([above is not None for above in sharing.next_larger(depths)])
        for t in range(count):
            for key, value in below(z, f"r{r}/type{t}/grad_momentum").items():
                np.testing.assert_allclose(taught["layer"][key][t], value, atol=1e-6, err_msg=f"type {t}: {key}")
