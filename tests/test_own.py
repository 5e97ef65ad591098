"""What a user brings: a net, data, a split, a method, metrics and callbacks, with everything a run has."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hetfl_jax as hf
from hetfl_jax.data import partition
from hetfl_jax.methods import fedavg
from hetfl_jax.run.federation import Own, build
from tests.helpers import TINY, conv_family, mlp_family, sgd, toy_population

pytestmark = pytest.mark.slow


class Small(nn.Module):
    """A net of the user's, with dropout under one of the usual names."""

    width: float = 1.0
    classes: int = 3

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.relu(nn.Dense(int(16 * self.width))(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.1)(x, deterministic=deterministic)
        return nn.Dense(self.classes)(x)


def data(rows=240, features=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5)
    return x[40:], y[40:], x[:40], y[:40]


def config(folder, *changes):
    small = ("data.clients=8", "method.args.cohort=4", "train.rounds=6", "train.epochs=5", "run.eval_every=3")
    target = "heterofl_digits:mix=a1-b1"
    plain = (
        "data.validation=0.0",
        "family.norm=none",
        "train.milestones=()",
        f"run.folder={folder}",
        "train.devices=1",
    )
    return hf.load_config(target, *small, *plain, *changes)


def test_a_net_data_split_method_metric_and_callback(tmp_path):
    """All at once through the one entry; the run has its table, its metrics by name, and resumes."""
    called = []

    def in_turn(labels, clients, seed):
        order = np.arange(len(data()[0])).reshape(-1, clients).T.ravel()
        return partition.Partition(order, np.full(clients, len(order) // clients))

    def make(family, local, *, cohort, slots=None):
        return fedavg.make(family, local, cohort=cohort, slots=slots)

    def margin(logits, labels, valid):
        top = jax.lax.top_k(logits, 2)[0]
        return top[:, 0] - top[:, 1]

    brought = dict(
        net=Small(), data=data(), split=in_turn, method=make, metrics={"margin": margin},
        callbacks=[lambda round, scores, state: called.append((round, scores["accuracy"]["a"], int(state.round)))],
    )  # fmt: skip
    result = hf.train(config(tmp_path), quiet=True, **brought)
    assert [entry[0] for entry in called] == [0, 3, 6]
    assert called[-1][1] == pytest.approx(result.table[0]["last"])
    assert called[-1][2] == 6
    assert result.table[0]["last"] > 0.6 > result.table[0]["start"]
    assert result.table[0]["margin"] > 0
    assert "margin" in (result.folder / "table.txt").read_text()
    assert result.metrics["margin/b"].shape == (7,)
    with np.load(result.folder / "partition.npz") as file:
        assert (file["index"] == in_turn(None, 8, 0).rows).all()
    longer = hf.train(config(tmp_path, "train.rounds=7"), quiet=True, resume=True, **brought)
    assert longer.summary["rounds"] == 7
    x_train, y_train, *rest = data()
    other = {**brought, "data": (x_train, (y_train + 1) % 3, *rest)}
    with pytest.raises(ValueError, match="was run on other data: .*y_train"):
        hf.train(config(tmp_path, "train.rounds=8"), quiet=True, resume=True, **other)


def test_a_net_and_a_method_of_a_module_in_the_users_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import flax.linen as nn\n"
        "from hetfl_jax.methods import fedavg\n\n\n"
        "class Net(nn.Module):\n"
        "    width: float = 1.0\n"
        "    classes: int = 10\n\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        x = nn.relu(nn.Dense(int(8 * self.width))(x.reshape(x.shape[0], -1)))\n"
        "        return nn.Dense(self.classes)(x)\n\n\n"
        "def make(family, local, *, cohort, patience=2, slots=None):\n"
        "    return fedavg.make(family, local, cohort=cohort, slots=slots)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    told = []
    changes = [
        "family.net=mine:Net",
        "method.name=mine",
        "method.args.patience=3",
        "data.clients=10",
        "train.devices=1",
        *TINY,
    ]
    small = hf.load_config("heterofl_digits:mix=a1-b1,quick", *changes, f"run.folder={tmp_path}", tell=told.append)
    assert small.method.args.patience == 3
    assert told == ["hetfl: mine has no argument assignment, mask: dropped (method.args)"]
    result = hf.train(small, quiet=True)
    assert result.table[0]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10
    with pytest.raises(ValueError, match="no Nothing in a module mine"):
        hf.train(hf.load_config("heterofl_digits:quick", "family.net=mine:Nothing", f"run.folder={tmp_path / 'x'}"))


def test_an_nnx_net_through_its_bridge(tmp_path):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    result = hf.train(config(tmp_path, "family.mix=a1"), net=nnx.bridge.to_linen(Two), data=data(), quiet=True)
    assert result.table[0]["last"] > result.table[0]["start"]
    with pytest.raises(ValueError, match=r"sets width, which net .* has not \(family.mix\)"):
        hf.train(config(tmp_path / "two"), net=nnx.bridge.to_linen(Two), data=data(), quiet=True)


def test_a_population_with_a_test_set(tmp_path):
    x, y, *test = data()
    people = hf.population(x, y, np.arange(200), np.full(8, 25), level=np.arange(8) % 2, levels=2)
    changes = ("method.name=fedavg", "family.net=mlp", "family.hidden=(8,)")
    fed = build(config(tmp_path, *changes), Own(data=(people, tuple(test))))
    np.testing.assert_array_equal(fed.train.level, people.level)
    np.testing.assert_array_equal(fed.train.size, people.size)
    assert fed.test_batches == 4
    with pytest.raises(ValueError, match="a Population alone has no test set"):
        build(config(tmp_path, *changes), Own(data=people))


def test_an_algorithm_must_have_the_levels_of_the_mix(tmp_path):
    algorithm = fedavg.make(mlp_family(), sgd(), cohort=4)
    fed = build(config(tmp_path, "family.net=mlp"), Own(data=data(), method=algorithm))
    assert fed.algorithm is algorithm
    with pytest.raises(ValueError, match="the algorithm has 2 levels, the mix 1"):
        build(config(tmp_path, "family.mix=a1", "family.net=mlp"), Own(data=data(), method=algorithm))


def test_an_evaluation_does_not_depend_on_its_batches():
    """With static batch norm the statistics come from training data, not from what is evaluated."""
    population = toy_population(image=True)
    algorithm = fedavg.make(conv_family(norm="bn"), sgd(), cohort=4)
    state = hf.start(algorithm, hf.device_store(), 12, jax.random.key(0))
    found = [
        hf.evaluate(algorithm, state, population, statistics=population, batch_size=size, level=1)
        for size in (1, 7, 50)
    ]
    with pytest.raises(ValueError, match="collects batch statistics before evaluation: give statistics="):
        hf.evaluate(algorithm, state, population)
    assert algorithm.statistics is not None
    fixed = hf.evaluate(algorithm, state.server, population, statistics=population, batch_size=7, level=1)
    assert fixed == found[1]
    plain = fedavg.make(conv_family(norm="none"), sgd(), cohort=4)
    state = hf.start(plain, hf.device_store(), 12, jax.random.key(0))
    scores = [hf.evaluate(plain, state, population, batch_size=size) for size in (1, 7, 50)]
    np.testing.assert_allclose([s["loss"] for s in scores], scores[0]["loss"], rtol=1e-5)
    assert len({s["accuracy"] for s in scores}) == 1
    with pytest.raises(ValueError, match=r"level 2, allowed 0..1"):
        hf.evaluate(plain, state, population, level=2)


@pytest.mark.parametrize(
    ("brought", "said"),
    [
        ({"data": 3}, r"data is a int: allowed \(x_train, y_train, x_test, y_test\)"),
        ({"data": {"x_train": np.zeros((4, 2))}}, "data has no y_train"),
        ({"data": (np.zeros((4, 2)), np.arange(3), np.zeros((1, 2)), np.zeros(1, int))}, "x_train has 4 rows, y_train"),
        ({"data": (*data()[:2], np.full((4, 6), np.nan), np.zeros(4, int))}, "x_test row 0"),
        ({"net": Small(classes=2), "data": data()}, r"labels 0..2, but the net has 2 outputs"),
        ({"method": "nope", "data": data()}, "method 'nope' is not one of .*cfl"),
        ({"split": np.zeros(3), "data": data()}, r"split has 3 client ids for 200 training rows: need one each"),
    ],
)
def test_what_does_not_fit_is_one_line(brought, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        hf.train(config(tmp_path, "family.net=mlp", "family.hidden=(8,)"), quiet=True, **brought)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_state_of_a_run_is_what_a_callback_sees(tmp_path):
    states = []
    keep = lambda round, scores, state: states.append(jax.device_get(state.round))  # noqa: E731
    hf.train(config(tmp_path, "family.net=mlp", "family.hidden=(8,)"), data=data(), callbacks=[keep], quiet=True)
    assert [int(round) for round in states] == [0, 3, 6]


class Grouped(nn.Module):
    """A net whose group norm mixes channels in use with others."""

    width: float = 1.0
    classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(4)(nn.Dense(int(16 * self.width))(x))
        return nn.Dense(self.classes)(nn.relu(x))


class Counted(nn.Module):
    """A net with flax's own batch norm, told of padding or not."""

    classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(self.classes)(nn.relu(x))


class Told(Counted):
    @nn.compact
    def __call__(self, x, train=False, valid=None):
        rows = None if valid is None else valid[:, None]
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x), mask=rows)
        return nn.Dense(self.classes)(nn.relu(x))


def test_a_net_that_masking_changes_runs_dense_only(tmp_path):
    brought = Own(net=Grouped(), data=data())
    with pytest.warns(UserWarning, match="net Grouped: level 1 masked inside level 0 differs from itself"):
        fed = build(config(tmp_path), brought)
    assert not fed.family.masked
    assert build(config(tmp_path), Own(net=Small(), data=data())).family.masked


def test_rows_that_are_padding_do_not_enter_statistics(tmp_path):
    """25 examples in batches of 10: refused without ``valid``; with it the statistics are those of the real rows."""
    one = ("family.mix=a1", "family.net=mlp", "train.rounds=1")
    with pytest.raises(ValueError, match="net Counted has batch statistics and no argument 'valid'.*client 0 has 25"):
        build(config(tmp_path, *one), Own(net=Counted(), data=data()))
    build(config(tmp_path, *one, "train.batch_size=5"), Own(net=Counted(), data=data()))
    fed = build(config(tmp_path, *one), Own(net=Told(), data=data()))
    net, variables = fed.family.nets[0], fed.family.nets[0].init(jax.random.key(0), jnp.zeros((1, 6)))
    x = jnp.asarray(data()[0][:5])
    padded, valid = jnp.concatenate([x, jnp.full((4, 6), 50.0)]), jnp.arange(9) < 5
    _, stats = net.apply(variables, padded, train=True, valid=valid)
    _, wanted = net.apply(variables, x, train=True, valid=jnp.ones(5, bool))
    for found, alone in zip(jax.tree.leaves(stats), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, alone, atol=1e-6)


def test_a_batch_is_no_larger_than_what_clients_hold(tmp_path):
    fed = build(config(tmp_path, "family.net=mlp", "train.batch_size=20000"), Own(data=data()))
    assert fed.local.batch_size == 25
