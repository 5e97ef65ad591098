"""Sweeps: points that share programs, the files they write, what is left of one that was ended, wrong input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetfl_jax as hf
from hetfl_jax.core.settings import agree
from hetfl_jax.parts import merge, select
from hetfl_jax.parts.merge import Weights
from hetfl_jax.run import lab, points, programs, standing, train
from hetfl_jax.run.cli import main
from hetfl_jax.run.config import load_config
from hetfl_jax.run.programs import Shared, numbers, structure
from hetfl_jax.run.stop import Stopped
from hetfl_jax.run.sweep import DONE, FAILED
from tests.helpers import worst

pytestmark = pytest.mark.slow

SMALL = ("family.net=mlp", "family.norm=none", "family.hidden=(8,)", "run.eval_masked=False", "train.rounds=2",
         "run.eval_every=1", "data.clients=20", "train.devices=1", "train.momentum=0.0")  # fmt: skip
METHODS = {
    "fedavg": ("heterofl_digits:mix=a1", "method.name=fedavg"),
    "heterofl": ("heterofl_digits:mix=a1-b1",),
    "depthfl": (
        "heterofl_digits:mix=2x1-1x1",
        "method.name=depthfl",
        "family.hidden=(8,8)",
        "train.learning_rate=0.02",
    ),
    "ifca": ("heterofl_digits:mix=a1", "method.name=ifca", "method.args.clusters=2"),
}


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """A sweep compiles for each device that it uses: two show as much as eight."""
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "local_device_count", lambda: len(devices))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as this process compiles


def config(folder, *changes, target="heterofl_digits:mix=a1"):
    return load_config(target, *SMALL, f"run.folder={folder}", *changes, tell=lambda text: None)


@pytest.mark.parametrize("name", METHODS)
def test_points_share_one_program_and_are_the_runs_of_train(name, tmp_path, monkeypatch):
    """3 rates x 3 seeds: one program, traced once; every point bit for bit what ``train`` gives."""
    target, *changes = METHODS[name]
    base = config(tmp_path / "many", *changes, target=target)
    over = {"train.learning_rate": [0.01, 0.05, 0.1], "run.seed": [0, 1, 2]}
    built = []
    make = programs.rounds.round_programs
    monkeypatch.setattr(programs.rounds, "round_programs", lambda *args: built.append(make(*args)) or built[-1])
    found = hf.sweep(base, over, quiet=True)
    assert [e.status for e in found.points] == [DONE] * 9
    assert found.programs == len(built) == 1
    assert getattr(built[0].usual, "jitted", built[0].usual)._cache_size() <= jax.local_device_count()
    ends = {}
    for e in found.points:
        if e.point.name in ("train.learning_rate=0.01,run.seed=0", "train.learning_rate=0.1,run.seed=2"):
            one = e.point.config.copy_and_resolve_references()
            with one.unlocked():
                one.run.folder = str(tmp_path / "alone")
            alone = train.train(one, quiet=True)
            assert worst(alone.params, e.result.params) == 0
            assert alone.table == e.result.table
            ends[e.point.name] = alone.params
    assert worst(*ends.values()) > 1e-3


def test_numbers_are_arguments_and_switches_are_not(tmp_path):
    """What Python decides by a number makes another program: momentum on or off, a rate that is out of range."""
    shared, found = Shared(), []
    for changes in (
        (),
        ("train.learning_rate=0.2",),
        ("train.momentum=0.5",),
        ("train.momentum=0.9",),
        ("run.seed=4",),
    ):
        found.append(lab.prepare(config(tmp_path, *changes), None, None, shared))
    kinds = {structure(each.config, each.federation) for each in found}
    assert len(kinds) == 2
    assert sorted(map(len, shared.programs.values())) == [1, 1]
    (made,) = shared.programs[structure(found[0].config, found[0].federation)]
    assert agree(made.guards, numbers(found[1].config, found[1].federation))
    assert not agree(made.guards, numbers(found[0].config, found[0].federation) | {"train.learning_rate": -1.0})


def test_a_number_that_python_needs_has_a_program_of_its_own(tmp_path):
    shared = Shared()
    for fraction in (0.1, 0.2, 0.1):
        changes = ("method.name=fedavg", "uplink.name=top_k", f"uplink.args.fraction={fraction}")
        lab.prepare(config(tmp_path, *changes, "uplink.error_feedback=True"), None, None, shared)
    assert [len(made) for made in shared.programs.values()] == [2]


def powered(family, local, *, cohort, power=1.0):
    """A user's method, whose weights need a number that jnp takes as it is."""

    def weights(context, delta):
        weight = jnp.exp(jnp.maximum(power, 0.5) * jnp.log(2.0 + context.shard.size))
        return weight, weight

    rule = merge.overlap_mean(family, weights=Weights(weights))
    return hf.compose(family, local=local, select=select.uniform(cohort), merge=rule)


