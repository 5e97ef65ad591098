"""The report page of other folders than a sweep's that is done: one run, an error, points that wait, many points."""

import json
import re

import pytest

from hetfl_jax.results.folder import read_metrics
from hetfl_jax.results.reading import SWEEP
from hetfl_jax.run.report import report
from tests import browser
from tests.sweeps import invented
from tests.test_page import LEVELS, cells, choose, needs_browser


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@needs_browser
def test_one_run_has_a_page_too(chromium, tmp_path):
    sweep = invented(tmp_path / "s", {"run.seed": [0]}, rounds=12, every=2, lists=True)
    chromium.open(report(sweep / "run.seed=0", tmp_path / "one.html"))
    assert len(cells(chromium)) == 1
    assert chromium.value(
        "document.querySelectorAll('#curves figure')[0].querySelectorAll('g[data-name]').length"
    ) == len(LEVELS)
    assert chromium.messages() == []


@needs_browser
def test_a_score_that_is_best_when_small_and_points_that_wait(chromium, tmp_path):
    folder = invented(tmp_path / "s", {"train.learning_rate": [0.1, 0.3]}, rounds=6, levels=("a", "b"))
    for path in folder.glob("*/*.json*"):
        path.write_text(path.read_text().replace('"accuracy"', '"rmse"').replace("client_accuracy", "client_rmse"))
    for path in folder.glob("*/metrics.jsonl"):
        path.write_text(path.read_text().replace('{"round"', '{"score": "rmse", "round"'))
    told = json.loads((folder / SWEEP).read_text())
    told["points"].append({"name": "x", "values": {"train.learning_rate": 1.0}, "status": "waiting", "error": None})
    (folder / SWEEP).write_text(json.dumps(told))
    chromium.open(report(folder, tmp_path / "x.html"))
    rows = cells(chromium)
    first = read_metrics(folder / "train.learning_rate=0.1")
    assert rows[0][2] == [f"{first[-1]['rmse']['a']:.4g}", pytest.approx(first[-1]["rmse"]["a"], rel=1e-8)]
    assert [row[-1][0] for row in rows] == ["done", "done", "waiting"]
    assert rows[2][2] == ["-", None]
    assert [row[0][0] for row in rows] == ["train.learning_rate=0.1", "train.learning_rate=0.3", "x"]
    choose(chromium, "#target", "0.3")  # these invented errors grow, so that the first round is below
    assert [row[1][0] for row in cells(chromium, "costs")] == ["1 of 1", "1 of 1", "0 of 0"]
    assert [row[2][1] for row in cells(chromium, "costs")] == [0, 0, None]
    assert "1 of 3 points are not done" in chromium.value("document.querySelector('#note').textContent")
    assert chromium.messages() == []


def test_a_hundred_points_stay_below_two_megabytes(tmp_path):
    over = {"train.learning_rate": [0.01 * k for k in range(1, 21)], "run.seed": list(range(5))}
    folder = invented(tmp_path / "many", over, rounds=200, clients=100)
    path = report(folder, tmp_path / "many.html")
    text = path.read_text()
    assert 1_200_000 < len(text.encode()) < 2_000_000
    told = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    rounds = told["arrays"][told["points"][-1]["rounds"]]
    assert (rounds[0], rounds[-1]) == (0, 200)
    assert 20 < len(rounds) <= told["fewer"] + 1 < 200
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_names_from_outside_are_text(tmp_path):
    """A folder's name, a value or an error cannot end the page's script or become a part of it."""
    folder = invented(tmp_path / "<b>&x", {"method.name": ["a<script>alert(1)", "<!--"]}, rounds=2)
    text = report(folder, tmp_path / "x.html").read_text()
    assert text.count("<script") == 5
    assert "<b>&x" not in text
    assert "<!--" not in text.removeprefix("<!DOCTYPE html>")
