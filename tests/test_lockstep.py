"""Points of a sweep that run as one are, but for rounding, what they are one after the other."""

import csv
import itertools
import json
import threading

import jax
import numpy as np
import pytest

import hetfl_jax as hf
from hetfl_jax.results.folder import Checkpoints
from hetfl_jax.run import lockstep, workers
from hetfl_jax.run.config import load_config
from hetfl_jax.run.lab import prepare
from hetfl_jax.run.sweep import DONE, FAILED

pytestmark = pytest.mark.slow

SMALL = ("family.net=mlp", "family.norm=none", "family.hidden=(8,)", "run.eval_masked=False", "train.rounds=2",
         "run.eval_every=1", "data.clients=20", "train.devices=1")  # fmt: skip
OVER = {"train.learning_rate": [0.02, 0.05], "run.seed": [0, 1]}
METHODS = {
    "fedavg": ("heterofl_digits:mix=a1", "method.name=fedavg", "data.seed=0"),
    # With memory of clients.
    "heterofl": ("heterofl_digits:mix=a1-b1", "capacity.name=fixed", "uplink.name=qsgd", "uplink.args.levels=4",
                 "uplink.error_feedback=True"),
    "power_of_choice": ("heterofl_digits:mix=a1-b1", "select.name=power_of_choice", "select.args.candidates=12"),
    "ifca": ("heterofl_digits:mix=a1", "method.name=ifca", "method.args.clusters=2"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def run(folder, target, *changes, over=OVER, points=1, **options):
    base = load_config(
        target, *SMALL, *changes, f"run.folder={folder}", f"train.points_at_once={points}", tell=lambda text: None
    )
    return hf.sweep(base, over, quiet=True, **options)


def numbers(found):
    """Every value of ``sweep.csv`` but those that are told in seconds."""
    with (found.folder / "sweep.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["value"] and "seconds" not in row["metric"]]
    return {(r["point"], r["round"], r["level"], r["metric"]): float(r["value"]) for r in rows}


def same(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    names = list(one)
    np.testing.assert_allclose([one[n] for n in names], [other[n] for n in names], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_points_that_run_as_one_are_what_they_are_alone(name, tmp_path, monkeypatch):
    target, *changes = METHODS[name]
    compiled = []
    together = lockstep.Lockstep._together
    monkeypatch.setattr(
        lockstep.Lockstep, "_together", lambda self, asked: compiled.append(self._programs) or together(self, asked)
    )
    alone = run(tmp_path / "alone", target, *changes)
    assert not compiled
    at_once = run(tmp_path / "together", target, *changes, points=4)
    assert [e.status for e in at_once.points] == [DONE] * 4
    same(numbers(alone), numbers(at_once))
    assert len({id(programs) for programs in compiled}) == 1
    tiers = len({row["level"] for row in at_once.table})
    assert [key[0] for key in compiled[0]].count("round") <= 2  # the first round's state is stacked, later ones are
    assert len(compiled[0]) <= 2 + 2 + tiers + 1


def test_a_group_that_is_not_full_shares_the_programs_of_full_ones(tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr(workers, "Lockstep", lambda *args: groups.append(args[0]) or lockstep.Lockstep(*args))
    over = {"run.seed": [0, 1, 2, 3, 4], "train.momentum": [0.0, 0.9]}  # two structures, in turns
    changes = ("heterofl_digits:mix=a1", "method.name=fedavg", "data.seed=0")
    alone, at_once = run(tmp_path / "alone", *changes, over=over), run(tmp_path / "3", *changes, over=over, points=3)
    same(numbers(alone), numbers(at_once))
    assert groups == [3] * 4
    assert at_once.programs == 2


@pytest.mark.filterwarnings("ignore:round .* replies not finite")
def test_a_point_that_is_lost_does_not_stop_the_others(tmp_path):
    over = {"train.learning_rate": [0.05, 1e30, 0.02]}
    changes = ("heterofl_digits:mix=a1", "train.rounds=5", "train.clip_norm=0.0")
    alone = run(tmp_path / "alone", *changes, over=over)
    at_once = run(tmp_path / "together", *changes, over=over, points=3)
    assert [e.status for e in at_once.points] == [e.status for e in alone.points] == [DONE, FAILED, DONE]
    assert "no reply was finite in rounds 1, 2, 3" in at_once.points[1].error
    same(numbers(alone), numbers(at_once))


def test_where_a_program_of_all_fails_points_run_one_after_the_other(tmp_path, monkeypatch):
    calls = []

    def full(self, asked):
        calls.append(len(asked))
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwhile allocating")

    alone = run(tmp_path / "alone", *METHODS["fedavg"])
    monkeypatch.setattr(lockstep.Lockstep, "_together", full)
    said = "4 points run one after the other: RESOURCE_EXHAUSTED: out of memory while allocating"
    with pytest.warns(UserWarning, match=said):
        at_once = run(tmp_path / "together", *METHODS["fedavg"], points=4)
    assert calls == [4]
    assert [e.status for e in at_once.points] == [DONE] * 4
    same(numbers(alone), numbers(at_once), 0)


def test_runs_of_a_full_sweep_have_checkpoints_and_go_on(tmp_path):
    """A sweep that was ended goes on, with another number of points at once."""
    changes = (*METHODS["heterofl"], "run.checkpoint_every=1")
    whole = run(tmp_path / "whole", *changes, points=4, full=True)
    first = run(tmp_path / "parts", *changes, points=2, full=True)
    told = json.loads((first.folder / "sweep.json").read_text())
    for point in told["points"]:
        point["status"] = "waiting"
    (first.folder / "sweep.json").write_text(json.dumps(told))
    again = run(tmp_path / "parts", *changes, points=4, full=True, resume=True)
    assert [e.error for e in again.points] == [None] * 4
    same(numbers(whole), numbers(again))
    for e in again.points:
        kept = Checkpoints(again.folder / e.point.name, 2)
        assert kept.rounds() == [1, 2]
        kept.close()


def test_methods_that_work_on_the_host_run_alone(tmp_path, monkeypatch):
    """The reason is told once, not for every point."""
    monkeypatch.setattr(workers, "Lockstep", lambda *args: pytest.fail("points met"))
    changes = ("method.name=cfl", "train.store=device", "method.args.cohort=20")
    with pytest.warns(UserWarning, match="one after the other") as said:
        found = run(tmp_path, "heterofl_digits:mix=a1", *changes, over={"run.seed": [0, 1]}, points=2)
    line = "points run one after the other: the method works on the host between rounds (method.name)"
    assert [str(each.message) for each in said if "one after" in str(each.message)] == [line]
    assert [e.status for e in found.points] == [DONE] * 2


def test_as_many_points_as_fit(tmp_path):
    """What a round takes beside the examples, which are there once; at most 64, at least one."""
    lab = prepare(load_config("heterofl_digits:mix=a1", *SMALL, f"run.folder={tmp_path}"))
    examples = lab.population.x.nbytes + lab.population.y.nbytes
    found = [workers.fitting(lab, int(1.25 * (examples + 30_000 * 2**power))) for power in range(-20, 20)]
    assert found == sorted(found)
    assert found[0] == 1
    assert found[-1] == workers.MOST
    between = [count for count in found if 4 < count < workers.MOST]
    assert between
    for one, twice in itertools.pairwise(between):
        assert abs(twice - 2 * one) <= 2


def test_points_that_ask_for_different_programs_get_their_own(tmp_path):
    meeting, found = lockstep.Lockstep(2), {}

    def point(place):
        found[place] = float(meeting.call(place, place, lambda x: (place + 2.0) * x, (np.float32(5),)))
        meeting.leave(place)

    workers.in_threads([lambda: point(0), lambda: point(1)], threading.Event())
    assert found == {0: 10.0, 1: 15.0}