def test_a_method_of_the_users_may_need_its_numbers_themselves(tmp_path):
    """jnp.maximum takes no ``Setting``: each number is a program of its own, and the results are right."""
    base = load_config("heterofl_digits:mix=a1", *SMALL, "data.split=dirichlet_per_class", f"run.folder={tmp_path}",
                       tell=lambda text: None)  # fmt: skip
    found = hf.sweep(base, [{"method.args.power": power} for power in (1.0, 3.0)], method=powered, quiet=True)
    assert [e.status for e in found.points] == [DONE, DONE]
    assert found.programs == 2
    assert worst(*(e.result.params for e in found.points)) > 1e-4


def test_what_a_sweep_writes(tmp_path):
    over = {"train.learning_rate": [0.05, 0.1], "run.seed": [0, 1]}
    found = hf.sweep(config(tmp_path, "run.name=s", target="heterofl_digits:mix=a1-e1"), over, quiet=True)
    folder = tmp_path / "s"
    assert found.folder == folder
    described = json.loads((folder / "sweep.json").read_text())
    assert [point["status"] for point in described["points"]] == [DONE] * 4
    assert described["over"] == over
    assert described["programs"] == 1
    assert "train.learning_rate=0.1,run.seed=1" in (folder / "report.html").read_text()
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    for point in described["points"]:
        lines = [json.loads(line) for line in (folder / point["name"] / "metrics.jsonl").read_text().splitlines()]
        mine = [row for row in rows if row["point"] == point["name"]]
        assert {float(row["train.learning_rate"]) for row in mine} == {point["values"]["train.learning_rate"]}
        values = {(int(row["round"]), row["level"], row["metric"]): float(row["value"]) for row in mine}
        for line in lines:
            for level, value in line.get("accuracy", {}).items():
                assert values[line["round"], level, "accuracy"] == value
    cells = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    one = next(c for c in cells if c["train.learning_rate"] == "0.1" and (c["level"], c["metric"]) == ("a", "accuracy"))
    last = [row["last"] for row in found.table if row["train.learning_rate"] == 0.1 and row["level"] == "a"]
    assert float(one["mean"]) == pytest.approx(np.mean(last))
    assert float(one["deviation"]) == pytest.approx(np.std(last, ddof=1))
    assert one["seeds"] == "2"
    assert {row["level"] for row in found.table} == {"a", "e"}


@pytest.mark.filterwarnings("ignore:round .* replies not finite")
def test_a_point_that_fails_is_named_and_the_others_go_on(tmp_path):
    over = [{"train.learning_rate": 0.1}, {"train.learning_rate": 1e30}, {"train.learning_rate": 0.2}]
    base = config(tmp_path, "train.rounds=4")
    found = hf.sweep(base, over, quiet=True)
    assert [e.status for e in found.points] == [DONE, FAILED, DONE]
    assert "lower train.learning_rate" in found.points[1].error
    again = hf.sweep(base, over, quiet=True, resume=True)
    assert [e.result for e in again.points] == [None, None, None]
    assert [e.status for e in again.points] == [DONE, FAILED, DONE]


def test_resume_runs_only_what_is_missing(tmp_path):
    base, over = config(tmp_path), {"run.seed": [0, 1, 2]}
    whole = hf.sweep(base, over, quiet=True)
    text = (whole.folder / "sweep.csv").read_text()
    described = json.loads((whole.folder / "sweep.json").read_text())
    described["points"][1] |= {"status": "waiting", "seconds": None}
    (whole.folder / "sweep.json").write_text(json.dumps(described))
    (whole.folder / "run.seed=1" / "table.json").unlink()
    again = hf.sweep(base, over, quiet=True, resume=True)
    assert [e.result is not None for e in again.points] == [False, True, False]
    without_time = [line for line in text.splitlines() if ",seconds," not in line]
    assert [
        line for line in (whole.folder / "sweep.csv").read_text().splitlines() if ",seconds," not in line
    ] == without_time


@pytest.mark.parametrize("how", ["--zip", "product"])
def test_lists_on_the_command_line(how, tmp_path, capsys):
    flags = [f"--config.{change}" for change in SMALL]
    over = ["--over", "train.learning_rate=0.05,0.1", "--over", "run.seed=3..4"]
    zipped = ["--zip"] if how == "--zip" else []
    args = ["sweep", "--config=heterofl_digits:mix=a1", *flags, f"--config.run.folder={tmp_path}", *over, *zipped]
    assert main([*args, "--dry-run"]) == 0
    assert f"{2 if zipped else 4} points" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


