"""Every config runs in its quick form, and real MNIST is learned."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.run import train as run
from hetfl_jax.run.cli import config_of
from hetfl_jax.run.config import changed
from hetfl_jax.run.lab import prepare
from tests.helpers import DATA, TINY_FLAGS, need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
CONFIGS.append("heterofl_wikitext2.py:method=inclusivefl")
#: Compiling is what a config costs, so these, whose method, net and data others run to the end, are only traced.
TRACED = {
    "depthfl_cifar10.py", "heterofl_wikitext2.py", "inclusivefl_mnist.py",
    "fedprox_mnist.py", "heterofl_mnist.py", "heterofl_cifar10.py", "feddyn_mnist.py", "depthfl_cifar100.py",
    "ifca_mnist_writers.py", "ifca_rotated_cifar10.py", "heterofl_wikitext2.py:method=inclusivefl",
    "fjord_cifar10.py", "splitmix_cifar10.py", "splitmix_digits.py",
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_quick(name, tmp_path, monkeypatch):
    """Each config, traced or to the end, on few clients; CIFAR-10's on random images, WikiText-2's on random tokens."""
    monkeypatch.setenv("HETFL_DATA", str(DATA))
    source = ""
    if "mnist" in name:
        need("mnist.npz")
    if "wikitext2" in name:  # the real vocabulary makes a step of compiled-in-haste code slow
        train, test = np.random.default_rng(0).integers(0, 40, (2, 4000))
        np.savez(tmp_path / "wikitext2.npz", train=train, test=test)
        source = f"source=text:{tmp_path}/wikitext2.npz,"
    if "cifar" in name:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (120, 32, 32, 3)).astype(np.uint8), np.arange(120) % 10
        np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x[:40], y_test=y[:40])
        source = f"source=npz:{tmp_path}/cifar10.npz,"
    with_args = name if ":" in name else f"{name}:"
    tiny = [flag for flag in TINY_FLAGS if "synthetic" not in name or "examples" not in flag]
    if name == "lag_mnist.py":  # everybody takes part
        tiny = [flag for flag in tiny if "cohort" not in flag]
    command = [f"--config={ROOT}/configs/{with_args},{source}quick", *tiny, f"--config.run.folder={tmp_path}"]
    config = config_of(command)
    if name in TRACED:
        lab = prepare(config)
        state = jax.eval_shape(lab.start)
        after, info = jax.eval_shape(lab.step, state, lab.population, lab.key)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        scores = jax.eval_shape(partial(lab.evaluate, 0, 0), state.server, ())
        assert info.numbers["train_loss"].shape == scores["accuracy"].shape == ()
        return
    result = run.train(config, quiet=True)
    assert result.summary["rounds"] == 2
    assert all(0 <= row["last"] <= 1 for row in result.table)


@pytest.mark.parametrize("name", ["feddyn_mnist", "qffl_synthetic"])
def test_a_quick_run_learns_what_one_sees(name, tmp_path, monkeypatch):
    need("mnist.npz")
    monkeypatch.setenv("HETFL_DATA", str(DATA))
    result = run.train(config_of([f"--config={name}:quick", f"--config.run.folder={tmp_path}"]), quiet=True)
    assert result.table[0]["last"] > 0.5 > 0.2 > result.table[0]["start"], "a tenth by chance"


@pytest.mark.as_users
def test_mnist_is_learned(tmp_path, monkeypatch):
    """FedAvg and HeteroFL with an MLP on all of real MNIST: far above chance in eight rounds."""
    need("mnist.npz")
    monkeypatch.setenv("HETFL_DATA", str(DATA))
    changes = ["--config.train.rounds=8", "--config.train.epochs=1", "--config.run.eval_every=8"]
    changes += ["--config.train.devices=2", f"--config.run.folder={tmp_path}"]
    base = f"--config={ROOT}/configs/fedavg_mnist.py:net=mlp"
    plain = run.train(config_of([base, *changes]), quiet=True)
    assert plain.table[0]["last"] > 0.9
    net = ["--config.family.net=mlp", "--config.family.hidden=(64,)", "--config.family.norm=none"]
    base = f"--config={ROOT}/configs/heterofl_mnist.py:mix=a1-b1"
    levels = run.train(config_of([base, *changes, *net, "--config.train.learning_rate=0.05"]), quiet=True).table
    assert all(row["last"] > 0.85 > 0.3 > row["start"] for row in levels)


def test_a_config_file_changes_keys_that_there_are():
    with pytest.raises(ValueError, match="block 'model' is not one of data, family, method"):
        changed(data={}, model={})
    with pytest.raises(ValueError, match="key 'train.epoch' is not one of rounds, epochs"):
        changed(train=dict(epoch=3))
