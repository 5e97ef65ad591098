"""Several processes of one run, as on several hosts: the same figures, and nothing lost with a lost process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hetfl_jax.core import machine
from hetfl_jax.results.folder import read_metrics
from hetfl_jax.run import train as run
from hetfl_jax.run.cli import config_of
from tests.helpers import TINY_FLAGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMAND = (
    sys.executable, "-m", "hetfl_jax", "train", f"--config={ROOT}/configs/heterofl_digits.py:mix=a1-b1,quick",
    *TINY_FLAGS, "--config.family.net=mlp", "--config.family.hidden=(16,)", "--config.train.rounds=16",
    "--config.run.checkpoint_every=2", "--config.run.eval_every=8",
)  # fmt: skip
NAME = "heterofl_digits_quick"


def launch(folder, *flags):
    """The same command in two processes of two CPU devices each."""
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(number):
        hosts = [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={number}"]
        return subprocess.Popen(
            [*COMMAND, f"--config.run.folder={folder}", *flags, *hosts],
            env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return [one(number) for number in range(2)]


def finish(started):
    texts = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), texts
    return texts


def scores(folder):
    """What two equal runs share to rounding: losses of every round, and the exact counts."""
    lines = read_metrics(folder / NAME)
    losses = [line["train_loss"] for line in lines[1:]]
    return losses, [(line["round"], line.get("down_bytes"), line.get("items")) for line in lines]


def test_two_processes_of_which_one_is_lost_end_as_one_process(tmp_path):
    single, lost = (tmp_path / name for name in ("single", "lost"))
    changes = [f"--config.run.folder={single}", "--config.train.devices=4"]
    run.train(config_of([*COMMAND[4:], *changes]), quiet=True)

    started = launch(lost)
    metrics = lost / NAME / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 6:
        assert all(process.poll() is None for process in started), [p.communicate() for p in started]
        time.sleep(0.05)
    started[1].send_signal(signal.SIGKILL)
    _, error = started[0].communicate(timeout=120)
    assert started[0].returncode == 3
    assert "hetfl: a process of the run was lost, start all again with --resume" in error
    started[1].communicate()
    seen, _ = scores(lost)
    outputs = finish(launch(lost, "--resume"))
    assert "after 16 rounds" in outputs[0][0]
    assert "after 16 rounds" not in outputs[1][0], "the first process alone prints"

    ours, counts = scores(lost)
    theirs, theirs_counts = scores(single)
    assert counts == theirs_counts
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[: len(seen)] == seen, "what was written before the loss stays, repeated rounds to the same bits"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "need --coordinator"),
        (("here", 2, 0), "--coordinator=here: allowed auto or HOST:PORT"),
        (("a:1", 2, 2), "need 0 <= process < processes"),
        (("a:1", None, 0), "need 0 <= process < processes"),
    ],
)
def test_mistakes_are_named_before_anything_waits(given, message):
    with pytest.raises(ValueError, match=message):
        machine.connect(*given)
