"""Runs that last: files, resume bit for bit after a kill, failures, and what the user is told."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetfl_jax.core.types import ACCURACY, State
from hetfl_jax.models import build
from hetfl_jax.parts import drift
from hetfl_jax.results.folder import Checkpoints, read_metrics
from hetfl_jax.run import lab
from hetfl_jax.run import train as run
from hetfl_jax.run.cli import config_of, main
from hetfl_jax.run.export import evaluate_run, export_level, load_exported, plot_run
from hetfl_jax.run.lab import prepare
from hetfl_jax.run.sweep import over_seeds
from tests.helpers import TINY_FLAGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/heterofl_digits.py:mix=a1-b1,quick"
# An MLP compiles fastest; everything else is the default experiment.
SMALL = (DIGITS, *TINY_FLAGS, "--config.family.net=mlp", "--config.family.hidden=(16,)", "--config.train.devices=1")


def config(folder, *changes):
    return config_of([*SMALL, f"--config.run.folder={folder}", *changes])


def same_but_time(first, second):
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(f)] for f in (first, second)]
    assert lines[0] == lines[1]


def same_bits(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of five rounds."""
    folder = tmp_path_factory.mktemp("whole")
    return run.train(config(folder, "--config.train.rounds=5"), quiet=True)


def test_a_run_writes_what_it_names_and_returns_it(finished):
    assert all(path.stat().st_size for path in finished.files)
    names = {path.name for path in finished.folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "partition.npz", "environment.json", "checkpoints", "tensorboard"} <= names
    assert any((finished.folder / "tensorboard").iterdir())
    lines = read_metrics(finished.folder)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert finished.metrics["accuracy/a"].shape == (6,)
    chosen = {line["round"]: line["validation_accuracy"]["a"] for line in lines[1:]}
    assert finished.summary["best_by"] == "validation"
    assert chosen[finished.summary["best_round"]] == max(chosen.values())
    assert [row["level"] for row in finished.table] == ["a", "b"]
    assert finished.table[0]["last"] == pytest.approx(finished.metrics["accuracy/a"][-1])
    sizes = [finished.table[0]["bytes"], finished.table[1]["bytes"]]
    sent = sum(line["items"]["a"] * sizes[0] + line["items"]["b"] * sizes[1] for line in lines[1:])
    assert finished.summary["down_bytes"] == sent == finished.summary["up_bytes"]
    assert finished.summary["full_size_bytes"] == 5 * 4 * sizes[0]
    assert "all-full-size FedAvg" in (finished.folder / "table.txt").read_text()
    spread = finished.summary["client_accuracy"]
    assert spread["worst_tenth"] <= spread["mean"] <= spread["best_tenth"]


def test_resuming_gives_the_same_bits_as_going_through(finished, tmp_path):
    run.train(config(tmp_path, "--config.train.rounds=2"), quiet=True)
    resumed = run.train(config(tmp_path, "--config.train.rounds=5"), resume=True, quiet=True)
    same_bits(resumed.params, finished.params)
    same_but_time(resumed.folder, finished.folder)


def test_a_process_killed_at_any_moment_resumes_to_the_same_bits(tmp_path):
    """A real process, killed without warning, resumed and killed again; against a run that was left alone."""
    changes = ("--config.train.rounds=12", "--config.run.eval_every=3", "--config.run.checkpoint_every=2")
    # The same programs as in this process, which compiles them without optimisation.
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def go(folder, kill_after):
        command = (sys.executable, "-m", "hetfl_jax", "train", *SMALL, *changes, f"--config.run.folder={folder}")
        goes_on = ["--resume"] if (folder / "heterofl_digits_quick").exists() else []
        process = subprocess.Popen([*command, *goes_on], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
        metrics = folder / "heterofl_digits_quick" / "metrics.jsonl"
        while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < kill_after):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL

    run.train(config(tmp_path / "whole", *changes), quiet=True)
    for kill_after in (3, 7):
        go(tmp_path / "killed", kill_after)
    run.train(config(tmp_path / "killed", *changes), resume=True, quiet=True)
    folders = [tmp_path / name / "heterofl_digits_quick" for name in ("whole", "killed")]
    same_but_time(*folders)
    same_bits(*(load_exported(export_level(folder, "a", 12, folder / "a.npz"))[1] for folder in folders))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    run.train(config(tmp_path, "--config.train.rounds=3"), quiet=True)
    folder = tmp_path / "heterofl_digits_quick"
    newest = folder / "checkpoints" / "3"
    for path in newest.rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(b"")
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp-1").mkdir()
    assert newest.exists()
    with pytest.warns(UserWarning, match="checkpoint 3 cannot be read and is passed over"):
        resumed = run.train(config(tmp_path, "--config.train.rounds=5"), resume=True, quiet=True)
    same_bits(resumed.params, finished.params)
    same_but_time(resumed.folder, finished.folder)