WRONG = {
    "an unknown key": (["train.learning=0.1"], "unknown config key 'train.learning'"),
    "a value of the wrong kind": (["train.rounds=2,x"], "rounds 'x', allowed a whole number (train.rounds)"),
    "a value out of range": (["train.learning_rate=0.1,-1.0"], "learning_rate -1.0, allowed >="),
    "an empty list": (["train.rounds="], "need KEY=VALUE,VALUE"),
    "two points of one name": (["run.seed=0,0"], "two points are called 'run.seed=0'"),
    "no key": (["0.1,0.2"], "need KEY=VALUE,VALUE"),
    "a key twice": (["run.seed=0", "run.seed=1"], "--over run.seed is given twice"),
    "seeds downwards": (["run.seed=3..1"], "allowed A..B with A <= B"),
    "no points": ([], "a sweep of no points"),
    "lists of two lengths": (["run.seed=0..1", "train.rounds=1", "--zip"], "parallel lists of different lengths"),
    "where it is written": (["run.name=a,b"], "a sweep names its points itself"),
    "a name too long": (["data.source=npz:" + 200 * "x"], "has a name of 216 bytes, allowed 200"),
    "no such generator": (["--sweep=nothing"], "sweep 'nothing' is not one of mixes of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sweeps_are_one_line_before_anything_runs(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab.rounds, "start", lambda *a, **k: pytest.fail("a point began"))
    given, line = WRONG[name]
    over = [part for text in given for part in ([text] if text.startswith("--") else ["--over", text])]
    flags = [f"--config.{change}" for change in (*SMALL, f"run.folder={tmp_path}")]
    assert main(["sweep", "--config=heterofl_digits:mix=a1", *flags, *over]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert line in said
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(tmp_path):
    base = config(tmp_path, "train.rounds=1")
    hf.sweep(base, {"run.seed": [0]}, quiet=True)
    for over, options, said in (
        ({"run.seed": [0]}, {}, "already holds a sweep"),
        ({"run.seed": [0, 1]}, {"resume": True}, "holds another sweep, of 1 points"),
    ):
        with pytest.raises(ValueError, match=said):
            hf.sweep(base, over, quiet=True, **options)
    other = config(tmp_path, "train.rounds=1", "train.batch_size=3")
    with pytest.raises(ValueError, match=r"train.batch_size was .*, now 3"):
        hf.sweep(other, {"run.seed": [0]}, quiet=True, resume=True)
    with pytest.raises(ValueError, match="holds no sweep to go on with"):
        hf.sweep(config(tmp_path, "run.name=none"), {"run.seed": [0]}, quiet=True, resume=True)


def test_a_run_where_a_point_will_be_is_not_deleted(tmp_path):
    """Neither by a sweep without ``overwrite``, nor silently kept by one with it; seeds of an older version go on."""
    base, seeds = config(tmp_path), [{"run.seed": 0}]
    older = train.train(config(tmp_path / "heterofl_digits", "run.name=seed0"), quiet=True)
    files = sorted(older.folder.rglob("*"))
    with pytest.raises(ValueError, match="seed0 already holds a run: --overwrite deletes it"):
        hf.over_seeds(base, [0], quiet=True)
    assert sorted(older.folder.rglob("*")) == files
    (again,), _ = hf.over_seeds(base, [0], quiet=True, resume=True)
    assert worst(again.params, older.params) == 0
    (anew,), _ = hf.over_seeds(config(tmp_path, "train.learning_rate=0.01"), [0], quiet=True, overwrite=True)
    assert worst(anew.params, older.params) > 1e-3
    with pytest.raises(ValueError, match="holds no sweep to go on with"):
        hf.sweep(config(tmp_path, "run.name=other"), seeds, quiet=True, resume=True)


def test_a_sweep_that_goes_on_with_other_data_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    data = [
        rng.normal(size=(80, 6)).astype(np.float32),
        rng.integers(0, 3, 80),
        rng.normal(size=(20, 6)),
        np.arange(20) % 3,
    ]
    base, over = config(tmp_path, "data.clients=4", "method.args.cohort=2"), {"run.seed": [0, 1]}
    found = hf.sweep(base, over, data=tuple(data), quiet=True)
    described = json.loads((found.folder / "sweep.json").read_text())
    described["points"][1]["status"] = "waiting"
    (found.folder / "sweep.json").write_text(json.dumps(described))
    data[0] = data[0] + 1
    with pytest.raises(ValueError, match=r"run.seed=0 was run on other data: x_train"):
        hf.sweep(base, over, data=tuple(data), quiet=True, resume=True)


@pytest.mark.parametrize("over", [{}, [{}], [3], 3, {"run.seed": 3}, {"run.seed": []}, "run.seed"])
def test_wrong_points_in_python_are_one_line(over, tmp_path):
    with pytest.raises(ValueError, match=r"\(over\)") as error:
        hf.sweep(config(tmp_path), over, quiet=True)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_a_sweep(tmp_path, monkeypatch):
    """What no point is to blame for ends the sweep with its own error, and not as a failed point."""

    def full(plan, ended):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(standing.Standing, "end", full)
    with pytest.raises(OSError, match="No space left on device"):
        hf.sweep(config(tmp_path, "train.rounds=1"), {"run.seed": [0, 1]}, quiet=True)


def test_a_config_file_may_name_its_sweeps(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from hetfl_jax.run.config import changed\n"
        "def get_config():\n    return changed(train=dict(rounds=1))\n"
        "def sweep_rates():\n    yield from ({'train.learning_rate': r} for r in (0.1, 0.2))\n"
        "def sweep_seeds():\n    return [{'run.seed': 0}, {'run.seed': 1}, {'run.seed': 2}]\n"
        "def get_hyper(hyper):\n"
        "    rates = hyper.sweep('config.train.learning_rate', [1.0, 2.0])\n"
        "    return hyper.product([rates, hyper.fixed('run.seed', 7)])\n"
    )
    assert points.generated(str(path), ["rates"]) == [{"train.learning_rate": 0.1}, {"train.learning_rate": 0.2}]
    assert len(points.generated(str(path), ["rates", "seeds"])) == 6
    wanted = [{"train.learning_rate": rate, "run.seed": 7} for rate in (1.0, 2.0)]
    assert points.generated(str(path), ["hyper"]) == wanted
    with pytest.raises(ValueError, match="sweep 'rate' is not one of rates, seeds, hyper"):
        points.generated(str(path), ["rate"])


def start(folder, *args):
    flags = [f"--config.{change}" for change in (*SMALL, f"run.folder={folder}", *args[1:])]
    command = [sys.executable, "-m", "hetfl_jax", args[0], "--config=heterofl_digits:mix=a1", *flags]
    return [part for part in command if part]


def wait_for(path, count, process):
    for _ in range(1200):
        if process.poll() is not None or (path.exists() and len(path.read_text().splitlines()) >= count):
            return
        time.sleep(0.1)


def test_sigterm_saves_the_round_in_progress(tmp_path):
    """Code 143, one line, and a checkpoint from which the run goes on bit for bit."""
    long = ("train.rounds=4000", "run.eval_every=50", "run.checkpoint_every=4000", "run.name=ended")
    process = subprocess.Popen(start(tmp_path, "train", *long), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "ended" / "metrics.jsonl", 51, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 143, said
    assert said[-1].startswith("hetfl: ")
    assert "stopped after round" in said[-1]
    assert said[-1].endswith("go on with --resume")
    stopped = int(said[-1].split("round ")[1].split()[0])
    assert [int(path.name) for path in (tmp_path / "ended" / "checkpoints").iterdir() if path.name.isdigit()] == [
        stopped
    ]


def test_a_run_that_sigterm_ended_goes_on_bit_for_bit(tmp_path):
    """What was asked for in the evaluation of round 3 ends the run after round 4, of which there is a checkpoint."""
    base = config(tmp_path, "train.rounds=6", "run.checkpoint_every=6", "run.name=ended")
    ask = lambda round, scores, state: os.kill(os.getpid(), signal.SIGTERM) if round == 3 else None  # noqa: E731
    with pytest.raises(Stopped, match="stopped after round 4 of 6"):
        train.train(base, quiet=True, callbacks=[ask])
    resumed = train.train(base, resume=True, quiet=True)
    whole = train.train(config(tmp_path, "train.rounds=6", "run.checkpoint_every=6", "run.name=whole"), quiet=True)
    assert worst(resumed.params, whole.params) == 0
    assert resumed.table == whole.table


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_was_ended_goes_on(ending, tmp_path):
    """After kill -9 or SIGTERM at any moment, what is missing is run, with the same result."""
    name, over = "run.name=s", ["--over", "run.seed=0..3"]
    command = [*start(tmp_path / "ended", "sweep", name, "train.rounds=12"), *over]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(tmp_path / "ended" / "s" / "run.seed=1" / "metrics.jsonl", 5, process)
    process.send_signal(ending)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == (-9 if ending == signal.SIGKILL else 143), said
    over = {"run.seed": [0, 1, 2, 3]}
    resumed = hf.sweep(config(tmp_path / "ended", name, "train.rounds=12"), over, resume=True, quiet=True)
    whole = hf.sweep(config(tmp_path / "whole", name, "train.rounds=12"), over, quiet=True)
    assert resumed.table == whole.table
