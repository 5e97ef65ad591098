"""The benchmarks run as they stand, at their smallest."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.ifca_rotated_mnist import alone
from experiments.ifca_synthetic import recover
from experiments.throughput import aggregation, common, compare, scaling
from hetfl_jax.core import machine
from hetfl_jax.engine.runners import executed_steps
from hetfl_jax.models import windows
from hetfl_jax.run import federation
from hetfl_jax.run.cli import config_of
from tests.helpers import DATA, need

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_a_benchmark_prints_and_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "use_cache", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--only", "zero_steps", "compilations", "--repeats", "1"])
    compare.main()
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert kept["command"] == "python -m experiments.throughput.compare --only zero_steps compilations --repeats 1"
    assert {"date", "device", "jax", "cores"} <= set(kept)
    assert kept["rows"][1]["value"] == 0, "nothing compiles after the first round"
    assert (tmp_path / "compare.png").stat().st_size > 0
    assert "Compilations in 20 rounds" in capsys.readouterr().out


def test_every_aggregation_rule_reads_its_bytes():
    rows = aggregation.measure(0.1, 6, repeats=1)
    assert len(rows) == 10
    assert all(row["GB/s"] > 0 and row["MB"] > 0 for row in rows)
    sizes = {row["rule"]: row["MB"] for row in rows}
    assert sizes["five levels, stacked"] < 0.5 * sizes["one level, stacked"]


def test_stacked_and_streaming_sums_agree():
    fam = aggregation.cnn(0.02, "a1-b1")
    trees = aggregation.stacks(fam, 5)
    mean, coverage = aggregation.stacked(fam, trees, False)()
    total = aggregation.streaming(fam, trees)()
    for m, c, t in zip(*(windows.flat(v).values() for v in (mean, coverage, total))):
        np.testing.assert_allclose(m * c, t, rtol=1e-6)
        assert c.max() == 5


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_cluster_sums_are_those_of_each_cluster(backend, monkeypatch):
    """Also the form that accelerators take, a product, here on a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(aggregation, "AT_ONCE", 4)
    draw = np.random.default_rng(0).normal
    trees = [[draw(size=shape).astype(np.float32) for shape in ((6, 3, 2), (6, 250, 160), (6, 1 << 14), (6,))]]
    for k in (1, 4):
        wanted = [np.stack([leaf[j::k].sum(0) for j in range(k)]) for leaf in trees[0]]
        for together in (True, False):
            found = aggregation.clusters(trees, k, together)()
            for f, w in zip(found, wanted, strict=True):
                np.testing.assert_allclose(f, w, atol=1e-6)


def test_clients_alone_learn_their_own_kind_of_image(monkeypatch):
    need("mnist.npz")
    monkeypatch.setenv("HETFL_DATA", str(DATA))
    given = [
        f"--config={ROOT}/configs/ifca_rotated_mnist.py:quick",
        "--config.train.epochs=100",
        "--config.data.examples=400",
    ]
    fed = federation.build(config_of(given))
    found = alone.accuracies(fed, 0)
    assert found.shape == (8,)
    assert found.min() > 0.5, "a tenth by chance"


def test_flops_leave_out_the_first_layers_input_gradient():
    """The MLP 784-200-10: 3 x (156,800 + 2,000) multiply-adds less the first layer's 156,800."""
    assert common.training_flops(common.family("mlp"), 0) == 2 * (3 * 158_800 - 156_800)
    assert common.training_flops(common.family("cnn"), 0) * 20 == pytest.approx(1.448e9, rel=1e-3)


def test_sorted_chunks_waste_little_on_log_normal_sizes():
    """100 clients a round, one at a time as on a CPU, and in chunks of 8; padding to the longest would execute 13 x."""
    waste = {1: [], 8: []}
    steps = -(-scaling.sizes("log-normal(1)", 1_000) // 20)
    for seed in range(50):
        chosen = np.random.default_rng(seed).choice(steps, 100, replace=False)
        for chunk in waste:
            waste[chunk].append(executed_steps(chosen, chunk) / chosen.sum())
    assert np.mean(waste[1]) == 1
    assert np.mean(waste[8]) <= 1.4
    assert steps.max() / steps.mean() > 10


def test_the_library_tells_of_idle_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine.jax, "device_count", lambda: 1)
    with pytest.warns(UserWarning, match="one CPU device for 4 cores"):
        machine.warn_of_idle_cores()


def test_synthetic_centres_are_found_by_the_restart_that_the_loss_prefers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recover, "__file__", str(tmp_path / "recover.py"))
    monkeypatch.setattr(machine, "use_cache", lambda: tmp_path)
    monkeypatch.setattr(machine, "use_all_cores", lambda: None)
    sizes = ["--clients", "40", "--examples", "20", "--dimensions", "20", "--restarts", "4", "--data-seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["recover.py", *sizes])
    recover.main()
    (row,) = json.loads((tmp_path / "results" / "p2_r1.json").read_text())["rows"]
    assert row["successes"] >= 1
    assert row["chosen by loss"] == min(row["distances"]) < 0.06
    assert "chosen by loss" in capsys.readouterr().out
