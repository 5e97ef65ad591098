"""Small federations for tests: a two-level MLP with 8 hidden units on random data, ragged clients; and real data."""

import ctypes
import gc
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import Batch, ClientContext
from hetfl_jax.data.population import population
from hetfl_jax.models import build, families
from hetfl_jax.parts.compose import Sent, trained_leaves
from hetfl_jax.parts.local import local, train

DATA = Path(os.environ.get("HETFL_DATA", Path(__file__).parents[2] / "shared" / "data"))
LEVELS = ({"width": 1.0}, {"width": 0.5})


def toy_population(clients=12, features=6, classes=3, seed=0, image=False, levels=2):
    """Clients of 3 to 11 examples; class 2 is held by few."""
    rng = np.random.default_rng(seed)
    size = rng.integers(3, 12, clients)
    n = int(size.sum())
    y = rng.integers(0, classes - 1, n)
    y[: size[0]] = classes - 1
    x = (
        rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8)
        if image
        else rng.normal(size=(n, features)).astype(np.float32)
    )
    return population(x, y, np.arange(n), size, level=np.arange(clients) % levels, levels=levels, classes=classes)


def mlp_family(levels=LEVELS, features=6, classes=3, **fields):
    return families.family(build("mlp", hidden=(8,), classes=classes, **fields), levels, jnp.zeros((1, features)))


def exits_family(levels=({"depth": 2}, {"depth": 1}), features=6, classes=3, hidden=(8, 8), **fields):
    module = build("mlp", hidden=hidden, classes=classes, **fields)
    return families.family(module, levels, jnp.zeros((1, features)))


def conv_family(levels=LEVELS, classes=3, **fields):
    module = build("conv", hidden=(8, 8), classes=classes, **fields)
    prepare = lambda x, key: x.astype(jnp.float32) / 255  # noqa: E731
    return families.family(module, levels, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8), prepare)


def forget_programs():
    """Drop all compiled programs; what they took goes back to the system."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def resident_megabytes():
    """What this process holds in memory; infinite where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("inf")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024


#: changes that make a ``quick`` config as small as a test wants it
TINY = (
    "data.examples=400", "method.args.cohort=4", "train.rounds=2", "train.epochs=1", "run.eval_every=1",
    "run.checkpoint_every=1",
)  # fmt: skip
TINY_FLAGS = tuple(f"--config.{change}" for change in TINY)


def image_family(levels=LEVELS, classes=3, **fields):
    """An MLP of images of 8 x 8: the net of images that compiles fastest."""
    module = build("mlp", hidden=(8,), classes=classes, **fields)
    prepare = lambda x, key: x.astype(jnp.float32) / 255  # noqa: E731
    return families.family(module, levels, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.uint8), prepare)


def sgd(**changes):
    return local(**({"learning_rate": 0.1, "batch_size": 4, "epochs": 2, "momentum": 0.5, "clip_norm": 1.0} | changes))


def worst(a, b):
    """Largest absolute difference between two trees of one structure."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(jnp.asarray(u, jnp.float32) - jnp.asarray(v, jnp.float32)).max()) for u, v in pairs)


def need(name):
    """Skip a test without its data, fail where everything is to be tested."""
    if not (DATA / name).exists():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs {name} in {DATA} (HETFL_DATA)")
        pytest.skip(f"no {name} in {DATA}; HETFL_DATA names its folder")


def context(level=0, shard=None, **known):
    """What a client knows: a level, its shard, and whatever a test adds."""
    given = {"key": jax.random.key(0), "round": jnp.int32(0), "ticket": (), "sent": (), "memory": {}}
    return ClientContext(**{**given, "level": level, "shard": shard, **known})


def loss_of(goal, exits, active, labels, valid, shard=None, round=0):
    """An objective's loss of given exits, without a net."""
    forward = lambda x: (exits, active, {})  # noqa: E731
    return goal.loss(forward, Batch(None, labels, valid), context(shard=shard, round=jnp.int32(round)))[0]


def trained(settings, fam, view, level, goal, rule, shard, *, received=None, memory=None, round=0):
    """A client's local training from ``view.variables``, having received them, or something else."""
    sent = Sent(view.variables if received is None else received)
    told = context(level, shard, sent=sent, memory=memory or {}, round=jnp.int32(round))
    trains = trained_leaves(fam, goal, rule)
    return train(settings, view, fam.prepare, goal, rule, told, lambda path: trains(path, level))
