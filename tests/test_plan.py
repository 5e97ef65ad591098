"""Rounds compile for TPUs that are not here, and what their compiler planned is read."""

import importlib.util

import jax
import pytest

from hetfl_jax.engine.topology import target
from hetfl_jax.run.cli import main
from hetfl_jax.run.config import load_config
from hetfl_jax.run.plan import describe, plan

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'hetfl_jax[tpu-plan]'"
)

SMALL = (
    "data.examples=200",
    "data.clients=20",
    "method.args.cohort=8",
    "family.norm=none",
    "family.scaler=false",
    "train.momentum=0.0",
    "train.weight_decay=0.0",
    "train.clip_norm=0.0",
)
PLAIN = ("family.net=mlp", "family.hidden=(8,8)")
EXITS = ("family.net=resnet18_exits", "method.name=depthfl")
ROWS = {
    "mlp on a slice of 64": ("heterofl_digits:mix=a1", "v5e:8x8", PLAIN),
    "cnn": ("heterofl_digits:mix=a1", "v5e:2x2", ("family.net=cnn", "family.hidden=(8,8,16)", "method.name=fedavg")),
    "resnet of exits": ("heterofl_digits:mix=2x1", "v4:2x2x1", (*PLAIN, *EXITS)),
    "ifca": ("heterofl_digits:mix=a1", "v5e:2x2", (*PLAIN, "method.name=ifca")),
    "client memory": ("heterofl_digits:mix=a1", "v4:2x2x1", (*PLAIN, "method.name=scaffold")),
}  # fmt: skip


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_rounds_and_evaluation_compile_for_a_tpu(name):
    config, where, changes = ROWS[name]
    found = plan(load_config(config, *SMALL, *changes), where)
    assert found.chips == target(where).mesh.size
    assert found.fits
    assert 0 < found.round.megabytes < found.room
    assert 0 < found.milliseconds < 1_000
    assert 0 < found.utilisation < 1
    assert 0 < found.evaluation_milliseconds < 1_000
    assert name == "ifca" or not found.evaluation.schedule.once
    assert found.round.schedule.cycles > sum(op.cycles for op in found.round.schedule.dearest[:1])
    kept = name in ("client memory", "resnet of exits")
    kinds = [kind for kind, _ in found.round.schedule.collectives]
    assert len(kinds) <= (4 if kept else 2), "totals and reports; rows of memory, to those that run them and back"
    text = describe(found)
    assert "not run there" in text
    assert "fits" in text
    assert jax.default_backend() == "cpu"


@needs_libtpu
@pytest.mark.slow
def test_the_command_prints_the_plan(capsys):
    changes = [f"--config.{change}" for change in (*SMALL, *PLAIN)]
    assert main(["train", "--config=heterofl_digits:mix=a1-b1", *changes, "--dry-run", "--target=v5e:2x2"]) == 0
    out = capsys.readouterr().out
    for part in (
        "v5e:2x2, 4 chips",
        "buckets        ab",
        "MB a chip",
        "ms estimated",
        "an evaluation",
        "collectives",
        "dearest operations",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--target=v9:2x2"], "target 'v9:2x2': need one of v4, v5e, v5p, v6e and a shape"),
        (["--dry-run", "--target=v5e"], "target 'v5e': need one of"),
        (["--target=v5e:2x2"], "--target=v5e:2x2 is for --dry-run"),
        pytest.param(["--dry-run", "--target=v5e:3x5"], "target 'v5e:3x5': ", marks=needs_libtpu),
        pytest.param(
            ["--dry-run", "--target=v5e:2x2", "--config.train.store=host"], "store 'host' with --target: need 'device'",
            marks=needs_libtpu,
        ),
    ],
)  # fmt: skip
def test_wrong_targets_end_in_one_line(arguments, message, capsys):
    assert main(["train", "--config=heterofl_digits", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("hetfl: ")
