"""What a sweep takes: 64 points of the digits MLP against 64 commands, and against the time of its rounds alone.

python -m experiments.throughput.sweep
python -m experiments.throughput.sweep --points 8 --commands 2 --only mlp
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

import hetfl_jax as hf
from hetfl_jax.core import machine
from hetfl_jax.core.types import Config
from hetfl_jax.run import lab

MLP = ("method.name=fedavg", "family.net=mlp", "family.norm=none", "family.hidden=(64,)", "train.rounds=20",
       "run.eval_masked=False")  # fmt: skip
RATES = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)


def seconds(of: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    of()
    return time.perf_counter() - began


def rounds_of(config: Config, repeats: int = 5) -> float:
    """Median seconds of all warm rounds of one point, on one device."""
    one = config.copy_and_resolve_references()
    with one.unlocked():
        one.train.devices = 1
    made, found = lab.prepare(one), []
    state = made.start()
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for _ in range(one.train.rounds):
            state, _info = made.step(state, made.population, made.key)
        jax.block_until_ready(state)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def command(*arguments: str) -> None:
    """One run of the installed program."""
    subprocess.run([sys.executable, "-m", "hetfl_jax", *arguments], check=True, capture_output=True)


def mlp(points: int, commands: int) -> None:
    """Eight rates times seeds, of a net whose rounds take milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = hf.load_config("heterofl_digits:mix=a1", *MLP, f"run.folder={folder}", tell=lambda text: None)
        flags = ["--config=heterofl_digits:mix=a1", *(f"--config.{change}" for change in MLP)]
        flags.append(f"--config.run.folder={folder}")
        command("train", *flags, "--config.run.name=first")  # its programs are on disk from here on
        single = [lambda n=n: command("train", *flags, f"--config.run.name=c{n}") for n in range(commands)]
        of_commands = sum(map(seconds, single))
        over = f"train.learning_rate={','.join(map(str, RATES[: min(points, 8)]))}"
        sweep = ["sweep", *flags, "--over", over, "--over", f"run.seed=0..{max(1, points // 8) - 1}"]
        cold = seconds(lambda: command(*sweep, "--config.run.name=cold"))
        warm = seconds(lambda: command(*sweep, "--config.run.name=warm"))
        work = rounds_of(config)
    cores = machine.cores()
    print(
        f"{points} points, {config.train.rounds} rounds, {cores} cores: sweep {warm:.1f} s, {cold:.1f} the first time"
    )
    print(f"a command {of_commands / commands:.2f} s (mean of {commands}): sweep / {points} commands = "
          f"{warm / (points * of_commands / commands):.3f} (bar 0.35)")  # fmt: skip
    print(f"warm rounds of a point {work:.3f} s: sweep / (points x rounds / cores) = "
          f"{warm / (points * work / cores):.2f} (bar 1.15)")  # fmt: skip


def seeds(commands: int) -> None:
    """Eight seeds of the default run against as many commands."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config=heterofl_digits", f"--config.run.folder={folder}"]
        command("train", *flags, "--config.run.name=first")
        one = seconds(
            lambda: [
                command("train", *flags, f"--config.run.seed={n}", f"--config.run.name=c{n}") for n in range(commands)
            ]
        )
        many = seconds(lambda: command("sweep", *flags, "--over", "run.seed=0..7", "--config.run.name=many"))
        names = sorted(path.name for path in Path(folder, "many").iterdir() if path.is_dir())
    print(f"8 seeds of the default run ({len(names)} folders): sweep {many:.1f} s, a command {one / commands:.1f} s "
          f"(mean of {commands}): ratio {many / (8 * one / commands):.2f} (bar 0.6)")  # fmt: skip


def main() -> None:
    """Both, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mlp", "seeds"))
    parser.add_argument("--points", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--commands", type=int, default=4, help="how many single runs are timed")
    given = parser.parse_args()
    if given.only != "seeds":
        mlp(given.points, given.commands)
    if given.only != "mlp":
        seeds(given.commands)


if __name__ == "__main__":
    machine.use_all_cores()
    machine.use_cache()
    main()
