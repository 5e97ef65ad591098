"""Numbers to predict: a squared error is minimised, and models are judged by RMSE in place of accuracy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import hetfl_jax as hf
from hetfl_jax.core.types import Score, Tally
from hetfl_jax.parts.objective import RMSE, squared_error
from hetfl_jax.results.folder import Checkpoints, read_metrics
from hetfl_jax.run.cli import main
from hetfl_jax.run.export import load_exported
from hetfl_jax.run.federation import Own, build
from hetfl_jax.run.train import NEVER, choosing
from tests.helpers import loss_of

pytestmark = pytest.mark.slow


def plane(rows=500, seed=0):
    """A noisy plane: the numbers are not whole."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    y = x @ np.arange(6) * 0.3 + 0.1 * rng.normal(size=rows)
    return x[100:], y[100:], x[:100], y[:100]


def changes(folder, *more):
    small = (
        "method.name=fedavg", "objective.name=squared_error", "family.net=mlp", "family.hidden=(16,)",
        "family.norm=none", "data.clients=8", "data.own_test=0.2", "data.validation=0.1", "method.args.cohort=4",
        "train.rounds=6", "train.epochs=2", "train.learning_rate=0.02", "train.milestones=()", "train.devices=1",
        "run.eval_every=2", "run.checkpoint_every=2", f"run.folder={folder}",
    )  # fmt: skip
    return [*small, *more]


def config(folder, *more):
    return hf.load_config("heterofl_digits:mix=a1-b1", *changes(folder, *more), tell=lambda text: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from the command line, on an npz file."""
    folder = tmp_path_factory.mktemp("plane")
    np.savez(folder / "plane.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), plane())))
    given = changes(folder, f"data.source=npz:{folder}/plane.npz")
    arguments = [f"--config.{change}" for change in given]
    assert main(["train", "--config=heterofl_digits:mix=a1-b1", *arguments]) == 0
    return folder / "heterofl_digits"


def test_a_run_is_judged_by_rmse_and_by_no_accuracy(finished):
    lines = read_metrics(finished)
    last = lines[-1]
    assert last["score"] == "rmse"
    assert not [name for line in lines for name in line if "accuracy" in name]
    assert last["rmse"]["a"] == pytest.approx(last["loss"]["a"] ** 0.5, rel=1e-5)
    assert last["rmse"]["a"] < 0.6 < 2 < lines[0]["rmse"]["a"]
    assert last["train_rmse"] == pytest.approx(last["train_loss"] ** 0.5, rel=1e-5)
    spread = last["client_rmse"]
    assert spread["best_tenth"] < spread["mean"] < spread["worst_tenth"]
    assert "cosine" not in spread, "a figure of shares"


def test_the_table_says_so(finished):
    text = (finished / "table.txt").read_text()
    assert "test rmse after 6 rounds (best by validation rmse: round " in text
    assert "accuracy" not in text
    assert "%" not in text
    table = json.loads((finished / "table.json").read_text())
    assert table["score"] == "rmse"
    assert table["levels"][0]["last"] == read_metrics(finished)[-1]["rmse"]["a"]


def test_the_best_round_has_the_least_error(finished):
    told = {line["round"]: line["validation_rmse"]["a"] for line in read_metrics(finished) if "rmse" in line}
    best = Checkpoints(finished, keep=100)
    assert best.best() == min((r for r in told if r), key=told.get)
    best.close()
    line = {"rmse": {"a": 2.0}, "validation_rmse": {"a": 3.0}}
    assert choosing(line, "a", RMSE) == -3.0 > choosing({"rmse": {"a": None}}, "a", RMSE) == NEVER
    assert choosing({"accuracy": {"a": 0.5}}, "a", Score()) == 0.5


@pytest.mark.draws
def test_a_finished_run_evaluates_plots_and_exports(finished, capsys):
    assert main(["eval", str(finished), "--round=6"]) == 0
    told = capsys.readouterr().out
    assert f"rmse {read_metrics(finished)[-1]['rmse']['a']:.4f}" in told
    assert "accuracy" not in told
    assert main(["plot", str(finished)]) == 0
    drawn = capsys.readouterr().out
    assert "rmse.png" in drawn
    assert "accuracy.png" not in drawn
    assert (finished / "rmse.png").stat().st_size > 0
    assert main(["export", str(finished), "--level=b"]) == 0
    fields, variables = load_exported(finished / "level_b.npz")
    assert fields["classes"] == 1
    assert variables["params"]["head"]["kernel"].shape == (8, 1)


def test_the_score_is_the_root_of_the_mean_square():
    rng = np.random.default_rng(0)
    outputs, labels = rng.normal(size=(7, 1)), rng.normal(size=7)
    squares = (outputs[:, 0] - labels) ** 2
    found = loss_of(
        squared_error(), jnp.asarray(outputs)[None], np.ones(1, bool), jnp.asarray(labels), jnp.arange(7) < 5
    )
    assert float(found) == pytest.approx(squares[:5].mean(), rel=1e-5)
    total = Tally(jnp.asarray(squares.sum()), jnp.zeros(()), jnp.asarray(7.0))
    assert float(RMSE.of(total)) == pytest.approx(np.sqrt(squares.mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "more"),
    [("heterofl", ["method.args.mask=False"]), ("ifca", ["method.args.clusters=2"]), ("qffl", []), ("feddyn", [])],
)
def test_methods_without_an_objective_of_their_own_take_it(method, more, tmp_path):
    changed = [c for c in changes(tmp_path) if not c.startswith("method.name")]
    target = "heterofl_digits:mix=a1" if method == "ifca" else "heterofl_digits:mix=a1-b1"
    given = hf.load_config(target, f"method.name={method}", *changed, *more, tell=lambda text: None)
    algorithm = build(given, Own(data=plane())).algorithm
    assert algorithm.score.name == "rmse"


DEPTHS = ("family.mix=2x1-1x1", "family.hidden=(8,8)")


def own_loss(family, local, *, cohort):
    """A method of the user's that knows of no slots."""
    from hetfl_jax.parts import select
    from hetfl_jax.parts.compose import compose

    return compose(family, local=local, select=select.uniform(cohort))


@pytest.mark.parametrize(
    ("more", "own", "said"),
    [
        (["method.name=heterofl"], {}, "heterofl with mask=True fixes its objective itself: objective.name must be"),
        (["method.name=depthfl", *DEPTHS], {}, "depthfl fixes its objective itself"),
        (["method.name=inclusivefl", *DEPTHS], {}, "inclusivefl fixes its objective itself"),
        ([], {"method": own_loss}, "has an objective of its own, judged by accuracy: leave objective.name"),
        (["objective.name=huber"], {}, "objective 'huber' is not one of cross_entropy, squared_error (objective.name)"),
        (["objective.name=cross_entropy"], {}, "numbers to predict (a regression) need objective.name=squared_error"),
        (["family.outputs=3"], {}, "outputs 3 where labels are numbers to predict: need 0 or 1 (family.outputs)"),
        (["data.split=shards"], {}, "a split by classes needs whole numbers"),
        (["data.groups=labels:2"], {}, "groups 'labels:2' of numbers to predict: need one class an example (data."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(more, own, said, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(config(tmp_path, *more), Own(data=plane(), **own))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
