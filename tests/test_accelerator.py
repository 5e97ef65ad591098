"""The one command for an accelerator: its steps run, what they measured is kept, and a cut-off loses one cell."""

import json
import subprocess

import pytest

from experiments.throughput import accelerator, cells, published
from experiments.throughput.cells import Cell
from hetfl_jax.run.federation import build as federation
from hetfl_jax.run.given import Own


def test_shares_make_up_the_whole_time():
    ends = accelerator.shares(720)
    assert list(ends) == list(cells.STEPS)
    assert ends["constants"] == pytest.approx(36)
    assert ends["tests"] == pytest.approx(720)


def test_a_step_goes_on_with_the_cells_that_are_missing(tmp_path):
    ran = []

    def of(name):
        return Cell(name, lambda left: (ran.append(name), [{"value": 1.5}])[1])

    def broken(left):
        raise RuntimeError("no memory\nat all")

    step = [of("one"), Cell("two", broken), of("three")]
    assert accelerator.run_step("rounds", tmp_path, True, 60, step) == 3
    assert ran == ["one", "three"]
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"cell": "four", "val')  # a cut-off
    step[1] = of("two")
    assert accelerator.run_step("rounds", tmp_path, True, 60, [*step, of("four")]) == 2
    assert ran == ["one", "three", "two", "four"]
    assert accelerator.run_step("rounds", tmp_path, True, 0, [*step, of("five")]) == 0
    found = accelerator.rows_of(tmp_path, "rounds")
    assert [row["cell"] for row in found if "error" not in row] == ["one", "three", "two", "four"]
    assert [row["error"] for row in found if "error" in row] == ["RuntimeError: no memory at all"]
    text = accelerator.summary(tmp_path, accelerator.parse(["--out", str(tmp_path), "--tiny"]))
    assert "| one | 1.5 |" in text
    assert "## million: one million clients" in text


def test_a_step_that_hangs_is_ended_and_the_next_ones_run(tmp_path, monkeypatch, capsys):
    asked = []

    def run(command, timeout, check):
        asked.append((command[command.index("--step") + 1], timeout))
        if len(asked) == 1:
            raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    accelerator.main(["--minutes", "12", "--out", str(tmp_path)])
    assert [name for name, _ in asked] == list(cells.STEPS)
    assert asked[0][1] == pytest.approx(36 + accelerator.GRACE, abs=1)
    assert asked[1][1] == pytest.approx(324 + accelerator.GRACE, abs=1), "with what the first one left"
    assert "constants: its time is over" in capsys.readouterr().out
    assert (tmp_path / "summary.md").exists()


def test_every_cell_has_a_name_of_its_own():
    for tiny in (True, False):
        names = list(cells.every(tiny))
        assert len(set(names)) == len(names)
        assert {step for step, _ in names} == set(cells.STEPS)


@pytest.mark.slow
def test_all_steps_run_at_tiny_sizes(tmp_path):
    accelerator.main(["--minutes", "60", "--out", str(tmp_path), "--tiny", "--here"])
    rows = {name: accelerator.rows_of(tmp_path, name) for name in cells.STEPS}
    assert not [row for found in rows.values() for row in found if "error" in row]
    assert all(rows.values())
    assert all(row["ms"] > 0 and 0 < row["of the roof"] < 1 for row in rows["rounds"])
    assert rows["million"][0]["clients"] == rows["million"][0]["of"] == 40
    assert rows["tests"][0]["exit"] == 0
    assert json.loads((tmp_path / "sweep.jsonl").read_text())["points"] == 2


@pytest.mark.parametrize("name", published.PROTOCOLS)
def test_published_protocols_are_configs(name):
    of = published.PROTOCOLS[name]
    fed = federation(published.get_config(f"protocol={name}"), Own(data=published.random_data(of, 100 * of.clients)))
    assert fed.partition.size.size == of.clients
    wanted = {"pfl": 1_626_442, "pfllib": 582_026, "fedjax": 1_206_590, "blazefl": 62_006}
    assert fed.costs.parameters[0] == wanted[name]
