"""Folders read back: points, rows of the long table, arrays, paired comparisons, and the papers of a run."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
from scipy import stats

import hetfl_jax as hf
from hetfl_jax import methods
from hetfl_jax.models import NETS
from hetfl_jax.models.layers import NORMS
from hetfl_jax.parts.codec import CODECS
from hetfl_jax.parts.local import OPTIMIZERS
from hetfl_jax.results import reading
from hetfl_jax.results.compare import compare, sign_flip, t_interval
from hetfl_jax.run import cite
from hetfl_jax.run.cli import main
from hetfl_jax.run.selections import SELECTIONS
from hetfl_jax.run.slots import ADVERSARIES
from hetfl_jax.run.splits import SPLITS
from tests.helpers import TINY
from tests.sweeps import grid, invented, write_sweep

SMALL = (*TINY, "family.net=mlp", "family.hidden=(8,)", "family.norm=none", "data.own_test=0.2", "train.devices=1")
OVER = {"train.learning_rate": [0.05, 0.1], "run.seed": [0, 1]}


def trained_sweep(folder):
    """Four runs as ``hetfl train`` writes them, with the files of a sweep around them."""
    told = []
    for name, values in grid(OVER):
        changes = [f"{key}={value}" for key, value in values.items()]
        config = hf.load_config("heterofl_digits:mix=a1-b1,quick", *SMALL, *changes)
        with config.unlocked():
            config.run.folder, config.run.name = str(folder), name
        hf.train(config, quiet=True)
        told.append({"name": name, "values": values, "status": "done", "error": None, "seconds": 1.0})
    return write_sweep(folder, OVER, told)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return trained_sweep(tmp_path_factory.mktemp("sweep"))


def rows_of(folder):
    with (folder / reading.TABLE).open() as file:
        return list(csv.DictReader(file))


def test_arrays_hold_what_the_long_table_holds(sweep):
    found = hf.results(sweep)
    assert found.points == tuple(name for name, _ in grid(OVER))
    np.testing.assert_array_equal(found.values["train.learning_rate"], [0.05, 0.05, 0.1, 0.1])
    np.testing.assert_array_equal(found.values["run.seed"], [0, 1, 0, 1])
    np.testing.assert_array_equal(found.rounds, [0, 1, 2])
    rows = rows_of(sweep)
    assert {"accuracy", "loss", "train_loss", "down_bytes", "client_accuracy/mean"} <= {row["metric"] for row in rows}
    for row in rows:
        name = f"{row['metric']}/{row['level']}" if row["level"] else row["metric"]
        value = found.metrics[name][found.points.index(row["point"]), int(row["round"])]
        assert value == float(row["value"]), row
    held = sum(int(np.isfinite(values).sum()) for values in found.metrics.values())
    assert held == len(rows)


def test_a_run_is_one_point_and_a_folder_of_runs_is_many(sweep):
    one = hf.results(sweep / next(grid(OVER))[0])
    whole = hf.results(sweep)
    np.testing.assert_array_equal(one.metrics["accuracy/a"][0], whole.metrics["accuracy/a"][0])
    assert one.values == {}
    (sweep / reading.SWEEP).rename(sweep / "aside")
    try:
        loose = hf.results(sweep)
    finally:
        (sweep / "aside").rename(sweep / reading.SWEEP)
    assert set(loose.values) == {"train.learning_rate", "run.seed"}
    np.testing.assert_array_equal(loose.metrics["accuracy/b"], whole.metrics["accuracy/b"])


def test_points_that_wait_have_no_numbers(tmp_path):
    folder = invented(tmp_path / "s", {"train.learning_rate": [0.1, 0.2]}, rounds=3)
    told = json.loads((folder / reading.SWEEP).read_text())
    told["points"].append({"name": "x", "values": {"train.learning_rate": 0.3}, "status": "waiting", "seconds": None})
    (folder / reading.SWEEP).write_text(json.dumps(told))
    found = hf.results(folder)
    assert found.status == ("done", "done", "waiting")
    assert np.isnan(found.metrics["accuracy/a"][2]).all()
    assert np.isfinite(found.metrics["accuracy/a"][:2]).all()


def test_differences_are_paired_by_seed(tmp_path):
    folder = invented(tmp_path / "s", {"train.learning_rate": [0.05, 0.3], "run.seed": [3, 4, 5, 6]}, rounds=4)
    shutil.rmtree(folder / "train.learning_rate=0.3,run.seed=6")
    found = compare([folder])
    scores = hf.results(folder).metrics["accuracy/b"][:, -1]
    row = next(row for row in found.rows if row.level == "b")
    pairs = scores[5:7] - scores[1:3]  # the first point, seed 3, has failed; that of seed 6 is gone
    assert row.seeds == (4, 5)
    assert row.difference == pytest.approx(pairs.mean(), abs=1e-12)
    expected = stats.ttest_rel(scores[5:7], scores[1:3])
    low, high = expected.confidence_interval(0.95)
    assert (row.low, row.high, row.t_test) == pytest.approx((low, high, expected.pvalue))
    assert found.left_out == ["train.learning_rate=0.05,run.seed=3", "train.learning_rate=0.3,run.seed=6"]
    wide = compare([folder], confidence=0.99).rows[1]
    assert wide.high - wide.low > row.high - row.low


def test_the_sign_flip_test_is_scipys_permutation_test():
    rng = np.random.default_rng(1)
    for count in (3, 5, 9):
        pairs = rng.normal(0.5, 1, count)
        mean = lambda x, axis: np.mean(x, axis)  # noqa: E731
        expected = stats.permutation_test(
            (pairs,), mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
        )
        assert sign_flip(pairs) == pytest.approx(expected.pvalue, abs=1e-12)
    many = rng.normal(0.6, 1, 20)
    exact = stats.permutation_test(
        (many,), mean, permutation_type="samples", n_resamples=2**20, vectorized=True, batch=4096
    )
    share = 4 * math.sqrt(exact.pvalue / 100_000)  # four deviations of the drawn share
    assert sign_flip(many) == pytest.approx(exact.pvalue, abs=share)
    assert t_interval(np.array([0.5]), 0.95) == (None, None, None)


def test_runs_of_one_config_in_two_folders_are_two_groups(tmp_path):
    over = {"run.seed": [0, 1, 2]}
    first, second = (invented(tmp_path / name, over, rounds=rounds) for name, rounds in (("old", 3), ("new", 9)))
    found = compare([first, second], metric="loss")
    assert str(first) in found.baseline
    assert {row.group for row in found.rows} == {str(second)}
    assert all(row.difference < 0 for row in found.rows)


def test_compare_prints_a_table(tmp_path, capsys):
    folder = invented(tmp_path / "s", {"train.learning_rate": [0.05, 0.3], "run.seed": [0, 1]}, rounds=4, levels=("a",))
    assert main(["compare", str(folder), "--confidence", "0.9"]) == 0
    text = capsys.readouterr().out
    row = compare([folder], confidence=0.9).rows[0]
    for part in ("90% interval", "learning_rate 0.3", f"{100 * row.mean:.2f}%", f"{100 * row.difference:+.2f}"):
        assert part in text
    assert f"p = {row.t_test:.3g}" in text


def entries(text):
    return re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)


def test_cite_names_method_data_and_parts(sweep, capsys):
    assert main(["cite", str(sweep)]) == 0
    text = capsys.readouterr().out
    assert entries(text) == ["hetfl_jax", "bradbury2018jax", "diao2021heterofl", "alpaydin1998optical"]
    assert "names =" not in text
    assert "no paper" not in text
    config = {
        "method.name": "mine",
        "uplink.name": "top_k",
        "uplink.error_feedback": True,
        "data.source": "npz:EMNIST.npz",
    }
    text = cite.bibtex(list(cite.parts(config)))
    assert entries(text)[2:] == ["karimireddy2019error", "stich2018sparsified", "cohen2017emnist"]
    assert "no paper known here of method:mine" in text


def test_every_named_part_has_its_paper_or_needs_none():
    known = {name for paper in cite.papers() for name in paper.names} | cite.COMMON
    listed = {
        "method": methods.names(), "net": NETS, "norm": NORMS, "split": SPLITS, "select": SELECTIONS, "codec": CODECS,
        "adversary": ADVERSARIES, "optimizer": OPTIMIZERS, "source": ("digits", "synthetic"),
    }  # fmt: skip
    missing = [f"{kind}:{name}" for kind, names in listed.items() for name in names if name != "none"]
    assert set(missing) <= known
    # codecs can be wrapped, data have names of their own
    apart = ("software", "arg", "groups", "source", "codec", "clock")
    dead = [name for name in known if name.partition(":")[0] not in apart and name not in missing]
    assert not dead
    keys = [entries(paper.text) for paper in cite.papers()]
    assert len({key for (key,) in keys}) == len(keys)
    for paper in cite.papers():
        assert paper.text.count("{") == paper.text.count("}")
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", paper.text, re.MULTILINE))
        need = {"author", "title"} if "software" in paper.text[:9] else {"author", "title", "year"}
        assert need <= set(fields), paper.text
        assert len(fields) == paper.text.count("\n") - 2


def test_every_run_has_an_entry_of_the_hparams_plugin(sweep):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    for name, values in grid(OVER):
        (path,) = (sweep / name / "tensorboard").glob("events*")
        told = {}
        for record in records(path.read_bytes()):
            for value in Event.FromString(record).summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    told[value.tag.rpartition("/")[2]] = HParamsPluginData.FromString(
                        value.metadata.plugin_data.content
                    )
        settings = told["session_start_info"].session_start_info.hparams
        assert settings["train.learning_rate"].number_value == values["train.learning_rate"]
        assert settings["method.name"].string_value == "heterofl"
        assert [metric.name.tag for metric in told["experiment"].experiment.metric_infos] == [
            "accuracy/a",
            "accuracy/b",
        ]
        assert told["session_end_info"].session_end_info.status == 1


def records(data):
    """Records of an event file: length, its checksum, the bytes, their checksum."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + size]
        data = data[16 + size :]