def test_nothing_is_overwritten_by_accident(finished):
    root = finished.folder.parent
    before = (finished.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run: --resume goes on, --overwrite starts over"):
        run.train(config(root, "--config.train.rounds=5"), quiet=True)
    with pytest.raises(ValueError, match=r"cannot resume .*: train.learning_rate was 0.05, now 0.5"):
        run.train(config(root, "--config.train.learning_rate=0.5"), resume=True, quiet=True)
    assert (finished.folder / "metrics.jsonl").read_bytes() == before


def test_clients_that_fail_are_named_and_the_run_goes_on(tmp_path, monkeypatch):
    """A gradient that is NaN for every client: the model stays, every round says so, the run ends well."""
    broken = drift.none()._replace(gradient=lambda g, *_: jax.tree.map(lambda v: v * np.nan, g))
    monkeypatch.setattr(drift, "none", lambda: broken)
    with pytest.warns(
        UserWarning, match="4 replies not finite, left out .*every client failed, the model is unchanged"
    ):
        result = run.train(config(tmp_path), quiet=True)
    assert result.summary["failed"] == 8
    assert result.table[0]["start"] == result.table[0]["last"]
    lines = read_metrics(result.folder)
    assert len(lines[1]["failed_ids"]) == 4
    assert lines[1]["train_loss"] is None, "nobody trained, so there is no loss"


def test_a_run_that_learns_nothing_more_stops(tmp_path, monkeypatch, capsys):
    """Every client fails in three evaluated rounds in a row: an error that says what to lower."""
    broken = drift.none()._replace(gradient=lambda g, *_: jax.tree.map(lambda v: v * np.nan, g))
    monkeypatch.setattr(drift, "none", lambda: broken)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", *SMALL, f"--config.run.folder={tmp_path}", "--config.train.rounds=9"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no reply was finite in rounds 1, 2, 3" in error
    assert "lower train.learning_rate" in error


@pytest.mark.draws
def test_a_finished_run_evaluates_plots_and_exports(finished):
    best = finished.summary["best_round"]
    text = evaluate_run(finished.folder)
    assert f"round {best}" in text
    assert "worst tenth" in text
    with pytest.raises(ValueError, match="has no checkpoint of round 77; it has "):
        evaluate_run(finished.folder, 77)
    assert {p.name for p in plot_run(finished.folder)} == {
        "accuracy.png",
        "bytes.png",
        "clients.png",
        "partition.png",
        "training_loss.png",
    }
    with pytest.raises(ValueError, match="tier 'e' is not one of a, b"):
        export_level(finished.folder, "e")
    fields, variables = load_exported(export_level(finished.folder, "b", 5))
    mean, std = fields.pop("mean"), fields.pop("std")
    net = build(**fields)
    fed = prepare(config(finished.folder.parent)).federation
    tests = slice(len(fed.labels), len(fed.labels) + int(fed.test.size[: fed.test_batches].sum()))
    x = (fed.test.x[tests].astype(np.float32) / 255 - np.array(mean)) / np.array(std)
    hits = (net.apply(variables, x).argmax(-1) == fed.test.y[tests]).mean()
    assert float(hits) == pytest.approx(finished.table[1]["last"], abs=1e-6)


def test_seeds_give_mean_and_deviation(tmp_path):
    results, rows = over_seeds(config(tmp_path, "--config.train.rounds=1"), [0, 1], quiet=True)
    values = [r.table[0]["last"] for r in results]
    assert rows[0]["last"] == pytest.approx(np.mean(values))
    assert rows[0]["last_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert {r.folder.name for r in results} == {"seed0", "seed1"}


def test_checkpoints_may_be_more_frequent_than_evaluations(tmp_path):
    """A resumed run remembers the scores of its last evaluation, however long ago that was."""
    seldom = "--config.run.eval_every=100"
    run.train(config(tmp_path, "--config.train.rounds=2", seldom), quiet=True)
    resumed = run.train(config(tmp_path, "--config.train.rounds=4", seldom), resume=True, quiet=True)
    assert "accuracy" in read_metrics(resumed.folder)[-1]


def test_a_profile_says_where_the_time_went(tmp_path, capsys):
    result = run.train(config(tmp_path), trace=True)
    text = capsys.readouterr().out
    for scope in ("plan", "local training", "merge", "server", "evaluation"):
        assert re.search(rf"  {scope} +[\d.]+ ms +[\d.]+%", text), scope
    assert list((result.folder / "profile").rglob("*.xplane.pb"))
    assert list((result.folder / "profile").rglob("perfetto_trace.json.gz"))


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    assert main(["train", *SMALL, f"--config.run.folder={tmp_path}", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "GMACs expected" in text
    assert "data on each device" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store", ["device", "host", "file"])
def test_a_dry_run_allocates_nothing_whatever_the_store(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab.rounds, "start", lambda *a: pytest.fail("a state was made"))
    changes = ("--config.method.name=feddyn", f"--config.train.store={store}", f"--config.run.folder={tmp_path}")
    assert main(["train", *SMALL, *changes, "--dry-run"]) == 0
    text = capsys.readouterr().out
    model = config(tmp_path, "--config.method.name=feddyn")
    size = 4 * int(prepare(model).federation.costs.parameters[0]) * 10 / 1e6
    assert f"client memory of at most {size:,.1f} MB in store {store!r}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.foo=1"], "'foo' is not one of batch_size"),
        (["--config.train.rounds=x"], "invalid literal for int"),
        (["--config.train.rounds"], "--config.train.rounds has no value: --config.train.rounds=VALUE"),
        (["--resume"], "holds no run to go on with"),
        (["--config.train.rounds=0"], "rounds 0, allowed >= 1 (train.rounds)"),
        (
            [f"--config={ROOT}/configs/heterofl_digits.py:mix=a1-z1"],
            "level 'z' in mix 'a1-z1' is not one of a, b, c, d, e",
        ),
        (
            [f"--config={ROOT}/configs/heterofl_digits.py:mix=b1-a1"],
            "level 'a' in mix 'b1-a1' is above the global level",
        ),
        ([f"--config={ROOT}/configs/heterofl_digits.py:mix=a1-a2"], "each level once"),
        ([f"--config={ROOT}/configs/heterofl_digits.py:mix=a0"], "need a level and a proportion >= 1"),
        ([f"--config={ROOT}/configs/heterofl_digits.py:colour=1"], "'colour' is not one of mix, quick"),
        (["--config.method.args.cohort=101"], "cohort of 101 clients, allowed 1..100"),
        (["--config.family.norm=gn"], "4 groups, which do not divide a layer of 2 channels"),
        (
            ["--config.method.name=fedsgd"],
            "method 'fedsgd' is not one of afl, cfl, depthfl, fedavg, feddyn, fedpaq, fedprox, fjord",
        ),
        (["--config.train.buckets=a-b"], "groups of a, b, c, d, e, each once"),
        (["--config.family.mix=a1-c1-b1", "--config.train.buckets=a-cb"], "b is not inside c, the first of its bucket"),
        (["--config.data.split=natural"], "split 'natural' needs data.writers"),
        (["--config.data.split=random"], "split 'random' is not one of iid, shards"),
        (["--config.data.clients=5000"], "5000 clients, allowed 1..1294"),
        (["--config.train.executor=fast"], "executor 'fast' is not one of"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--seeds=3..1"], "allowed A..B"),
        (["--config.data.validation=1.5"], "validation fraction 1.5, allowed 0 <= f < 1"),
        (["--process=1"], "--processes and --process need --coordinator"),
    ],
)
def test_mistakes_are_one_line_before_anything_compiles(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab.rounds, "start", lambda *a: pytest.fail("the run began"))
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("hetfl: ")
    assert message in error[0]


def test_a_full_device_is_one_line_that_says_what_to_lower(capsys, monkeypatch, tmp_path):
    def full(config, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying to allocate 21.3GiB.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "train", full)
    assert main(["train"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "--resume with a smaller train.clients_per_chunk" in error[0]
    assert error[0].endswith("while trying to allocate 21.3GiB.")


@pytest.mark.draws
def test_a_run_of_several_models_is_planned_drawn_and_exported(tmp_path, capsys):
    """Down go all models, up comes one; each can be exported, and a model must be named."""
    arguments = [
        f"--config={ROOT}/configs/ifca_rotated_mnist.py:source=digits,quick",
        *TINY_FLAGS,
        f"--config.run.folder={tmp_path}",
    ]
    assert main(["train", *arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert main(["train", *arguments]) == 0
    table, progress = capsys.readouterr()
    assert re.search(r"round 2 of 2: loss [\d.]+ accuracy [\d.]+%", progress), "there is no terminal"
    assert "4 model(s), the best one counts for a test batch; clients of the last round: " in table
    folder = next(tmp_path.iterdir())
    at_the_end = {path.name for path in folder.glob("*.png")}
    drawn = {p.name for p in plot_run(folder)}
    assert drawn == at_the_end
    assert drawn == {"accuracy.png", "bytes.png", "partition.png", "training_loss.png", "clusters.png", "losses.png"}
    down, up = (float(v) for v in re.search(r"([\d.]+) MB down, ([\d.]+) MB up", planned).groups())
    sent = [float(v) for v in re.search(r"down ([\d.]+) MB, up ([\d.]+) MB", table).groups()]
    np.testing.assert_allclose([2 * down, 2 * up], sent, atol=0.011)
    np.testing.assert_allclose(down, 4 * up, atol=0.025)
    with pytest.raises(ValueError, match=r"model None: .* holds 4 model\(s\) at round \d, name one of 0..3"):
        export_level(folder, "a")
    weights = [load_exported(export_level(folder, "a", model=c))[1]["params"]["head"]["kernel"] for c in (0, 3)]
    assert np.abs(weights[0] - weights[1]).max() > 0


def test_the_best_checkpoint_is_the_best_also_after_a_resume(tmp_path):
    """It stays beside the last few; a round that was not evaluated is never it."""
    state = lambda round: State({"w": np.ones(3, np.float32)}, (), np.int32(round))  # noqa: E731
    checkpoints = Checkpoints(tmp_path, keep=2)
    for round, score in ((1, 0.2), (2, 0.9), (3, 0.3), (4, run.NEVER)):
        checkpoints.save(round, state(round), {}, score)
    assert (checkpoints.rounds(), checkpoints.best()) == ([2, 3, 4], 2)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2)
    assert (again.rounds(), again.best()) == ([2, 3, 4], 2)
    for round, score in ((5, 0.95), (6, 0.6)):
        again.save(round, state(round), {}, score)
    assert (again.rounds(), again.best()) == ([5, 6], 5)
    again.close()


def test_after_damaged_checkpoints_the_next_ones_are_kept(tmp_path):
    """Two damaged ones are set aside; what is saved below their rounds is there for the next resume."""
    state = lambda round: State({"w": np.full(3, round, np.float32)}, (), jnp.int32(round))  # noqa: E731
    checkpoints = Checkpoints(tmp_path, keep=2)
    for round in (1, 3, 5):
        checkpoints.save(round, state(round), {}, 0.5 - round / 10)
    checkpoints.close()
    damaged = [path for step in ("3", "5") for path in (tmp_path / "checkpoints" / step / "state").rglob("*")]
    for path in damaged:
        if path.is_file():
            path.write_bytes(b"")
    for wanted, save in ((1, 2), (2, 3), (3, None)):
        again = Checkpoints(tmp_path, keep=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, _ = again.restore(state(0))
        assert int(found.round) == wanted
        assert float(found.server["w"][0]) == wanted
        if save:
            again.save(save, state(save), {}, 0.1)
        again.close()
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["3", "5"]


def test_checkpoints_of_another_shape_are_an_error_and_stay(tmp_path):
    """As of client memory that was padded for another number of devices."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, State({"w": np.ones(3, np.float32)}, (), np.int32(1)), {}, 0.5)
    with (
        pytest.raises(ValueError, match=r"no checkpoint of rounds 1 can be read: .*number of devices"),
        pytest.warns(UserWarning, match="checkpoint 1 cannot be read"),
    ):
        checkpoints.restore(State({"w": np.ones(4, np.float32)}, (), np.int32(0)))
    assert checkpoints.rounds() == [1]
    checkpoints.close()


@pytest.mark.parametrize(
    ("line", "score"),
    [
        ({"round": 3}, run.NEVER),
        ({"accuracy": {"a": float("nan")}}, run.NEVER),
        ({"accuracy": {"a": 0.5}, "validation_accuracy": {"a": 0.25}}, 0.25),
    ],
)
def test_what_chooses_the_best_round(line, score):
    assert run.choosing(line, "a", ACCURACY) == score


def test_an_option_is_written_out(capsys):
    """A prefix of --overwrite must not delete a run."""
    with pytest.raises(SystemExit):
        main(["train", "--overw"])
    assert "unknown argument '--overw'" in capsys.readouterr().err
