"""JAX's own search for NaN and infinity runs through: what is absent is told by a mask or a finite number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.absent import HIGHEST, LOWEST, quantile_among
from hetfl_jax.methods.ifca import _least
from hetfl_jax.parts import choose
from hetfl_jax.run.cli import main
from hetfl_jax.run.config import load_config
from hetfl_jax.run.lab import evaluate_tiers, prepare

pytestmark = pytest.mark.slow

SMALL = (
    "family.net=mlp", "family.hidden=(8,)", "family.norm=none", "data.examples=120", "data.clients=6",
    "method.args.cohort=3", "train.epochs=1", "train.milestones=()", "train.devices=1",
)  # fmt: skip
DEPTHS = ("family.hidden=(8,8)", "run.eval_masked=False")
STARTS = ("method.args.clusters=2", "method.args.restarts=2", "method.args.restart_rounds=1")
SPLITS = ("method.args.eps1=10.0", "method.args.eps2=20.0", "method.args.first_round=1", "method.args.max_clusters=3")
ASKED = ("select.name=power_of_choice", "select.args.candidates=4")
CODED = (
    "uplink.name=top_k", "uplink.args.fraction=0.1", "uplink.error_feedback=True", "downlink.name=uniform",
    "downlink.args.bits=8", "downlink.error_feedback=True",
)  # fmt: skip
#: by method: the levels and what else is set
CASES = {
    "heterofl": ("a1-b1", (*ASKED, "select.args.kind=rpow", *CODED, "capacity.name=fixed")),
    "depthfl": ("2x1-1x1", DEPTHS),
    "ifca": ("a1", STARTS),
    "cfl": ("a1", (*SPLITS, "method.args.min_clients=3")),
    "scaffold": ("a1", ("train.momentum=0.0", "select.name=active")),
    "feddyn": ("a1", ("select.name=oort", "select.args.cap=10")),
    "qffl": ("a1", ("method.args.q=5.0", *ASKED)),
    "fedavg": ("a1", ("train.executor=debugging", *ASKED, "select.args.kind=adapow", "select.args.every=1")),
}


@pytest.fixture
def searching():
    """Every result of a compiled program is searched, and so is every operation outside of one."""
    for name in ("jax_debug_nans", "jax_debug_infs"):
        jax.config.update(name, True)
    yield
    for name in ("jax_debug_nans", "jax_debug_infs"):
        jax.config.update(name, False)


@pytest.mark.parametrize("method", CASES)
def test_rounds_and_evaluation_have_no_nan_and_no_infinity(method, searching, tmp_path):
    mix, changes = CASES[method]
    given = (f"method.name={method}", *SMALL, *changes, f"run.folder={tmp_path}")
    lab = prepare(load_config(f"heterofl_digits:mix={mix}", *given, tell=lambda text: None))
    state = lab.start()
    for _ in range(1 if "train.executor=debugging" in changes else 2):
        state, _ = lab.step(state, lab.population, lab.key)
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(np.isfinite(leaf).all() for leaf in jax.device_get(leaves))
    assert 0 <= evaluate_tiers(lab, state)["accuracy"][lab.federation.tiers[0].name] <= 1


def test_a_whole_run_does(searching, tmp_path):
    """Plots, checkpoints and tables too; no answer of a client's is right, so some figures are none."""
    changes = (*SMALL, "method.name=fedavg", "train.rounds=1", "train.learning_rate=1e-9", "data.own_test=0.2")
    arguments = [f"--config.{change}" for change in (*changes, f"run.folder={tmp_path}")]
    assert main(["train", "--config=heterofl_digits:mix=a1", *arguments]) == 0


def test_the_search_finds_what_there_is(searching):
    with pytest.raises(FloatingPointError):
        jax.jit(lambda v: v / 0)(jnp.ones(2))


def test_absent_scores_are_finite(searching):
    best = choose.largest(jnp.arange(3), jnp.array([LOWEST, 2.0, HIGHEST]), 3)
    assert best.ids.tolist() == [2, 1, 0]
    assert best.valid.tolist() == [True, True, False]
    assert choose.draw_without_replacement(jax.random.key(0), jnp.array([0, 0, 3]), 3)[0] == 2
    assert _least(jnp.full((1, 2), HIGHEST)).tolist() == [0]


def test_the_quantile_of_those_that_are_there():
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 7):
        values, there = rng.normal(size=9).astype(np.float32), np.arange(9) < count
        for q in (0.0, 0.3, 0.98, 1.0):
            wanted = np.quantile(values[there], q) if count else 0.0
            found = quantile_among(jnp.asarray(values), jnp.asarray(there), q)
            assert float(found) == pytest.approx(wanted, abs=1e-6)