def damaged(folder, name, text):
    (folder / name).write_text(text)
    return folder


WRONG = {
    "nothing there": (["report", "nowhere"], "nowhere holds no run and no sweep"),
    "twice": (["report", "{s}", "{s}/."], "is named twice: need every folder once"),
    "no folder of output": (["report", "{s}", "-o", "nowhere/x.html"], "nowhere/x.html: need a file in a folder"),
    "one group": (["compare", "{s}/train.learning_rate=0.1"], "1 finished run(s) that differ in the seed alone"),
    "no metric": (["compare", "{s}", "--metric", "acc"], "metric 'acc' of"),
    "confidence": (["compare", "{s}", "--confidence", "95"], "confidence 95.0, allowed 0 < c < 1 (--confidence)"),
    "nothing to cite": (["cite", "nowhere"], "nowhere holds no run"),
    "damaged": (["report", "{d}"], "sweep.json is damaged, it is no JSON"),
    "another sweep.json": (["compare", "{e}"], "sweep.json has no 'over' nor 'points'"),
    "a bad partition": (["report", "{p}"], "partition.npz is damaged"),
    "nothing evaluated": (["report", "{w}"], "no round was evaluated yet"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("wrong")
    made = {
        name: invented(base / name, {"train.learning_rate": [0.1, 0.2]}, rounds=2, levels=("a",)) for name in "sdepw"
    }
    damaged(made["d"], "sweep.json", "{")
    damaged(made["e"], "sweep.json", "{}")
    damaged(made["p"] / "train.learning_rate=0.1", "partition.npz", "")
    for name in ("0.1", "0.2"):
        damaged(made["w"] / f"train.learning_rate={name}", "metrics.jsonl", "")
    return made


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line(case, folders, capsys):
    arguments, part = WRONG[case]
    assert main([argument.format(**folders) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert part in told
    assert told.count("\n") == 1
    assert told.startswith("hetfl: ")


def test_seeds_that_are_not_common_are_told(tmp_path):
    first = invented(tmp_path / "a", {"train.learning_rate": [0.1], "run.seed": [0, 1]}, rounds=2)
    second = invented(tmp_path / "b", {"train.learning_rate": [0.2], "run.seed": [2, 3]}, rounds=2)
    with pytest.raises(ValueError, match=r"seeds 0, 1, learning_rate 0.2 2, 3: none is common \(run.seed\)"):
        compare([first, second])
