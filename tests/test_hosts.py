"""A sweep that several hosts share: the tables of one host, and nothing lost with a lost host."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hetfl_jax.run.config import load_config
from hetfl_jax.run.sweep import sweep
from tests.helpers import TINY_FLAGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TARGET = "heterofl_digits:mix=a1-b1,quick"
FLAGS = (*TINY_FLAGS, "--config.family.net=mlp", "--config.family.hidden=(16,)", "--config.train.rounds=6",
         "--config.train.devices=1")  # fmt: skip
SEEDS = range(5)


def launch(folder, number, *flags):
    """Host ``number`` of two."""
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "hetfl_jax", "sweep", f"--config={ROOT}/configs/{TARGET.replace(':', '.py:')}"]
    hosts = ["--over", "run.seed=0..4", "--processes=2", f"--process={number}"]
    return subprocess.Popen(
        [*command, *FLAGS, f"--config.run.folder={folder}", *hosts, *flags],
        env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def statuses(folder, name="sweep.json"):
    path = folder / "heterofl_digits_quick" / name
    return [point["status"] for point in json.loads(path.read_text())["points"]] if path.exists() else []


def test_two_hosts_of_which_one_is_lost_write_the_tables_of_one(tmp_path):
    """The second host comes first and waits for the folder; it is killed in its first run, and both start again."""
    keys = [flag.removeprefix("--config.") for flag in FLAGS]
    alone = sweep(load_config(TARGET, *keys, f"run.folder={tmp_path / 'alone'}"), {"run.seed": SEEDS}, quiet=True)
    shared = tmp_path / "shared"
    second, first = launch(shared, 1), launch(shared, 0)
    while not statuses(shared, "sweep_1.json"):
        assert first.poll() is None, first.communicate()
        assert second.poll() is None, second.communicate()
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    while statuses(shared)[::2] != ["done"] * 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    assert "waiting" in statuses(shared)[1::2], "the second host was killed too late"
    time.sleep(1)
    assert first.poll() is None, "the first host waits for the second"
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=120) == 143
    first.communicate()

    done = [shared / alone.folder.name / f"run.seed={seed}" / "table.json" for seed in SEEDS[::2]]
    written = [path.stat().st_mtime_ns for path in done]
    started = [launch(shared, number, "--resume") for number in range(2)]
    texts = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    assert statuses(shared) == ["done"] * 5
    assert [path.stat().st_mtime_ns for path in done] == written, "what was done is not run again"
    for name in ("sweep.csv", "summary.csv"):
        told = [(folder / alone.folder.name / name).read_text().splitlines() for folder in (shared, tmp_path / "alone")]
        ours, theirs = ([line for line in lines if ",seconds," not in line] for lines in told)
        assert ours == theirs
    assert (shared / alone.folder.name / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": 2, "processes": 2}, r"process 2 of 2, allowed 0\.\.1 \(--process, --processes\)"),
        ({"process": -1, "processes": 2}, r"process -1 of 2, allowed 0\.\.1"),
        ({"processes": 0}, r"process 0 of 0, allowed 0\.\.0"),
        ({"processes": 2, "overwrite": True}, r"--overwrite of a sweep of 2 hosts: delete its folder first"),
    ],
)
def test_hosts_that_there_are_not(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(load_config(TARGET, f"run.folder={tmp_path}"), {"run.seed": SEEDS}, quiet=True, **options)
