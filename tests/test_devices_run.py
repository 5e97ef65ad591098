"""Runs with devices: what is written and said, resume, the page, and both sides of one config."""

import json
import re

import numpy as np
import pytest

from hetfl_jax.results.folder import read_metrics
from hetfl_jax.run import train as run
from hetfl_jax.run.cite import cite
from hetfl_jax.run.cli import config_of
from hetfl_jax.run.report import report
from tests.helpers import TINY_FLAGS

pytestmark = pytest.mark.slow

SMALL = (*TINY_FLAGS, "--config.family.net=mlp", "--config.family.hidden=(16,)", "--config.train.devices=1",
         "--config.family.norm=none", "--config.family.scaler=False", "--config.capacity.max_seconds=0.02")  # fmt: skip


def config(folder, how, *changes):
    start = f"--config=heterofl_devices:how={how},mix=a1-b1-c1,quick"
    return config_of([start, *SMALL, f"--config.run.folder={folder}", *changes])


@pytest.mark.draws
def test_a_run_says_who_can_afford_what_and_how_long_it_takes(tmp_path, capsys):
    changes = (
        "--config.devices.args.macs_per_s=5e6",
        "--config.devices.online=daily:20",
        "--config.devices.deadline=5.0",
    )
    result = run.train(config(tmp_path, "rounds", *changes))
    said = capsys.readouterr().out
    assert "capacity: the largest level within 0.02 s and the device's memory" in said
    assert "devices: a round is expected to take a client " in said
    assert "simulated time " in said
    about = json.loads((result.folder / "capacity.json").read_text())
    assert set(about["levels"]) == {"a", "b", "c"}
    level = np.asarray([-1 if name is None else "abc".index(name) for name in about["level"]])
    seconds = np.asarray(about["seconds"])
    fits = seconds <= 0.02
    np.testing.assert_array_equal(level, np.where(fits.any(1), fits.argmax(1), -1))
    assert len(set(level.tolist())) > 1, "the budget tells clients apart"
    lines = read_metrics(result.folder)[1:]
    for line in lines:
        assert set(line["level_seconds"]) == {"a", "b", "c"}
    last = lines[-1]
    assert last["simulated_seconds"] == pytest.approx(sum(line["round_seconds"] for line in lines), rel=1e-5)
    assert sum(sum(line["level_macs"].values()) for line in lines) == last["client_macs"]
    moved = sum(sum(line["level_bytes"].values()) for line in lines)
    assert moved == last["down_bytes"] + last["up_bytes"]
    assert result.summary["simulated_seconds"] == last["simulated_seconds"]
    assert (result.folder / "hours.png").stat().st_size > 0
    assert "simulated_seconds" in report(result.folder, tmp_path / "report.html").read_text()
    again = run.train(config(tmp_path, "rounds", *changes, "--config.train.rounds=3"), resume=True, quiet=True)
    after = read_metrics(again.folder)[1:]
    assert after[:2] == lines
    assert after[2]["simulated_seconds"] == pytest.approx(
        last["simulated_seconds"] + after[2]["round_seconds"], rel=1e-5
    )


def test_a_run_in_which_nobody_is_in_time_says_so(tmp_path):
    lines = [{"round": n, "clients": 0, "failed": 0, "late": 5, "accuracy": {"a": 0.1}} for n in range(1, 4)]
    with pytest.raises(ValueError, match=re.escape("no reply was in time in rounds 1, 2, 3 of ")):
        run._stop_if_lost(lines, tmp_path)
    lines[2]["failed"] = 1
    with pytest.raises(ValueError, match=re.escape("no reply was finite in rounds 1, 2, 3 of ")):
        run._stop_if_lost(lines, tmp_path)


def test_the_same_config_runs_without_rounds(tmp_path):
    result = run.train(config(tmp_path, "buffered", "--config.train.rounds=4"), quiet=True)
    assert "Federated Learning with Buffered Asynchronous Aggregation" in cite(result.folder)
    lines = read_metrics(result.folder)[1:]
    assert all(line["clients"] == 4 for line in lines)
    assert max(line["staleness"] for line in lines) > 0
    times = [line["simulated_seconds"] for line in lines]
    assert times == sorted(times)
